"""One frozen model per piece: its variables, defaults, bounds and units.

A default here is the production one, and is what a piece used alone gets; what dev and test relax stands in
`settings.PROFILES`. The model of the section `rate_limit` is `RateLimitSettings`, and its field `default` is the
variable `RATE_LIMIT_DEFAULT`. Unknown keys are ignored, because foreign variables may share a prefix.
"""

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
    HeadersSettings,
    HostsSettings,
    LimitsSettings,
    ProxySettings,
    RateLimitSettings,
    RequestIdSettings,
)
from fastapi_prodkit.sections.section import Section

__all__ = [
    "AccessLogSettings",
    "CorsSettings",
    "DatabaseSettings",
    "DocsSettings",
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
    "SecretsSettings",
    "Section",
    "ServiceSettings",
    "ShutdownSettings",
]
