"""What a statement leaves behind in the server's session, and its removal before another request has the connection.

A setting, a role, a channel, an advisory lock or a temporary table outlives the transaction. Which statements leave one
is told by their text, so that a connection without one is never reset. What a function does inside is not seen, nor is
the rest of a statement beyond 2000 characters.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

__all__ = ["leaves_state", "reset_session_state"]

_LONGEST = 2_000  # characters that are looked at

_START = r"(?:^|;)(?:\s|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*"
_LEAVES_STATE = re.compile(
    rf"{_START}(?:SET\s+(?!(?:LOCAL|TRANSACTION|CONSTRAINTS)\s)|RESET\s|LISTEN\s|LOAD\s"
    r"|CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:LOCAL|GLOBAL)\s+)?TEMP(?:ORARY)?\s|DECLARE\s.*\sWITH\s+HOLD\s)"
    r"|\sINTO\s+(?:(?:LOCAL|GLOBAL)\s+)?TEMP(?:ORARY)?\s"
    r"|\bpg_temp\s*\."
    r"|\bpg_(?:try_)?advisory_lock(?:_shared)?\s*\(",
    re.IGNORECASE | re.DOTALL,
)
_SET_CONFIG = re.compile(r"\bset_config\s*\(", re.IGNORECASE)
_ARGUMENTS = re.compile(rf"{_SET_CONFIG.pattern}((?:[^()]|\([^()]*\))*)\)", re.IGNORECASE)
_PARAMETER = re.compile(r"\$(\d+)(?:\s*::\s*\w+)?")

# Not DISCARD ALL, which would deallocate the statements that asyncpg has prepared. RESET ALL leaves out the role.
_RESET = (
    "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; UNLISTEN *; CLOSE ALL; "
    "SELECT pg_advisory_unlock_all(); DISCARD TEMP"
)

_STATE = "fastapi_prodkit.session_state"  # of a connection: whether it has to be reset
_CONFIGURED = "fastapi_prodkit.configured"  # of a connection: whether a connect listener has left a state to be kept


def reset_session_state(engine: AsyncEngine, patience: float) -> None:
    """Reset a connection that comes back to the pool with what a statement has left behind, and no other.

    A connection on which a `connect` listener has left something is closed instead: a reset would remove that, too, and
    the listener prepares the next connection.

    Args:
        engine: An engine of asyncpg's whose connections are the server's own, and not a pooler's.
        patience: How long the reset may take, seconds; a connection that takes longer is closed.
    """

    def before(connection: Connection, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if not _look(statement[:_LONGEST]):
            return
        info = connection.info
        if _CONFIGURED not in info:  # this is the first such statement, and asyncpg has not seen it yet
            driver: Any = connection.connection.driver_connection
            info[_CONFIGURED] = driver.has_session_state
        if leaves_state(statement, parameters):
            info[_STATE] = True

    def reset(connection: Any, record: ConnectionPoolEntry, state: PoolResetState) -> None:
        if not record.info.pop(_STATE, False) or not state.asyncio_safe:
            return
        if record.info[_CONFIGURED]:
            record.invalidate()
        else:  # SQLAlchemy closes the connection if this fails
            connection.rollback()
            connection.run_async(lambda driver: driver.execute(_RESET, timeout=patience))

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    event.listen(engine.sync_engine, "reset", reset)


def leaves_state(statement: str, parameters: Any = ()) -> bool:
    """Say whether a statement leaves something in the server's session that outlives its transaction.

    Args:
        statement: With placeholders as asyncpg has them, `$1`.
        parameters: A sequence, or a list with a sequence for each execution; they may say that `set_config` is local.
    """
    found = _look(statement[:_LONGEST])
    if isinstance(found, bool):
        return found
    rows: list[Any] = parameters if isinstance(parameters, list) else [parameters]
    return not all(_are_true(row, found) for row in rows)


@lru_cache(maxsize=1024)
def _look(statement: str) -> bool | tuple[int, ...]:
    """Return whether the text leaves a state, or the places of the parameters that have to be true if it does not."""
    if _LEAVES_STATE.search(statement) is not None:
        return True
    calls: list[str] = _ARGUMENTS.findall(statement)
    local = [arguments.rpartition(",")[2].strip().lower() for arguments in calls]
    places = [_PARAMETER.fullmatch(argument) for argument in local if argument != "true"]
    if len(calls) < len(_SET_CONFIG.findall(statement)) or None in places:
        return True
    return tuple(int(place[1]) - 1 for place in places if place is not None) or False


def _are_true(row: Sequence[Any], places: tuple[int, ...]) -> bool:
    return all(place < len(row) and row[place] is True for place in places)
