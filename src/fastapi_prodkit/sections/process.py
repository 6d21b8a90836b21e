"""Sections of the process: its name, logs, probes, metrics, docs and secrets, and how it shuts down."""

import re
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from fastapi_prodkit.sections.section import Section

__all__ = [
    "SHORTEST_TOKEN",
    "DocsSettings",
    "EventLoopSettings",
    "HealthSettings",
    "LogSettings",
    "MetricsSettings",
    "SecretsSettings",
    "ServiceSettings",
    "ShutdownSettings",
]


SHORTEST_TOKEN: Final = 16  # characters that staging and prod require: 64 bits if they are hexadecimal


class ServiceSettings(Section):
    """Name and version of the service, in every log line and in the API's docs."""

    name: str = Field("fastapi-service", min_length=1, description="Name of the service.")
    version: str = Field("0.0.0", min_length=1, description="Version of the service that is deployed.")


class LogSettings(Section):
    """How the whole process logs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field("INFO", description="Lowest level written.")
    format: Literal["json", "console"] = Field("json", description="One JSON object a line, or readable text.")
    redact: tuple[str, ...] = Field((), description="Key names whose values are masked, beside the built-in ones.")
    queue: int | None = Field(
        None,
        ge=1,
        description="Most lines that wait for standard output; further ones are dropped. By default log calls wait.",
    )
    level_token: SecretStr | None = Field(
        None, min_length=SHORTEST_TOKEN, description="Bearer token that opens /log-level."
    )

    @field_validator("level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class HealthSettings(Section):
    """Paths, checks and details of the probes."""

    live_paths: tuple[str, ...] = Field(("/health",), description="Paths of the liveness probe.")
    ready_paths: tuple[str, ...] = Field(("/ready",), description="Paths of the readiness probe.")
    startup_paths: tuple[str, ...] = Field(("/startup",), description="Paths of the start-up probe.")
    timeout: float = Field(1.0, gt=0, description="Longest time for one check, seconds.")
    cache: float = Field(1.0, ge=0, description="How long a result of a check is reused, seconds.")
    details: bool = Field(False, description="Show every client the result of each check.")
    token: SecretStr | None = Field(None, min_length=1, description="Bearer token that shows the details.")

    @field_validator("live_paths", "ready_paths", "startup_paths")
    @classmethod
    def _plain(cls, paths: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        taken = {each for value in info.data.values() if isinstance(value, tuple) for each in value}
        for path in paths:
            if not re.fullmatch(r"/|(/[\w.~-]+)+", path):
                raise ValueError("must start with a slash, not end with one, and have no parameters")
            if path in taken or paths.count(path) > 1:
                raise ValueError("must not repeat a path, or have one of another probe: one path is one probe")
        return paths


class EventLoopSettings(Section):
    """When the event loop counts as blocked."""

    limit: float = Field(1.0, ge=0.01, description="A callback that takes longer counts as blocking, seconds.")


class MetricsSettings(Section):
    """Access to /metrics, which is a 404 unless it has a token or is public."""

    token: SecretStr | None = Field(None, min_length=1, description="Bearer token that opens /metrics.")
    public: bool = Field(False, description="Serve /metrics without a token.")


class DocsSettings(Section):
    """The interactive documentation at /docs; DOCS_ENABLED=false removes it and the schema."""

    token: SecretStr | None = Field(
        None, min_length=1, description="Password, of any user, that opens the docs in staging and prod."
    )
    client_id: str | None = Field(
        None, min_length=1, description="Client id with which the docs sign people in at AUTH_ISSUER."
    )


class ShutdownSettings(Section):
    """How the process ends; drain and grace together must be below the limit of the platform, 30 s on ECS."""

    drain: float = Field(5.0, ge=0, description="How long requests are accepted after SIGTERM, seconds.")
    grace: float = Field(20.0, gt=0, description="How long requests in flight may take after the drain, seconds.")


class SecretsSettings(Section):
    """Sources of settings beside the environment and .env files."""

    dir: str | None = Field(None, description="Directory of mounted secret files, one per variable.")
    aws_secret_id: str | None = Field(None, description="Name or ARN of an AWS Secrets Manager secret (JSON object).")
    aws_ssm_prefix: str | None = Field(None, pattern=r"^/", description="Path prefix in AWS SSM Parameter Store.")
