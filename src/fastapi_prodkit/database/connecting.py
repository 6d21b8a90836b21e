"""Open connections to PostgreSQL: choose one of several hosts, and obtain the password.

asyncpg has one time-out for all hosts together, so a silent first host uses up the time of the second. It also cannot
read a password again after the password has changed.
"""

import logging
from typing import Any

import asyncpg  # type: ignore[import-untyped]  # it has no annotations for us

from fastapi_prodkit.database.passwords import CachedPassword, PasswordProvider, get_password

__all__ = ["CHECK_INTERVAL", "Connector"]

CHECK_INTERVAL = "client_connection_check_interval"

# Errors after which the next host is tried: down, silent, starting up or not of the wanted kind. Not a wrong password.
_NEXT_HOST = (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched)

_logger = logging.getLogger("fastapi_prodkit.database")


class Connector:
    """Open connections; pass it to SQLAlchemy's asyncpg dialect as `async_creator_fn`.

    Args:
        password: Provider that is called for each connection. If the server refuses a cached password, it is read again
            once.
    """

    def __init__(self, password: PasswordProvider | None) -> None:
        self._password = password
        self._host = 0  # index of the host that was reached last; it is tried first

    async def __call__(self, **options: Any) -> asyncpg.Connection:
        """Return a connection; the options are those of `asyncpg.connect`."""
        if self._password is None:
            return await self._connect(options)
        password = await get_password(self._password)
        try:
            return await self._connect({**options, "password": password})
        except asyncpg.InvalidAuthorizationSpecificationError:
            if not isinstance(self._password, CachedPassword):
                raise
            renewed = await self._password.refresh_if(password)
            if renewed == password:
                raise
        return await self._connect({**options, "password": renewed})

    async def _connect(self, options: dict[str, Any]) -> asyncpg.Connection:
        hosts = options.get("host")
        if not isinstance(hosts, list):
            return await _open(options)
        wanted = options.get("target_session_attrs", "any")
        passes = ("standby", "any") if wanted == "prefer-standby" else (wanted,)
        failure: Exception = OSError("there is no host")
        for attribute, turn in [(attribute, turn) for attribute in passes for turn in range(len(hosts))]:
            index = (self._host + turn) % len(hosts)
            place = {"host": hosts[index], "port": options["port"][index], "target_session_attrs": attribute}
            try:
                connection = await _open({**options, **place, "timeout": options["timeout"] / len(hosts)})
            except _NEXT_HOST as error:
                failure = error
            else:
                self._host = index
                return connection
        raise failure


async def _open(options: dict[str, Any]) -> asyncpg.Connection:
    settings = options["server_settings"]
    try:
        return await asyncpg.connect(**options)
    except (asyncpg.UndefinedObjectError, asyncpg.InvalidParameterValueError) as error:
        # Removed for all later connections: the engine passes the same dict each time.
        if CHECK_INTERVAL not in str(error) or settings.pop(CHECK_INTERVAL, None) is None:
            raise
        _logger.warning("the server has no %s: queries of disconnected clients continue", CHECK_INTERVAL)
    return await asyncpg.connect(**options)
