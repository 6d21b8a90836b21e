"""Programs that tests run: those that came with a package into this environment, or else the machine's."""

import os
import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["PROGRAMS", "program_or_skip"]

PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def program_or_skip(name: str) -> str:
    """Return the path of a program; where it is missing, the test is skipped and says so."""
    found = shutil.which(name, path=PROGRAMS)
    if found is None:
        pytest.skip(f"needs {name}")
    return found
