"""Assert how many queries a block executes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi_prodkit import _extras

__all__ = ["assert_max_queries"]

_SAVEPOINTS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


@contextmanager
def assert_max_queries(most: int, *, engine: Any = None) -> Iterator[list[str]]:
    """Fail if the block executes more than `most` statements, and list them; yield the growing list.

    Statements that begin or end transactions and savepoints are not counted. The test of an idle connection is not
    counted either.

    Args:
        most: Maximum number of statements.
        engine: The engine to observe, asynchronous or not. Default: every engine in the process.

    Raises:
        AssertionError: The block executed more statements.
    """
    _extras.require("sqlalchemy", extra="database")
    from sqlalchemy import Engine, event  # noqa: PLC0415 - an extra

    target = Engine if engine is None else getattr(engine, "sync_engine", engine)
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(_SAVEPOINTS):
            statements.append(statement)

    event.listen(target, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(target, "before_cursor_execute", note)
    if len(statements) > most:
        listed = "\n".join(f"{number}. {statement}" for number, statement in enumerate(statements, 1))
        raise AssertionError(f"{len(statements)} queries, at most {most} were expected:\n{listed}")
