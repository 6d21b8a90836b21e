"""Sections of the process: who it is, what it tells about itself, and how it ends."""

from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator

from fastapi_prodkit.sections.section import Section

__all__ = [
    "DocsSettings",
    "HealthSettings",
    "LogSettings",
    "MetricsSettings",
    "SecretsSettings",
    "ServiceSettings",
    "ShutdownSettings",
]


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


class ShutdownSettings(Section):
    """How the process ends; drain and grace together stay below what the platform allows, 30 s on ECS."""

    drain: float = Field(5.0, ge=0, description="How long the port keeps answering after SIGTERM, seconds.")
    grace: float = Field(20.0, gt=0, description="How long requests in flight may take after that, seconds.")


class SecretsSettings(Section):
    """Where settings come from, beside the environment and the .env files."""

    dir: str | None = Field(None, description="Directory of mounted secret files, one per variable.")
    aws_secret_id: str | None = Field(None, description="Name or ARN of an AWS Secrets Manager secret (JSON object).")
    aws_ssm_prefix: str | None = Field(None, pattern=r"^/", description="Path prefix in AWS SSM Parameter Store.")
