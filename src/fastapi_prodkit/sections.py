"""One frozen model per piece: its variables, defaults, bounds and units.

A default here is the production one, and is what a piece used alone gets; what dev and test relax stands in
`settings.PROFILES`. The model of the section `rate_limit` is `RateLimitSettings`, and its field `default` is the
variable `RATE_LIMIT_DEFAULT`. Unknown keys are ignored, because foreign variables may share a prefix.
"""

import re
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

__all__ = [
    "AccessLogSettings",
    "CorsSettings",
    "DatabaseSettings",
    "DocsSettings",
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
]


def _none(value: Any) -> Any:
    """Read the word `none` as None."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


OrNone = BeforeValidator(_none)
MaybeSeconds = Annotated[float | None, OrNone]


class Section(BaseModel):
    """The configuration object of one piece."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", hide_input_in_errors=True, defer_build=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        """Read "a, b" as ("a", "b") wherever a list is asked for."""
        if isinstance(value, str) and get_origin(cls.model_fields[str(info.field_name)].annotation) is tuple:
            return tuple(item for part in value.split(",") if (item := part.strip()))
        return value


class ServiceSettings(Section):
    """Who this process is, in every log line and in the API's docs."""

    name: str = Field("fastapi-service", min_length=1, description="Name of the service.")
    version: str = Field("0.0.0", min_length=1, description="Version of the service that is deployed.")


class LogSettings(Section):
    """How the whole process logs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field("INFO", description="Lowest level written.")
    format: Literal["json", "console"] = Field("json", description="One JSON object a line, or readable text.")
    redact: tuple[str, ...] = Field((), description="Key names whose values are masked, beside the built-in ones.")

    @field_validator("level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class AccessLogSettings(Section):
    """Whether requests are logged; ACCESS_LOG_ENABLED=false leaves the line out."""


class ProxySettings(Section):
    """Which peers may say who the client is."""

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
        None, pattern=r"^[a-z0-9-]+$", validate_default=True, description="Vercel team (scope slug) that owns it."
    )
    allow_credentials: bool = Field(False, description="Let browsers send cookies and HTTP authentication.")
    allow_methods: tuple[str, ...] = Field(
        ("GET", "POST", "PUT", "PATCH", "DELETE"), description="Methods of preflights."
    )
    allow_headers: tuple[str, ...] = Field(
        ("Authorization", "Content-Type", "X-Request-ID"), description="Request headers of preflights."
    )
    expose_headers: tuple[str, ...] = Field(
        ("X-Request-ID", "RateLimit", "RateLimit-Policy", "Retry-After"), description="Headers scripts may read."
    )
    max_age: int = Field(600, ge=0, le=7200, description="How long browsers keep a preflight's answer, seconds.")

    @field_validator("origins")
    @classmethod
    def _exact(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]+)?", origin):
                raise ValueError("an origin is scheme://host or scheme://host:port in lower case, without a path")
            if re.fullmatch(r"http://.*:80|https://.*:443", origin):
                raise ValueError("browsers leave the scheme's own port out of an origin; leave :80 and :443 out")
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
    """How much a single request may ask for."""

    max_body_size: Annotated[int | None, OrNone] = Field(1_048_576, ge=0, description="Largest body, bytes; or none.")
    body_timeout: MaybeSeconds = Field(20.0, gt=0, description="Longest wait for a part of a body, seconds; or none.")
    request_timeout: MaybeSeconds = Field(30.0, gt=0, description="Longest time to a response, seconds; or none.")
    max_concurrent: Annotated[int | None, OrNone] = Field(
        None, ge=1, description="Most requests that are served at a time; or none."
    )
    queue_timeout: Annotated[float | None, OrNone] = Field(
        1.0, gt=0, description="Longest wait for a place among them, seconds; none refuses at once."
    )


class RateLimitSettings(Section):
    """How often a client may call."""

    default: str = Field("100/minute", min_length=1, description="Limit on every request of one client.")
    storage_url: SecretStr = Field(
        SecretStr("memory://"), min_length=1, description="Where to count; redis://... is shared by all processes."
    )
    strategy: Literal["fixed-window", "moving-window", "sliding-window"] = Field(
        "fixed-window", description="What the seconds of a limit mean."
    )
    on_storage_error: Literal["memory", "allow", "deny"] = Field(
        "memory", description="While the store fails: count in this process, let all pass, or refuse with 503."
    )
    storage_timeout: float = Field(0.1, gt=0, description="Longest time for one operation of the store, seconds.")
    legacy_headers: bool = Field(False, description="Send X-RateLimit-* as well.")

    @property
    def shared(self) -> bool:
        """Whether several processes count together."""
        return not self.storage_url.get_secret_value().startswith("memory:")


class HealthSettings(Section):
    """How /health and /ready answer."""

    timeout: float = Field(1.0, gt=0, description="Longest time for one check, seconds.")
    cache: float = Field(1.0, ge=0, description="How long a result of the checks is reused, seconds.")
    details: bool = Field(False, description="Name the checks and their results in the answer of /ready.")


class MetricsSettings(Section):
    """Who may read /metrics; without a token it is closed."""

    token: SecretStr | None = Field(None, min_length=1, description="Bearer token that opens /metrics.")
    public: bool = Field(False, description="Open /metrics to everybody.")


class DocsSettings(Section):
    """The interactive documentation at /docs; DOCS_ENABLED=false removes it and the schema."""


class DatabaseSettings(Section):
    """How to reach the database."""

    url: SecretStr = Field(min_length=1, description="postgresql://user:password@host/name or sqlite:///file.")
    read_url: SecretStr | None = Field(None, min_length=1, description="The same for a read replica.")
    pool_size: int = Field(5, ge=1, description="Connections kept open by each worker.")
    max_overflow: int = Field(5, ge=0, description="Further connections under load, by each worker.")
    pool_timeout: float = Field(5.0, gt=0, description="Longest wait for a free connection, seconds.")
    connect_timeout: float = Field(5.0, gt=0, description="Longest time to connect, seconds.")
    command_timeout: float = Field(30.0, gt=0, description="Longest time for one statement, seconds.")
    statement_timeout: MaybeSeconds = Field(30.0, gt=0, description="The server ends what takes longer, seconds.")
    lock_timeout: MaybeSeconds = Field(10.0, gt=0, description="The server ends what waits longer for a lock, seconds.")
    idle_transaction_timeout: MaybeSeconds = Field(
        60.0, gt=0, description="The server ends a connection that idles longer in a transaction, seconds; or none."
    )
    pool_recycle: float = Field(300.0, gt=0, description="A connection that is older is replaced, seconds.")
    pooler: Annotated[Literal["pgbouncer"] | None, OrNone] = Field(None, description="pgbouncer where it is one.")
    password_secret: str | None = Field(
        None, min_length=1, description="AWS Secrets Manager secret with the password; read for each new connection."
    )
    iam_auth: bool = Field(False, description="A token of AWS IAM in place of a password, for each new connection.")
    startup_timeout: float = Field(0.0, ge=0, description="Longest wait for the database at start-up, seconds.")
    ssl: Literal["off", "require", "verify-full"] = Field("verify-full", description="TLS to PostgreSQL.")
    ssl_root_cert: str | None = Field(None, description="File with the CA certificates; the system's by default.")
    slow_query: MaybeSeconds = Field(1.0, gt=0, description="What takes longer is logged, seconds; or none.")
    n_plus_one: Annotated[int | None, OrNone] = Field(
        None, ge=1, description="A statement that a request repeats more often is warned about; or none."
    )
    sql_comment: bool = Field(False, description="Append the request's id to each statement, as a comment.")
    migrations: Literal["fail", "warn", "off"] = Field("fail", description="What /ready says of pending migrations.")
    migrations_config: str | None = Field(
        None, description="alembic.ini or pyproject.toml of the migrations; with it /ready looks for pending ones."
    )
    migrations_url: SecretStr | None = Field(
        None, min_length=1, description="For migrations: around a pooler, or as the owner of the tables."
    )
    migrations_lock_timeout: float = Field(
        300.0, ge=0, description="Longest wait for another process that is migrating, seconds."
    )


class ShutdownSettings(Section):
    """How the process ends; drain and grace together stay below what the platform allows, 30 s on ECS."""

    drain: float = Field(5.0, ge=0, description="How long the port keeps answering after SIGTERM, seconds.")
    grace: float = Field(20.0, gt=0, description="How long requests in flight may take after that, seconds.")


class SecretsSettings(Section):
    """Where settings come from, beside the environment and the .env files."""

    dir: str | None = Field(None, description="Directory of mounted secret files, one per variable.")
    aws_secret_id: str | None = Field(None, description="Name or ARN of an AWS Secrets Manager secret (JSON object).")
    aws_ssm_prefix: str | None = Field(None, pattern=r"^/", description="Path prefix in AWS SSM Parameter Store.")
