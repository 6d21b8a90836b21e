"""The service's own settings, beside those of fastapi-prodkit."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi_prodkit import Settings
from fastapi_prodkit.sections import DatabaseSettings
from pydantic import Field


class ServiceSettings(Settings):
    """Settings of the airports service; DATABASE_URL is required."""

    database: DatabaseSettings
    airports_page_size: int = Field(20, ge=1, le=100, description="Items on a page, unless the client sets `limit`.")


def _settings(request: Request) -> ServiceSettings:
    settings: ServiceSettings = request.app.state.settings
    return settings


SettingsDep = Annotated[ServiceSettings, Depends(_settings)]
