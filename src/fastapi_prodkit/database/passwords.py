"""Read passwords that change while the service runs: each new connection uses the current one.

With a password in DATABASE_URL, a rotation causes an outage until the next deployment. A provider is called for every
new connection instead; open connections stay.
"""

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sqlalchemy import URL

from fastapi_prodkit import _extras
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["CachedPassword", "PasswordProvider", "get_password", "password_provider", "rds_token", "secret_password"]

# Called for each connection; a function or a coroutine function.
PasswordProvider = Callable[[], str | Awaitable[str]]

_SECRET_FRESH = 60.0  # seconds; if the server refuses a password, it is read again at once
_TOKEN_FRESH = 600.0  # seconds; a token is valid for 900 (Amazon RDS user guide, IAM database authentication)

_PAUSE = 1.0  # seconds between two reads after refused connections, so that a wrong password does not flood the store

_logger = logging.getLogger("fastapi_prodkit.database")


def password_provider(url: URL, settings: DatabaseSettings) -> PasswordProvider | None:
    """Return the password provider that the settings choose; None if the password is in the URL.

    Raises:
        ConfigurationError: A token is configured, but the URL lacks a user or a single host; or both sources are set.
        MissingExtraError: boto3 is not installed.
    """
    if settings.iam_auth:
        if settings.password_secret is not None:
            raise ConfigurationError("DATABASE_IAM_AUTH and DATABASE_PASSWORD_SECRET exclude each other: set one")
        if not (url.host and url.username):
            raise ConfigurationError("DATABASE_IAM_AUTH needs a user and a host: postgresql://user@host:5432/name")
        return rds_token(url.host, url.port or 5432, url.username)
    if settings.password_secret is not None:
        return secret_password(settings.password_secret)
    return None


async def get_password(provider: PasswordProvider) -> str:
    """Call the provider and return the password.

    Raises:
        ConnectionError: The provider failed. It is treated like an unreachable server.
    """
    try:
        answer = provider()
        return await answer if inspect.isawaitable(answer) else answer
    except Exception as error:  # any error of a store or its client; the cause is chained
        raise ConnectionError(f"the password could not be read: {type(error).__name__}") from error


def rds_token(host: str, port: int, user: str) -> "CachedPassword":
    """Return a provider of tokens for IAM database authentication, which replace a password.

    Needs the permission `rds-db:connect`. boto3 finds region and credentials. RDS accepts a token over TLS only.

    Raises:
        MissingExtraError: boto3 is not installed.
    """
    connect = _aws("rds")

    def sign() -> str:
        return str(connect().generate_db_auth_token(DBHostname=host, Port=port, DBUsername=user))

    return CachedPassword(sign, _TOKEN_FRESH)


def secret_password(secret_id: str) -> "CachedPassword":
    """Return a provider that reads a secret of AWS Secrets Manager: `password` of a JSON object, or the whole text.

    Needs the permission `secretsmanager:GetSecretValue`. Secrets that RDS manages and rotates are such JSON objects.

    Raises:
        MissingExtraError: boto3 is not installed.
    """
    connect = _aws("secretsmanager")

    def read() -> str:
        text = str(connect().get_secret_value(SecretId=secret_id)["SecretString"])
        try:
            value: Any = json.loads(text)
        except ValueError:
            return text
        return str(value["password"]) if isinstance(value, dict) and "password" in value else text

    return CachedPassword(read, _SECRET_FRESH)


class CachedPassword:
    """Cache the password of a function that blocks; the function runs in a thread, once for all concurrent callers.

    If the function fails, the last password is returned again: it may still be valid.
    """

    def __init__(self, read: Callable[[], str], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._password: str | None = None
        self._read_at = 0.0
        self._reading: Future[str] | None = None
        # A separate thread: a store that hangs must not block the threads of synchronous handlers.
        self._thread = ThreadPoolExecutor(1, "database-password")

    async def __call__(self) -> str:
        """Return the password."""
        if self._password is None or time.monotonic() >= self._read_at + self._seconds:
            return await self._fresh()
        return self._password

    async def refresh_if(self, refused: str) -> str:
        """Read the password again if the cached one is `refused`; return the newest, which may be the same."""
        if self._password == refused and time.monotonic() >= self._read_at + _PAUSE:
            return await self._fresh()
        return self._password or refused

    async def _fresh(self) -> str:
        reading = self._reading
        if reading is None:
            self._read_at = time.monotonic()
            reading = self._reading = self._thread.submit(self._read)
        try:
            # The pool's time-out often cancels one caller; the other callers must keep waiting.
            self._password = await asyncio.shield(asyncio.wrap_future(reading))
        except Exception as error:
            if self._password is None:
                raise
            _logger.warning("the password could not be read again (%s); trying the last one", type(error).__name__)
        finally:
            if reading.done() and self._reading is reading:
                self._reading = None
        return self._password


def _aws(service: str) -> Callable[[], Any]:
    """Return a function that makes a client with short time-outs; called in the thread, because it blocks."""
    boto3 = _extras.require("boto3", extra="aws")
    config = _extras.require("botocore.config", extra="aws").Config(
        connect_timeout=2, read_timeout=2, retries={"mode": "standard", "total_max_attempts": 2}
    )
    return lambda: boto3.session.Session().client(service, config=config)
