"""Find programs that tests run: from a package in this environment, or else on the machine."""

import os
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["PROGRAMS", "program_or_skip"]

PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def program_or_skip(name: str) -> str:
    """Return the path of a program; skip the test if it is missing."""
    found = shutil.which(name, path=PROGRAMS)
    if found is None:
        pytest.skip(f"needs {name}")
    return found
