"""One frozen model per piece: its variables, defaults, bounds and units.

The defaults are those of production, and of a piece that is used alone; the values of dev and test are in
`settings.PROFILES`. The model of the section `rate_limit` is `RateLimitSettings`, and its field `default` is the
variable `RATE_LIMIT_DEFAULT`. An unknown name is an error, `RateLimitSettings(defualt="5/minute")`; variables of other
programs that share a prefix are ignored.

The module of a section is imported on first access, so that importing one piece does not import all sections.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastapi_prodkit.sections.section import Section

if TYPE_CHECKING:
    from fastapi_prodkit.sections.auth import AuthSettings
    from fastapi_prodkit.sections.database import DatabaseSettings
    from fastapi_prodkit.sections.process import (
        DocsSettings,
        EventLoopSettings,
        HealthSettings,
        LogSettings,
        MetricsSettings,
        SecretsSettings,
        ServiceSettings,
        ShutdownSettings,
    )
    from fastapi_prodkit.sections.requests import (
        AccessLogSettings,
        CorsSettings,
        ErrorsSettings,
        HeadersSettings,
        HostsSettings,
        LimitsSettings,
        ProxySettings,
        RateLimitSettings,
        RequestIdSettings,
        RoutingSettings,
    )

__all__ = [
    "AccessLogSettings",
    "AuthSettings",
    "CorsSettings",
    "DatabaseSettings",
    "DocsSettings",
    "ErrorsSettings",
    "EventLoopSettings",
    "HeadersSettings",
    "HealthSettings",
    "HostsSettings",
    "LimitsSettings",
    "LogSettings",
    "MetricsSettings",
    "ProxySettings",
    "RateLimitSettings",
    "RequestIdSettings",
    "RoutingSettings",
    "SecretsSettings",
    "Section",
    "ServiceSettings",
    "ShutdownSettings",
]

_OWN_MODULE = {"Auth": "auth", "Database": "database"}
_PROCESS = ("Docs", "EventLoop", "Health", "Log", "Metrics", "Secrets", "Service", "Shutdown")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    piece = name.removesuffix("Settings")
    home = _OWN_MODULE.get(piece) or ("process" if piece in _PROCESS else "requests")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
