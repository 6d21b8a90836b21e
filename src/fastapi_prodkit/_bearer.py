"""Tokens for endpoints of operators: one token from the settings, few wrong tokens per client.

Programs send it as a bearer token (RFC 6750). Browsers ask for it as the password of HTTP Basic (RFC 7617).
"""

import base64
import hmac
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import SecretStr
from starlette.requests import HTTPConnection

from fastapi_prodkit import _context, _counting
from fastapi_prodkit._asgi import route_template
from fastapi_prodkit._context import Reason
from fastapi_prodkit._counting import client_key
from fastapi_prodkit._instruments import instrument
from fastapi_prodkit.exceptions import ProblemError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["BasicPassword", "BearerToken", "WrongTokens", "too_many_wrong_tokens"]

_MAX_WRONG_TOKENS: Final = 10  # wrong tokens of one client in a minute
_MINUTE: Final = 60.0  # seconds
_MAX_CLIENTS: Final = 10_000  # clients whose wrong tokens are counted; they take about 2 MB

_logger = logging.getLogger("fastapi_prodkit.tokens")


class _OperatorToken(ABC):
    """Check the token of requests; log, count and limit wrong tokens.

    A client, identified by address as in rate limits, may send ten wrong tokens a minute to each process. After that
    all its tokens are refused until the minute is over, even the right one.

    Args:
        token: From the settings.
        registry: Where the metric is shown; prometheus_client's default registry unless given.
        clock: Seconds, monotonic.
    """

    _scheme: ClassVar[str]  # in lower case
    _challenge: ClassVar[str]  # without a token
    _refusal: ClassVar[str]  # with a wrong one

    def __init__(
        self,
        token: SecretStr,
        *,
        registry: "CollectorRegistry | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token = token.get_secret_value().encode()
        self._registry = registry
        self._wrong_tokens = WrongTokens(clock)

    def is_sent(self, connection: HTTPConnection) -> bool:
        """Return whether a request has the token, for endpoints that answer without it too."""
        return self._refusal_of(connection) is None

    def authorize(self, connection: HTTPConnection) -> None:
        """Refuse a request that does not carry the token.

        Raises:
            ProblemError: 401 without the token (RFC 6750 section 3); 429 after too many wrong tokens.
        """
        refusal = self._refusal_of(connection)
        if refusal is None:
            return
        problem, reason = refusal
        if reason is not None:
            _context.refuse(reason)
        raise problem

    def _refusal_of(self, connection: HTTPConnection) -> tuple[ProblemError, Reason | None] | None:
        """Return the problem of a request without the token, and the reason if it has a wrong one; count wrong ones."""
        authorization = connection.headers.get("authorization")
        if authorization is None:
            return ProblemError(401, headers={"WWW-Authenticate": self._challenge}), None
        client = client_key(connection.scope)
        wait = self._wrong_tokens.seconds_to_wait(client)
        if not wait and self._is_right(authorization):
            return None
        route = route_template(connection.scope, connection.scope.get("root_path", ""))
        self._count_refusal(route)
        if wait:
            return too_many_wrong_tokens(wait)
        self._wrong_tokens.add(client)
        _logger.warning("%s: a request of %s had a wrong token", route, client)
        problem = ProblemError(401, headers={"WWW-Authenticate": self._refusal})
        return problem, Reason("unauthenticated", "the token is wrong")

    def _is_right(self, authorization: str) -> bool:
        scheme, _, sent = authorization.partition(" ")
        # Starlette decodes headers as Latin-1; encoding restores the bytes that were sent.
        same = hmac.compare_digest(self._token_in(sent.encode("latin-1").strip()), self._token)
        return scheme.lower() == self._scheme and same

    @abstractmethod
    def _token_in(self, sent: bytes) -> bytes:
        """Return the token in what was sent behind the name of the scheme; empty if there is none."""

    def _count_refusal(self, route: str) -> None:
        import prometheus_client  # noqa: PLC0415 - on first use

        counter = instrument(
            prometheus_client.Counter,
            "http_server_refused_tokens_total",
            "Requests whose token was wrong, or was not checked after too many wrong ones.",
            ["http_route"],
            registry=self._registry,
        )
        counter.labels(route).inc()


class BearerToken(_OperatorToken):
    """Check bearer tokens: `Authorization: Bearer <token>`."""

    _scheme = "bearer"
    _challenge = "Bearer"
    _refusal = 'Bearer error="invalid_token"'

    def _token_in(self, sent: bytes) -> bytes:
        return sent


class BasicPassword(_OperatorToken):
    """Check passwords, of any user: `Authorization: Basic <user:token in base64>`. Browsers ask for them."""

    _scheme = "basic"
    _challenge = _refusal = 'Basic realm="docs", charset="UTF-8"'

    def _token_in(self, sent: bytes) -> bytes:
        try:
            return base64.b64decode(sent, validate=True).partition(b":")[2]
        except ValueError:
            return b""


class WrongTokens:
    """Count wrong tokens by client; the minute ends for all clients at once.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._end = -math.inf
        _counting.register(self)

    def clear(self) -> None:
        """Forget every wrong token."""
        self._counts.clear()

    def seconds_to_wait(self, client: str) -> int:
        """Return for how many seconds all tokens of a client are refused; 0 if its next token is checked."""
        now = self._clock()
        if now >= self._end or len(self._counts) > _MAX_CLIENTS:
            self._counts.clear()
            self._end = now + _MINUTE
        return math.ceil(self._end - now) if self._counts[client] >= _MAX_WRONG_TOKENS else 0

    def add(self, client: str) -> None:
        """Count a wrong token of a client."""
        self._counts[client] += 1


def too_many_wrong_tokens(wait: int) -> tuple[ProblemError, Reason]:
    """Return the problem of a client that has to wait so many seconds until its next token is checked."""
    problem = ProblemError(429, "Too many wrong tokens; try again later.", headers={"Retry-After": str(wait)})
    return problem, Reason("rate_limited", f"{_MAX_WRONG_TOKENS} wrong tokens of this client in a minute")
