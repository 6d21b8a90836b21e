"""A project with migrations, for tests: alembic.ini, env.py and scripts in a directory."""

import asyncio
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

INI = "[alembic]\nscript_location = %(here)s/migrations\npath_separator = os\n"
ENV = """
from alembic import context
from sqlalchemy import Column, Integer, MetaData, String, Table
from fastapi_prodkit.database.migrations import run_migrations

metadata = MetaData()
Table("items", metadata, Column("id", Integer, primary_key=True), Column("name", String(50)))
run_migrations(context, metadata{arguments})
"""
MAKO = """revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
from alembic import op
import sqlalchemy as sa
def upgrade():
    ${upgrades or "pass"}
def downgrade():
    ${downgrades or "pass"}
"""
CREATE = 'op.create_table("items", sa.Column("id", sa.Integer(), primary_key=True))'
ADD_NAME = 'op.add_column("items", sa.Column("name", sa.String(50)))'
DROP_NAME = """with op.batch_alter_table("items") as table:
    table.drop_column("name")"""
INDEX = """with op.get_context().autocommit_block():
    op.create_index("items_name", "items", ["name"], postgresql_concurrently=True, if_not_exists=True)"""


def project(directory: Path, *, arguments: str = "") -> Path:
    """Write a project of two migrations into the directory and return the directory."""
    (directory / "migrations" / "versions").mkdir(parents=True)
    (directory / "alembic.ini").write_text(INI)
    (directory / "migrations" / "env.py").write_text(ENV.format(arguments=arguments))
    (directory / "migrations" / "script.py.mako").write_text(MAKO)
    migration(directory, "0001", CREATE, 'op.drop_table("items")')
    migration(directory, "0002", ADD_NAME, DROP_NAME)
    return directory


def migration(directory: Path, revision: str, upgrade: str, downgrade: str = "pass") -> None:
    """Write a migration that follows the previous one."""
    previous = f"{int(revision) - 1:04}" if revision != "0001" else None
    body = f"""import sqlalchemy as sa
from alembic import op
revision = "{revision}"
down_revision = {previous!r}
def upgrade():
{textwrap.indent(upgrade, "    ")}
def downgrade():
{textwrap.indent(downgrade, "    ")}
"""
    (directory / "migrations" / "versions" / f"{revision}_step.py").write_text(body)


def sql(url: str, *statements: str) -> list[Any]:
    """Run each statement separately, and return the first column of the last result."""
    from sqlalchemy import text

    from fastapi_prodkit.database.engine import create_engine
    from fastapi_prodkit.sections import DatabaseSettings

    async def run() -> list[Any]:
        engine = create_engine(DatabaseSettings(url=url, ssl="off"))
        rows: list[Any] = []
        try:
            async with engine.connect() as connection:
                automatic = await connection.execution_options(isolation_level="AUTOCOMMIT")
                for statement in statements:
                    result = await automatic.execute(text(statement))
                    rows = list(result.scalars()) if result.returns_rows else []
        finally:
            await engine.dispose()
        return rows

    return asyncio.run(run())


def transaction(url: str, *statements: str) -> Callable[[], None]:
    """Run the statements in a transaction of another client that stays open; return a function that ends it."""
    from sqlalchemy import text

    from fastapi_prodkit.database.engine import create_engine
    from fastapi_prodkit.sections import DatabaseSettings

    loop = asyncio.new_event_loop()
    engine = create_engine(DatabaseSettings(url=url, ssl="off"))

    async def begin() -> Any:
        connection = await engine.connect()
        for statement in statements:
            await connection.execute(text(statement))
        return connection

    connection = loop.run_until_complete(begin())

    def end() -> None:
        loop.run_until_complete(connection.close())
        loop.run_until_complete(engine.dispose())
        loop.close()

    return end


def configured(directory: Path, url: str, **attributes: Any) -> Any:
    """Return Alembic's configuration of the project, with settings for the database."""
    from fastapi_prodkit.database.migrations import alembic_config
    from fastapi_prodkit.sections import DatabaseSettings

    config = alembic_config(directory / "alembic.ini")
    config.attributes["settings"] = DatabaseSettings(url=url, ssl="off", migrations_lock_timeout=20)
    config.attributes.update(attributes)
    return config


def version(url: str) -> list[str]:
    """Return the revisions of the database."""
    return sql(url, "SELECT version_num FROM alembic_version")


def environment(url: str, **more: str) -> dict[str, str]:
    """Return the environment variables of a deployment step."""
    kept = {
        name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "COVERAGE_PROCESS_START") if name in os.environ
    }
    return {**kept, "ENVIRONMENT": "test", "DATABASE_URL": url, "PYTHONUNBUFFERED": "1", **more}
