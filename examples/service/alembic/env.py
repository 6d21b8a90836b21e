"""What Alembic runs, from its command line and from `service.migrate`.

The URL comes from the service's settings, so the password stands in no file here. Logging is left as it is:
Alembic's usual `fileConfig` would switch off every logger that exists already.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from alembic import context
from service.config import ServiceSettings
from service.models import Base
from sqlalchemy import Connection, text

from fastapi_prodkit.database import Database

STATEMENT_TIMEOUT = 3600.0  # seconds; a migration may take longer than a request, and so may another deployment's
LOCK = 5_208_119_736_012  # any number that no other program locks in the same database


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":  # two deployments at once take turns
            connection.execute(text(f"select pg_advisory_xact_lock({LOCK})"))
        context.run_migrations()


async def connect_and_migrate(settings: ServiceSettings) -> None:
    patient = settings.database.model_copy(update={"command_timeout": STATEMENT_TIMEOUT})
    database = Database(patient)
    async with database.lifespan(None), database.engine.connect() as connection:
        await connection.run_sync(migrate)


# A thread of its own has no running event loop, so this works from anywhere, an async test included.
with ThreadPoolExecutor(max_workers=1) as thread:
    settings = context.config.attributes.get("settings") or ServiceSettings()
    thread.submit(asyncio.run, connect_and_migrate(settings)).result()
