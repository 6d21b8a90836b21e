"""Rules about the packages that are installed."""

import sys
from collections.abc import Iterator
from datetime import timedelta

from fastapi_prodkit.cli.doctor.advisories import ADVISORIES, AS_OF, UNFIXED, is_older
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Fault, rule

__all__ = ["RULES"]

_STALE = timedelta(days=180)


@rule("dependency-advisory", "error", "A package has a known vulnerability")
def advisory(facts: Facts) -> Iterator[Fault]:
    """Tell which packages are older than the fix of what is known about them."""
    for each in ADVISORIES:
        version = facts.installed.get(each.package)
        if version is not None and is_older(version, each.fixed):
            yield Fault(
                f"{each.package} {version}: {each.effect} ({', '.join(each.ids)}).",
                f"Upgrade to {each.package} {each.fixed} or newer.",
            )


@rule("dependency-unfixed", "warning", "A package has a vulnerability that is not fixed")
def unfixed(facts: Facts) -> Iterator[Fault]:
    """Tell which packages no upgrade helps with."""
    for package, (effect, instead) in UNFIXED.items():
        if package in facts.installed:
            yield Fault(f"{package} {effect}.", f"Remove it; {instead}.")


@rule("dependency-table-old", "info", "The table of vulnerabilities is old")
def table_old(facts: Facts) -> Iterator[Fault]:
    """Tell when this release of the library is too old to know."""
    if facts.installed and facts.today - AS_OF > _STALE:
        yield Fault(
            f"It is as of {AS_OF.isoformat()}, and what was found since is not in it.",
            "Upgrade fastapi-prodkit, and run pip-audit in CI.",
        )


@rule("dependency-slow-server", "info", "uvicorn could be faster")
def slow_server(facts: Facts) -> Iterator[Fault]:
    """Tell of uvicorn without the event loop and the parser in C; a slow head is not bounded without the latter."""
    if "uvicorn" not in facts.installed or sys.implementation.name != "cpython" or sys.platform == "win32":
        return
    missing = [name for name in ("uvloop", "httptools") if name not in facts.installed]
    if missing:
        yield Fault(f"{' and '.join(missing)} not installed.", "pip install 'fastapi-prodkit[standard]'")


RULES = (advisory, unfixed, table_old, slow_server)
