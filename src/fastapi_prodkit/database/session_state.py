"""What a request leaves behind in the server's session, and its removal before another request has the connection.

A setting, a role, a channel, an advisory lock, a prepared statement or a temporary table outlives the transaction. A
connection is reset when it comes back to the pool, unless nothing but ordinary statements ran on it: those that begin
with a word that leaves nothing behind, and contain no word that may. So an ordinary statement costs a look at a cache,
and one that is wrongly suspected costs one round trip. What a function of the app's own does inside is not seen.

asyncpg's connection itself, `(await connection.get_raw_connection()).driver_connection`, can do anything: whoever has
obtained it has the connection reset.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

__all__ = ["RESET", "leaves_state", "reset_session_state"]

# Not DISCARD ALL, which would deallocate the statements that asyncpg has prepared. RESET ALL leaves out the role.
RESET = """
RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; UNLISTEN *; CLOSE ALL; SELECT pg_advisory_unlock_all();
DISCARD TEMP;
DO $$ DECLARE prepared text; BEGIN
    FOR prepared IN SELECT name FROM pg_prepared_statements WHERE from_sql LOOP
        EXECUTE format('DEALLOCATE %I', prepared);
    END LOOP;
END $$
"""

_LONGEST = 2_000  # characters of a statement whose verdict is remembered

# A nested comment at the start is none here, so that its statement is suspected.
_START = r"(?:[\s(]|--[^\n]*\n|/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/)*"
_ORDINARY = re.compile(
    rf"{_START}(?:(?:SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE|EXPLAIN|SHOW|COPY|TRUNCATE|LOCK|NOTIFY"
    r'|BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE)\b|SET\s+(?:LOCAL|TRANSACTION|CONSTRAINTS)\s+["\w])',
    re.IGNORECASE,
)
# Wherever they stand, in a text or a comment too. `u&"` begins a name that may spell any other one.
_SUSPECT = ("advisory_lock", "pg_temp", "pg_settings", 'u&"')
_INTO_TEMPORARY = re.compile(rf"{_START}(?:SELECT|WITH|EXPLAIN)\b.*\bINTO\b.*\bTEMP", re.IGNORECASE | re.DOTALL)

_SET_CONFIG = re.compile(r"\bset_config\b")
# A call that is local to the transaction, or is if a parameter is true. Other spellings are suspected.
_PART = r"[\w.:\s]|\$\d+\b|'(?:[^'\\]|'')*'(?!')"
_ARGUMENT = rf"(?:{_PART}|\((?:{_PART}|,)*\))+"
_LOCAL = re.compile(rf"{_SET_CONFIG.pattern}\s*\({_ARGUMENT},{_ARGUMENT},\s*(?:true|\$(\d+)(?:\s*::\s*\w+)?)\s*\)")

_CONFIGURED = "fastapi_prodkit.configured"  # of a connection: whether a connect listener has left a state to be kept


def reset_session_state(engine: AsyncEngine, timeout: float) -> None:
    """Reset a connection that comes back to the pool with what a request may have left behind, and no other.

    A connection on which a `connect` listener has left something is closed instead: a reset would remove that, too, and
    the listener prepares the next connection.

    Args:
        engine: An engine whose connections are `CancellableConnection`, and the server's own, not a pooler's.
        timeout: How long the reset may take, seconds; a connection that takes longer is closed.
    """
    dialect: Any = engine.dialect
    hand_out = dialect.get_driver_connection

    def handed_out(connection: Any) -> Any:
        driver = hand_out(connection)
        driver.needs_reset = True
        return driver

    def taken(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        if _CONFIGURED not in record.info:  # this is the first time, after the listeners of `connect`
            driver = connection.driver_connection
            record.info[_CONFIGURED], driver.needs_reset = driver.has_session_state, False

    def before(connection: Connection, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if leaves_state(statement, parameters):
            dbapi_connection: Any = connection.connection.dbapi_connection
            dbapi_connection.driver_connection.needs_reset = True

    def reset(connection: Any, record: ConnectionPoolEntry, state: PoolResetState) -> None:
        driver = connection.driver_connection
        if not driver.needs_reset or not state.asyncio_safe:
            return
        if record.info.get(_CONFIGURED):
            record.invalidate()
            return
        connection.rollback()  # SQLAlchemy closes the connection if this fails, or the next
        connection.run_async(lambda driver: driver.reset(timeout=timeout))
        driver.needs_reset = False

    dialect.get_driver_connection = handed_out
    event.listen(engine.sync_engine, "checkout", taken)
    event.listen(engine.sync_engine, "before_cursor_execute", before)
    event.listen(engine.sync_engine, "reset", reset)


def leaves_state(statement: str, parameters: Any = ()) -> bool:
    """Say whether a statement may leave something in the server's session that outlives its transaction.

    Args:
        statement: With placeholders as asyncpg has them, `$1`.
        parameters: A sequence, or a list with a sequence for each execution; they may say that `set_config` is local.
    """
    found = _remembered(statement) if len(statement) <= _LONGEST else _look(statement)
    if isinstance(found, bool):
        return found
    rows: list[Any] = parameters if isinstance(parameters, list) else [parameters]
    return not all(_are_true(row, found) for row in rows)


def _look(statement: str) -> bool | tuple[int, ...]:
    """Return whether the text may leave a state; or the places of the parameters that are true if it does not."""
    text = statement.lower()
    if not _ORDINARY.match(text) or any(word in text for word in _SUSPECT):
        return True
    if "temp" in text and _INTO_TEMPORARY.match(text):
        return True
    if "set_config" not in text:
        return False
    calls: list[str] = _LOCAL.findall(text)
    if len(calls) < len(_SET_CONFIG.findall(text)):
        return True
    return tuple(int(place) - 1 for place in calls if place) or False


_remembered = lru_cache(maxsize=1024)(_look)


def _are_true(row: Sequence[Any], places: tuple[int, ...]) -> bool:
    return all(place < len(row) and row[place] is True for place in places)
