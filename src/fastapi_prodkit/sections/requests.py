"""Sections of the layers between a client and the app."""

import re
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from fastapi_prodkit.sections.section import MaybeSeconds, OrNone, Section

__all__ = [
    "AccessLogSettings",
    "CorsSettings",
    "ErrorsSettings",
    "HeadersSettings",
    "HostsSettings",
    "LimitsSettings",
    "ProxySettings",
    "RateLimitSettings",
    "RequestIdSettings",
    "RoutingSettings",
]


class AccessLogSettings(Section):
    """The log line of each request; ACCESS_LOG_ENABLED=false turns it off."""


class ErrorsSettings(Section):
    """What happens to an unhandled exception; without this section it is passed to the server."""

    # A field cannot be called `raise`; the variable is ERRORS_RAISE.
    raise_: bool = Field(False, description="Re-raise every unhandled exception, even if the response is complete.")


class ProxySettings(Section):
    """Which proxies are trusted to send the client's address and scheme."""

    trusted: tuple[str, ...] = Field(
        (), description="Addresses and networks (CIDR) of the proxies; unix: a socket; *: any."
    )


class RequestIdSettings(Section):
    """How requests are identified."""

    header: str = Field("X-Request-ID", pattern=r"^[A-Za-z0-9-]+$", description="Header that carries the id.")
    trust_inbound: bool = Field(True, description="Keep a valid id that the client sent.")


class HeadersSettings(Section):
    """The security headers; an empty value leaves that header out."""

    hsts_max_age: int = Field(63_072_000, ge=0, description="Strict-Transport-Security, seconds; 0 leaves it out.")
    csp: str = Field(
        "default-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        description="Content-Security-Policy.",
    )
    referrer_policy: str = Field("no-referrer", description="Referrer-Policy.")
    permissions_policy: str = Field(
        "camera=(), geolocation=(), microphone=(), payment=(), usb=()", description="Permissions-Policy."
    )
    frame_options: str = Field("DENY", description="X-Frame-Options, for browsers without frame-ancestors.")
    cross_origin_opener_policy: str = Field("same-origin", description="Cross-Origin-Opener-Policy, on HTML only.")

    @field_validator("csp", "referrer_policy", "permissions_policy", "frame_options", "cross_origin_opener_policy")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not (value.isascii() and value.isprintable()):
            raise ValueError("must be printable ASCII on one line")
        return value


class CorsSettings(Section):
    """Which web origins may read responses."""

    origins: tuple[str, ...] = Field((), description="Exact origins, such as https://app.example.com.")
    origin_regex: str | None = Field(None, description="Regular expression that a whole origin must match.")
    vercel_project: str | None = Field(None, pattern=r"^[a-z0-9-]+$", description="Vercel project of the front end.")
    vercel_team: str | None = Field(
        None, pattern=r"^[a-z0-9-]+$", validate_default=True, description="Vercel team (slug) that owns the project."
    )
    allow_credentials: bool = Field(False, description="Let browsers send cookies and HTTP authentication.")
    allow_methods: tuple[str, ...] = Field(
        ("GET", "POST", "PUT", "PATCH", "DELETE"), description="Methods that preflights allow."
    )
    allow_headers: tuple[str, ...] = Field(
        ("Authorization", "Content-Type", "X-Request-ID"), description="Request headers that preflights allow."
    )
    expose_headers: tuple[str, ...] = Field(
        ("X-Request-ID", "RateLimit", "RateLimit-Policy", "Retry-After"),
        description="Response headers that scripts may read.",
    )
    max_age: int = Field(600, ge=0, le=7200, description="How long browsers keep a preflight's answer, seconds.")

    @field_validator("origins")
    @classmethod
    def _exact(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?", origin):
                raise ValueError("an origin is scheme://host or scheme://host:port in lower case, without a path")
            if re.fullmatch(r"http://.*:80|https://.*:443", origin):
                raise ValueError("browsers omit the default port of a scheme; leave :80 and :443 out")
        return origins

    @field_validator("allow_methods", "allow_headers", "expose_headers")
    @classmethod
    def _tokens(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) for name in names):
            raise ValueError("methods and header names have no spaces and no quotes (RFC 9110, token)")
        return names

    @field_validator("origin_regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern

    @field_validator("vercel_team")
    @classmethod
    def _vercel_pair(cls, team: str | None, info: ValidationInfo) -> str | None:
        if "vercel_project" in info.data and (team is None) != (info.data["vercel_project"] is None):
            raise ValueError("vercel_project and vercel_team belong together; set both or neither")
        return team

    @property
    def configured(self) -> bool:
        """Whether any origin could be allowed."""
        return bool(self.origins or self.origin_regex or self.vercel_project)


class HostsSettings(Section):
    """Which host names the service answers to."""

    allowed: tuple[str, ...] = Field((), description="Host names; *.example.com allows subdomains, * any.")


class LimitsSettings(Section):
    """Limits of size, time and concurrency of requests."""

    max_body_size: Annotated[int | None, OrNone] = Field(1_048_576, ge=0, description="Largest body, bytes; or none.")
    max_head_size: Annotated[int | None, OrNone] = Field(
        65_536, ge=1, description="Largest head of a request under `fastapi-prodkit serve`, bytes; or none."
    )
    max_headers: Annotated[int | None, OrNone] = Field(
        100, ge=1, description="Most header lines of a request; or none."
    )
    body_timeout: MaybeSeconds = Field(
        20.0, gt=0, description="Longest wait for the next part of a body, seconds; or none."
    )
    request_timeout: MaybeSeconds = Field(
        30.0, gt=0, description="Longest time until a response starts, seconds; or none."
    )
    max_concurrent: Annotated[int | None, OrNone] = Field(
        None, ge=1, description="Most requests that are served at a time; or none."
    )
    queue_timeout: Annotated[float | None, OrNone] = Field(
        1.0, gt=0, description="Longest wait in the queue, seconds; none refuses at once."
    )
    cancel_on_disconnect: bool = Field(False, description="Cancel the handler when its client disconnects.")


class RateLimitSettings(Section):
    """How often a client may call."""

    default: Annotated[str | None, OrNone] = Field(
        "100/minute", min_length=1, description="Limit on every request of one client; or none."
    )
    storage_url: SecretStr = Field(
        SecretStr("memory://"),
        min_length=1,
        description="Where requests are counted; redis://... is shared by all processes.",
    )
    strategy: Literal["fixed-window", "moving-window", "sliding-window"] = Field(
        "fixed-window", description="How the window of a limit is counted: fixed, moving or sliding."
    )
    on_storage_error: Literal["memory", "allow", "deny"] = Field(
        "memory", description="While the store fails: count in this process, let all pass, or refuse with 503."
    )
    storage_timeout: float = Field(0.1, gt=0, description="Longest time for one operation of the store, seconds.")
    legacy_headers: bool = Field(False, description="Send X-RateLimit-* as well.")

    @property
    def shared(self) -> bool:
        """Whether several processes count together."""
        return self.storage_url.get_secret_value() != "memory://"


class RoutingSettings(Section):
    """How the route of a request is found."""

    index: bool = Field(True, description="Find it by an index, in place of asking every route in turn.")
