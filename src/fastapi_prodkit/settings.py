"""`Settings` joins all sections: it reads their values from several sources, and refuses unsafe ones.

    settings = Settings()
    settings.rate_limit.default     # RATE_LIMIT_DEFAULT, from the environment, a .env file, or a secret store

The first source that has a value wins: arguments, environment, `.env.{ENVIRONMENT}`, `.env`, mounted files, AWS
Secrets Manager, AWS Systems Manager, profile, default. Names are the same in each, and case never matters.
"""

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from fastapi_prodkit import sections
from fastapi_prodkit._config import production_rules, variables
from fastapi_prodkit.exceptions import SettingsError, SettingsWarning
from fastapi_prodkit.secrets import VariablesSource, read_stores
from fastapi_prodkit.sections.process import SHORTEST_TOKEN

__all__ = ["PROFILES", "Settings"]

# Values that replace the defaults in an environment, by variable. LOG_FORMAT=console applies on a terminal only.
PROFILES: Final[Mapping[str, Mapping[str, str]]] = {
    "dev": {
        "LOG_FORMAT": "console",
        "DATABASE_N_PLUS_ONE": "10",
        "EVENT_LOOP_LIMIT": "0.1",  # the limit of asyncio's own debug mode
        "HOSTS_ALLOWED": "*",
        "HEALTH_DETAILS": "true",
        "METRICS_PUBLIC": "true",
        "DOCS_ENABLED": "true",
        "DATABASE_SSL": "off",
        "RATE_LIMIT_DEFAULT": "10000/minute",
        "SHUTDOWN_DRAIN": "0",
    },
    "test": {
        "ERRORS_RAISE": "true",
        "HOSTS_ALLOWED": "*",
        "HEALTH_DETAILS": "true",
        "METRICS_PUBLIC": "true",
        "DOCS_ENABLED": "true",
        "DATABASE_SSL": "off",
        "RATE_LIMIT_DEFAULT": "none",
        "SHUTDOWN_DRAIN": "0",
    },
    "staging": {},
    "prod": {},
}

_CONTRADICTED = "another source has another value: set it in the process's environment or in .env only"


class Settings(BaseSettings):
    """All settings, read when the object is constructed. Subclass it to add fields of your own.

    A section that is None leaves its piece out: `<SECTION>_ENABLED=false`, or in code `Settings(rate_limit=None)`.

    Raises:
        SettingsError: Settings cannot be used; the error lists all of them by name, with the remedy, without values.
        MissingExtraError: A secret in AWS is configured and boto3 is not installed.
    """

    model_config = SettingsConfigDict(
        env_file=".env",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",  # an unknown argument is an error; unknown variables are ignored
        frozen=True,
        hide_input_in_errors=True,
    )

    environment: Literal["dev", "test", "staging", "prod"] = Field(
        "dev", description="Selects the profile and the rules."
    )
    debug: bool = Field(False, description="Send FastAPI's traceback page instead of the 500 problem.")

    service: sections.ServiceSettings = Field(default_factory=sections.ServiceSettings)
    log: sections.LogSettings | None = Field(default_factory=sections.LogSettings)
    access_log: sections.AccessLogSettings | None = Field(default_factory=sections.AccessLogSettings)
    errors: sections.ErrorsSettings | None = Field(default_factory=sections.ErrorsSettings)
    proxy: sections.ProxySettings | None = Field(default_factory=sections.ProxySettings)
    request_id: sections.RequestIdSettings | None = Field(default_factory=sections.RequestIdSettings)
    headers: sections.HeadersSettings | None = Field(default_factory=sections.HeadersSettings)
    hosts: sections.HostsSettings | None = Field(default_factory=sections.HostsSettings)
    cors: sections.CorsSettings | None = Field(default_factory=sections.CorsSettings)
    limits: sections.LimitsSettings | None = Field(default_factory=sections.LimitsSettings)
    rate_limit: sections.RateLimitSettings | None = Field(default_factory=sections.RateLimitSettings)
    routing: sections.RoutingSettings | None = Field(default_factory=sections.RoutingSettings)
    health: sections.HealthSettings | None = Field(default_factory=sections.HealthSettings)
    event_loop: sections.EventLoopSettings | None = Field(default_factory=sections.EventLoopSettings)
    metrics: sections.MetricsSettings | None = Field(default_factory=sections.MetricsSettings)
    docs: sections.DocsSettings | None = None
    auth: sections.AuthSettings | None = None
    database: sections.DatabaseSettings | None = None
    shutdown: sections.ShutdownSettings | None = Field(default_factory=sections.ShutdownSettings)
    secrets: sections.SecretsSettings = Field(default_factory=sections.SecretsSettings)

    def __init__(self, **values: Any) -> None:
        problems = {}
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = variables.problems(error, type(self), _prefix(type(self)))
        except UnicodeDecodeError:
            problems = {".env": "is not encoded in UTF-8: save it in UTF-8"}
        if problems:  # outside of `except`, so that the ValidationError, which has the values, is not its context
            raise SettingsError(problems)

    @field_validator("*", mode="before")
    @classmethod
    def _switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Read `<SECTION>_ENABLED`: a section that is switched off is None."""
        name = str(info.field_name)
        if not isinstance(value, dict) or "enabled" not in value or not variables.has_switch(cls.model_fields[name]):
            return value
        try:
            enabled = TypeAdapter(bool).validate_python(value["enabled"])
        except ValidationError:
            enabled = None
        if enabled is None:
            raise SettingsError({variables.variable(_prefix(cls), name, "enabled"): "must be true or false"})
        return {key: inner for key, inner in value.items() if key != "enabled"} if enabled else None

    @field_validator(
        "debug", "log", "proxy", "hosts", "cors", "rate_limit", "health", "metrics", "docs", "auth", "database"
    )
    @classmethod
    def _refuse_unsafe(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("environment") in ("staging", "prod"):
            name = str(info.field_name)
            unsafe = {**dict(production_rules.refusals(name, value, info.data)), **_short_tokens(name, value)}
            if unsafe:
                problems = {variables.variable(_prefix(cls), key): text for key, text in unsafe.items()}
                return production_rules.refuse(name, value, problems)
        return value

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the base class declares wider types than it passes
        cls,
        settings_cls: type[BaseSettings],
        init_settings: InitSettingsSource,
        env_settings: EnvSettingsSource,
        dotenv_settings: DotEnvSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - SECRETS_DIR replaces it
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in order of precedence; to add one, override this and extend the tuple of `super()`."""
        environment = VariablesSource(settings_cls, env_settings.env_vars, "the environment")
        dotenv = VariablesSource(settings_cls, dotenv_settings.env_vars, ".env")
        chosen = [init_settings(), environment(), dotenv(), {"environment": cls.model_fields["environment"].default}]
        profile = str(next(state["environment"] for state in chosen if "environment" in state))
        overlay = VariablesSource(settings_cls, _overlay(dotenv_settings, profile), f".env.{profile}")
        stores, problems = read_stores(settings_cls, [chosen[0], chosen[1], overlay(), chosen[2]])
        if any(source().get("environment", profile) != profile for source in (overlay, *stores)):
            problems["environment"] = variables.Unusable(_CONTRADICTED)
        given = [environment, overlay, dotenv, *stores]
        problems |= _misspelt(settings_cls, given, profile)
        for source in given:
            problems |= variables.whole_sections(source.env_vars, settings_cls, _prefix(settings_cls))
        return (
            InitSettingsSource(settings_cls, problems),
            init_settings,
            environment,
            overlay,
            dotenv,
            *stores,
            _Profile(settings_cls, _relaxed(profile), "the profile", env_prefix=""),
        )


class _Profile(VariablesSource):
    """The values of the profile, except for a section that has required fields and no value from another source."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        return {name: found[name] for name in found if name in self.current_state or not self._has_required(name)}

    def _has_required(self, name: str) -> bool:
        section = variables.section_of(self.settings_cls.model_fields[name])
        return section is not None and any(field.is_required() for field in section.model_fields.values())


def _short_tokens(name: str, section: Any) -> dict[str, str]:
    """Return the keys of a section's tokens that are too short, with the remedy."""
    tokens = {key: getattr(section, key, None) for key in ("token", "level_token")}
    reason = f"has fewer than {SHORTEST_TOKEN} characters and can be guessed: make one with openssl rand -hex 16"
    return {f"{name}_{key}": reason for key, token in tokens.items() if token and len(token) < SHORTEST_TOKEN}


def _overlay(dotenv: DotEnvSettingsSource, profile: str) -> Mapping[str, str | None]:
    """Read `.env.{environment}` beside each .env file."""
    if profile not in PROFILES or dotenv.env_file is None:
        return {}
    files = [dotenv.env_file] if isinstance(dotenv.env_file, str | os.PathLike) else dotenv.env_file
    return DotEnvSettingsSource(
        dotenv.settings_cls,
        env_file=[f"{os.fspath(file)}.{profile}" for file in files],
        env_file_encoding=dotenv.env_file_encoding,
        env_file_depth=dotenv.env_file_depth,
        case_sensitive=False,
    ).env_vars


def _relaxed(profile: str) -> Mapping[str, str]:
    relaxed = PROFILES.get(profile, {})
    if sys.stdout is None or not sys.stdout.isatty():
        return {name: value for name, value in relaxed.items() if name != "LOG_FORMAT"}
    return relaxed


def _misspelt(
    settings_cls: type[BaseSettings], sources: Iterable[VariablesSource], profile: str
) -> dict[str, variables.Unusable]:
    """Warn of near misses; those of authentication stop staging and prod, which would be open without it."""
    problems = {}
    prefix = _prefix(settings_cls)
    ours, known = variables.variables(Settings, prefix), variables.variables(settings_cls, prefix)
    for source in sources:
        for name, near in variables.near_misses(source.env_vars, ours, known):
            if profile in ("staging", "prod") and near.startswith(f"{prefix}auth_".upper()):
                problems[name.lower()] = variables.Unusable(f"is not a setting; did you mean {near}?")
            else:
                warnings.warn(
                    f"{name} in {source.origin} is not a setting; did you mean {near}?",
                    SettingsWarning,
                    stacklevel=6,  # where Settings() is called
                )
    return problems


def _prefix(settings_cls: type[BaseSettings]) -> str:
    return settings_cls.model_config.get("env_prefix", "")
