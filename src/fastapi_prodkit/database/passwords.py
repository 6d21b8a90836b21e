"""Passwords that change while the service runs: each new connection asks for the one that holds now.

With a password in DATABASE_URL a rotation is an outage until the next deployment. A provider is asked for every new
connection instead; the connections that are open already stay.
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

# Asked for each connection; it may be a coroutine function, or not.
PasswordProvider = Callable[[], str | Awaitable[str]]

_SECRET_FRESH = 60.0  # seconds; one that the server refuses is read anew at once
_TOKEN_FRESH = 600.0  # seconds; a token is good for 900 (Amazon RDS user guide, IAM database authentication)

_PAUSE = 1.0  # seconds between two questions of refused connections: a wrong password must not flood the store

_logger = logging.getLogger("fastapi_prodkit.database")


def password_provider(url: URL, settings: DatabaseSettings) -> PasswordProvider | None:
    """Return what the settings ask for; None leaves the password to the URL.

    Raises:
        ConfigurationError: A token is asked for, and the URL names no user or not one host; or both sources are named.
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
    """Return what the provider says.

    Raises:
        ConnectionError: It failed: without a password there is no connection, as without a server.
    """
    try:
        answer = provider()
        return await answer if inspect.isawaitable(answer) else answer
    except Exception as error:  # whatever a store or its client raises; the cause is chained
        raise ConnectionError(f"the password could not be read: {type(error).__name__}") from error


def rds_token(host: str, port: int, user: str) -> "CachedPassword":
    """Return a provider of tokens for IAM database authentication, in place of a password.

    Needs the permission `rds-db:connect`. Region and credentials are boto3's own. RDS takes a token over TLS only.

    Raises:
        MissingExtraError: boto3 is not installed.
    """
    connect = _aws("rds")

    def sign() -> str:
        return str(connect().generate_db_auth_token(DBHostname=host, Port=port, DBUsername=user))

    return CachedPassword(sign, _TOKEN_FRESH)


def secret_password(secret_id: str) -> "CachedPassword":
    """Return a provider that reads an AWS Secrets Manager secret: `password` of a JSON object, or its whole text.

    Needs the permission `secretsmanager:GetSecretValue`. That is the form of the secrets that RDS manages and rotates.

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
    """Ask in a thread, once for all who want to know at a time; an answer holds for a while.

    Where the asking fails the last answer is given once more: it may still be right, and nothing else could be.
    """

    def __init__(self, ask: Callable[[], str], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._answer: str | None = None
        self._asked = 0.0
        self._asking: Future[str] | None = None
        # Of its own: a store that hangs must not take the threads that synchronous handlers run in.
        self._thread = ThreadPoolExecutor(1, "database-password")

    async def __call__(self) -> str:
        """Return the password."""
        if self._answer is None or time.monotonic() >= self._asked + self._seconds:
            return await self._fresh()
        return self._answer

    async def refresh_if(self, refused: str) -> str:
        """Return another password, because the server has refused this one; the same one if there is no other."""
        if self._answer == refused and time.monotonic() >= self._asked + _PAUSE:
            return await self._fresh()
        return self._answer or refused

    async def _fresh(self) -> str:
        asking = self._asking
        if asking is None:
            self._asked = time.monotonic()
            asking = self._asking = self._thread.submit(self._ask)
        try:
            # Who waits may be cancelled, and often is, by the pool's time-out; the others go on waiting.
            self._answer = await asyncio.shield(asyncio.wrap_future(asking))
        except Exception as error:
            if self._answer is None:
                raise
            _logger.warning("the password could not be read anew (%s); trying the last one", type(error).__name__)
        finally:
            if asking.done() and self._asking is asking:
                self._asking = None
        return self._answer


def _aws(service: str) -> Callable[[], Any]:
    """Return what makes a client that does not wait long; made in the thread, for it reads files and the network."""
    boto3 = _extras.require("boto3", extra="aws")
    config = _extras.require("botocore.config", extra="aws").Config(
        connect_timeout=2, read_timeout=2, retries={"mode": "standard", "total_max_attempts": 2}
    )
    return lambda: boto3.session.Session().client(service, config=config)
