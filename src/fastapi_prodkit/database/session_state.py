"""Reset the state that a request leaves in the server's session, before another request gets the connection.

Settings, roles, channels, advisory locks, prepared statements and temporary tables outlive the transaction. A
connection is reset when it returns to the pool, unless only ordinary statements ran on it. An ordinary statement begins
with a word that leaves no state, and contains no word that may. So ordinary statements cost one cache look-up, and a
false alarm costs one round trip. State that is left by a function inside the database is not detected.

If the app obtains asyncpg's connection itself, by `(await connection.get_raw_connection()).driver_connection`, the
connection is always reset.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

__all__ = ["RESET", "leaves_state", "reset_session_state"]

# DISCARD ALL would deallocate asyncpg's prepared statements. RESET ALL does not reset the role.
RESET = """
RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; UNLISTEN *; CLOSE ALL; SELECT pg_advisory_unlock_all();
DISCARD TEMP;
DO $$ DECLARE prepared text; BEGIN
    FOR prepared IN SELECT name FROM pg_prepared_statements WHERE from_sql LOOP
        EXECUTE format('DEALLOCATE %I', prepared);
    END LOOP;
END $$
"""

_LONGEST = 2_000  # characters of a statement whose result is cached

# Nested comments at the start are not recognized: their statements count as leaving state.
_START = r"(?:[\s(]|--[^\n]*\n|/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/)*"
_ORDINARY = re.compile(
    rf"{_START}(?:(?:SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE|EXPLAIN|SHOW|COPY|TRUNCATE|LOCK|NOTIFY"
    r'|BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE)\b|SET\s+(?:LOCAL|TRANSACTION|CONSTRAINTS)\s+["\w])',
    re.IGNORECASE,
)
# Checked anywhere, also in strings and comments. `u&"` begins an escaped name, which may spell any other name.
_SUSPECT = ("advisory_lock", "pg_temp", "pg_settings", 'u&"')
_INTO_TEMPORARY = re.compile(rf"{_START}(?:SELECT|WITH|EXPLAIN)\b.*\bINTO\b.*\bTEMP", re.IGNORECASE | re.DOTALL)

_SET_CONFIG = re.compile(r"\bset_config\b")
# A set_config call that is local to the transaction, or local if a parameter is true. Others count as leaving state.
_PART = r"[\w.:\s]|\$\d+\b|'(?:[^'\\]|'')*'(?!')"
_ARGUMENT = rf"(?:{_PART}|\((?:{_PART}|,)*\))+"
_LOCAL = re.compile(rf"{_SET_CONFIG.pattern}\s*\({_ARGUMENT},{_ARGUMENT},\s*(?:true|\$(\d+)(?:\s*::\s*\w+)?)\s*\)")

_CONFIGURED = "fastapi_prodkit.configured"  # whether a `connect` listener has left state that must be kept


def reset_session_state(engine: AsyncEngine, timeout: float) -> None:
    """Reset a connection that returns to the pool if a request may have left state in its session.

    If a `connect` listener has left state as well, the connection is closed instead, because a reset would remove the
    listener's state. The listener runs again for the next connection.

    Args:
        engine: An engine whose connections are `CancellableConnection`, without a pooler.
        timeout: Time-out of the reset, seconds; after it the connection is closed.
    """
    dialect: Any = engine.dialect
    hand_out = dialect.get_driver_connection

    def handed_out(connection: Any) -> Any:
        driver = hand_out(connection)
        driver.needs_reset = True
        return driver

    def taken(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        if _CONFIGURED not in record.info:  # the first checkout, after all `connect` listeners
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
        connection.rollback()  # if this or the next line fails, SQLAlchemy closes the connection
        connection.run_async(lambda driver: driver.reset(timeout=timeout))
        driver.needs_reset = False

    dialect.get_driver_connection = handed_out
    event.listen(engine.sync_engine, "checkout", taken)
    event.listen(engine.sync_engine, "before_cursor_execute", before)
    event.listen(engine.sync_engine, "reset", reset)


def leaves_state(statement: str, parameters: Any = ()) -> bool:
    """Return whether a statement may leave state in the server's session that outlives its transaction.

    Args:
        statement: SQL with asyncpg's placeholders, such as `$1`.
        parameters: A sequence, or a list of sequences, one per execution. They may make a `set_config` local.
    """
    found = _classify_cached(statement) if len(statement) <= _LONGEST else _classify(statement)
    if isinstance(found, bool):
        return found
    rows: list[Any] = parameters if isinstance(parameters, list) else [parameters]
    return not all(_are_true(row, found) for row in rows)


def _classify(statement: str) -> bool | tuple[int, ...]:
    """Return whether a statement may leave state; or the indexes of the parameters that must be true if it does not."""
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


_classify_cached = lru_cache(maxsize=1024)(_classify)


def _are_true(row: Sequence[Any], places: tuple[int, ...]) -> bool:
    return all(place < len(row) and row[place] is True for place in places)
