"""The layer between `app = FastAPI()` and production.

    from fastapi_prodkit import create_app

    app = create_app()

Each name is imported on first access (PEP 562), so that importing one piece, such as `fastapi_prodkit.request_id`,
loads neither pydantic-settings nor another piece.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastapi_prodkit._version import __version__

if TYPE_CHECKING:
    from fastapi_prodkit.app import create_app, install
    from fastapi_prodkit.settings import Settings

__all__ = ["Settings", "__version__", "create_app", "install"]


def __getattr__(name: str) -> Any:
    home = {"create_app": "app", "install": "app", "Settings": "settings"}.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
