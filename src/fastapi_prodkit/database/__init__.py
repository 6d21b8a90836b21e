"""Sessions that commit before the response leaves and roll back on any error.

    database = Database(DatabaseSettings(url="postgresql://user:password@host/name"))
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database

    @app.post("/items")
    async def create(item: ItemIn, session: SessionDep) -> ItemOut: ...

`SessionDep` names SQLAlchemy's session, so importing this package takes the extra `database`.
"""

from fastapi_prodkit import _extras

_extras.require("sqlalchemy", extra="database")

from fastapi_prodkit.database.session import Database, SessionDep, get_session  # noqa: E402 - a hint, not a traceback

__all__ = ["Database", "SessionDep", "get_session"]
