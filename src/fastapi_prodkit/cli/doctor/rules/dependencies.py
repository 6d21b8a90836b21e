"""Rules about installed packages."""

import sys
from collections.abc import Iterator

from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule

__all__ = ["RULES"]


@rule("dependency-slow-server", "info", "uvicorn could be faster")
def slow_server(facts: Facts) -> Iterator[Problem]:
    """Report uvicorn without uvloop or httptools; without httptools, heads have no time-out."""
    if "uvicorn" not in facts.installed or sys.implementation.name != "cpython" or sys.platform == "win32":
        return
    missing = [name for name in ("uvloop", "httptools") if name not in facts.installed]
    if missing:
        yield Problem(f"{' and '.join(missing)} not installed.", "pip install 'fastapi-prodkit[standard]'")


RULES = (slow_server,)
