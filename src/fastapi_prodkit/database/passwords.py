"""Passwords that change while the service runs: each new connection asks for the one that holds now.

With a password in DATABASE_URL a rotation is an outage until the next deployment. A provider is asked for every new
connection instead; the connections that are open already stay.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import URL

from fastapi_prodkit import _extras
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import DatabaseSettings

__all__ = ["PasswordProvider", "password_provider", "rds_token", "secret_password"]

# asyncpg asks it for each connection; it may be a coroutine function, or not.
PasswordProvider = Callable[[], str | Awaitable[str]]

_SECRET_FRESH = 5.0  # seconds: several connections that open together ask once; a rotation is noticed soon
_TOKEN_FRESH = 600.0  # seconds; a token is good for 900 (Amazon RDS user guide, IAM database authentication)

_logger = logging.getLogger("fastapi_prodkit.database")


def password_provider(url: URL, settings: DatabaseSettings) -> PasswordProvider | None:
    """Return what the settings ask for; None leaves the password to the URL.

    Raises:
        ConfigurationError: A token is asked for, and the URL names no host or no user.
        MissingExtraError: boto3 is not installed.
    """
    if settings.iam_auth:
        if not (url.host and url.username):
            raise ConfigurationError("DATABASE_IAM_AUTH needs a user and a host: postgresql://user@host:5432/name")
        return rds_token(url.host, url.port or 5432, url.username)
    if settings.password_secret is not None:
        return secret_password(settings.password_secret)
    return None


def rds_token(host: str, port: int, user: str) -> PasswordProvider:
    """Return a provider of tokens for IAM database authentication, in place of a password.

    Needs the permission `rds-db:connect`. Region and credentials are boto3's own. RDS takes a token over TLS only.

    Raises:
        MissingExtraError: boto3 is not installed.
    """
    boto3 = _extras.require("boto3", extra="aws")

    def sign() -> str:
        return str(boto3.client("rds").generate_db_auth_token(DBHostname=host, Port=port, DBUsername=user))

    return _Remembered(sign, _TOKEN_FRESH)


def secret_password(secret_id: str) -> PasswordProvider:
    """Return a provider that reads an AWS Secrets Manager secret: `password` of a JSON object, or its whole text.

    Needs the permission `secretsmanager:GetSecretValue`. That is the form of the secrets that RDS manages and rotates.

    Raises:
        MissingExtraError: boto3 is not installed.
    """
    boto3 = _extras.require("boto3", extra="aws")

    def read() -> str:
        text = str(boto3.client("secretsmanager").get_secret_value(SecretId=secret_id)["SecretString"])
        try:
            value: Any = json.loads(text)
        except ValueError:
            return text
        return str(value["password"]) if isinstance(value, dict) and "password" in value else text

    return _Remembered(read, _SECRET_FRESH)


class _Remembered:
    """Ask in a thread, once for all who want to know at a time; an answer holds for a while.

    Where the asking fails the last answer is given once more: it may still be right, and nothing else could be.
    """

    def __init__(self, ask: Callable[[], str], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._answer: str | None = None
        self._until = 0.0
        self._locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}

    async def __call__(self) -> str:
        lock = self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:
            if self._answer is None or time.monotonic() >= self._until:
                self._answer = await self._fresh()
                self._until = time.monotonic() + self._seconds
            return self._answer

    async def _fresh(self) -> str:
        try:
            return await asyncio.to_thread(self._ask)
        except Exception as error:
            if self._answer is None:
                raise
            _logger.warning("the password could not be read anew (%s); trying the last one", type(error).__name__)
            return self._answer
