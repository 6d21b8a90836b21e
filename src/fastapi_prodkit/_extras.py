"""Import an optional dependency, or raise an error that names the extra to install."""

import importlib
from types import ModuleType

from fastapi_prodkit.exceptions import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return `module`, or raise an error that names the extra which installs it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(f"{package} is not installed: pip install 'fastapi-prodkit[{extra}]'") from error
