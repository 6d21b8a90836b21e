"""Create databases for single tests, as copies of a migrated template."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi_prodkit import _extras

__all__ = ["Databases"]

_T = TypeVar("_T")
_STRATEGIES = (15,)  # first version of PostgreSQL with STRATEGY


class Databases:
    """Create databases on a server, and drop them.

    Args:
        url: URL of a database on the server, with a role that may create databases.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    @contextmanager
    def temporary(self, template: str | None = None) -> Iterator[str]:
        """Yield the URL of a new database, empty or a copy of `template`, to which no client may be connected."""
        name = f"test_{secrets.token_hex(8)}"
        run_apart(self._create(name, template))
        try:
            yield self._named(name)
        finally:
            run_apart(self._drop(name))

    async def _create(self, name: str, template: str | None) -> None:
        async with self._connected() as connection:
            statement = f'CREATE DATABASE "{name}"'
            if template:
                statement += f' TEMPLATE "{_name(template)}"'
                if connection.get_server_version() >= _STRATEGIES:
                    statement += " STRATEGY file_copy"  # the default also writes each page to the write-ahead log
            await connection.execute(statement)

    async def _drop(self, name: str) -> None:
        async with self._connected() as connection:
            await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        _extras.require("asyncpg", extra="database")
        import asyncpg  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra; it has no types

        connection = await asyncpg.connect(self._url.replace("+asyncpg", "", 1))
        try:
            yield connection
        finally:
            await connection.close()

    def _named(self, name: str) -> str:
        base, _, query = self._url.partition("?")
        return f"{base.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


def run_apart(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in a new thread, because this thread may have a running event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]
