"""The service, assembled."""

from fastapi import FastAPI
from fastapi_prodkit import create_app
from fastapi_prodkit.database import Database
from fastapi_prodkit.exceptions import (
    CheckWarning,
    SettingsError,  # fastapi-prodkit new: auth
)

from service.config import ServiceSettings
from service.routers import airports, reports
from service.services.airports import any_loaded

DESCRIPTION = """
The airports of the world, and what visitors report about them.

Errors are [problems](https://www.rfc-editor.org/rfc/rfc9457). Lists come in pages: pass `next_cursor` as `cursor`, or
follow the `Link` header. The `RateLimit` header says how many requests are left.
"""
TAGS = [
    {"name": "airports", "description": "28 000 airports and landing strips; read only."},
    {"name": "reports", "description": "Visit reports; writing is limited to 30 a minute."},
]


def build(settings: ServiceSettings) -> FastAPI:
    """Return the service as an application that has not started yet."""
    # fastapi-prodkit new: auth
    if settings.auth is None:
        raise SettingsError({"AUTH_ISSUER": "is required, or AUTH_SECRET: without users nobody may write"})
    # fastapi-prodkit new: end

    async def airports_loaded() -> None:
        database: Database = app.state.database
        async with database.session() as session:
            if not await any_loaded(session):
                raise CheckWarning("no airports; run python -m service.load")

    app = create_app(
        settings,
        routers=[airports.router, reports.router],
        checks={"airports": airports_loaded},
        title="Airports service",
        description=DESCRIPTION,
        openapi_tags=TAGS,
    )
    return app
