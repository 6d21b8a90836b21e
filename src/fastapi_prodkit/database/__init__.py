"""Sessions that commit before the response is sent, and roll back on any error.

    database = Database(DatabaseSettings(url="postgresql://user:password@host/name"))
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database

    @app.post("/items")
    async def create(item: ItemIn, session: SessionDep) -> ItemOut: ...

`SessionDep` is annotated with SQLAlchemy's session, so importing this package requires the extra `database`.
"""

from fastapi_prodkit import _extras

_extras.require("sqlalchemy", extra="database")

from fastapi_prodkit.database.client_errors import CLIENT_ERRORS  # noqa: E402 - after the check above
from fastapi_prodkit.database.failure import (  # noqa: E402 - after the check above
    add_outage_handlers,
    is_transient,
    is_unavailable,
)
from fastapi_prodkit.database.session import (  # noqa: E402 - after the check above
    Database,
    ReadSessionDep,
    SessionDep,
    get_read_session,
    get_session,
)

__all__ = [
    "CLIENT_ERRORS",
    "Database",
    "ReadSessionDep",
    "SessionDep",
    "add_outage_handlers",
    "get_read_session",
    "get_session",
    "is_transient",
    "is_unavailable",
]
