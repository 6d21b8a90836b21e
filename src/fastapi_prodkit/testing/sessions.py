"""Sessions and clients for asynchronous tests, with pytest-asyncio or anyio."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from fastapi_prodkit import _extras, _scope
from fastapi_prodkit.sections import DatabaseSettings

if TYPE_CHECKING:
    from httpx2 import AsyncClient
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["client_of", "rolled_back_session"]


@asynccontextmanager
async def client_of(
    app: Starlette, *, base_url: str = "http://testserver", headers: Mapping[str, str] | None = None
) -> AsyncIterator["AsyncClient"]:
    """Run the app's lifespan, and yield a client that calls the app in this event loop.

    Inside of another client of the app, the app runs already: the lifespan is not run twice.

    Args:
        app: The app to call.
        base_url: Where the app seems to be.
        headers: Sent with every request, such as those of `headers_as`.
    """
    httpx2 = _extras.require("httpx2", extra="testing")
    async with _running(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = dict(state)
            await app(scope, receive, send)

        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url=base_url, headers=headers) as client:
            yield client


@asynccontextmanager
async def _running(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
    """Run the app's lifespan unless it runs already; yield its state."""
    running: Mapping[str, Any] | None = vars(app).get(_scope.APP_TEST_STATE)
    if running is not None:
        yield running
        return
    async with app.router.lifespan_context(app) as state:
        vars(app)[_scope.APP_TEST_STATE] = found = state or {}
        try:
            yield found
        finally:
            del vars(app)[_scope.APP_TEST_STATE]


@asynccontextmanager
async def rolled_back_session(url: str, **settings: Any) -> AsyncIterator["AsyncSession"]:
    """Open a session that is rolled back at the end; a commit in it only releases a savepoint.

    Args:
        url: URL of a migrated database.
        settings: Further fields of `DatabaseSettings`. TLS is off by default.
    """
    _extras.require("sqlalchemy", extra="database")
    from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415 - an extra

    from fastapi_prodkit.database.engine import create_engine  # noqa: PLC0415 - it needs the extra

    engine = create_engine(DatabaseSettings.model_validate({"ssl": "off", **settings, "url": url}))
    try:
        async with engine.connect() as connection:
            transaction = await connection.begin()
            options: dict[str, Any] = {"join_transaction_mode": "create_savepoint", "expire_on_commit": False}
            async with AsyncSession(connection, **options) as session:
                yield session
            await transaction.rollback()
    finally:
        await engine.dispose()
