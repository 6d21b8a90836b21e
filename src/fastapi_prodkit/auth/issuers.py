"""The keys of an OpenID issuer, fetched in the background.

    first token   -> no keys yet: wait for the fetch, at most five seconds
    known key     -> no wait; a refresh that is due starts in the background
    unknown key   -> wait for a fetch, unless the last one was started less than a minute ago

One fetch runs at a time, and all tokens that need it wait for the same one. After a failure, keys that are known go on
serving for a day after their lifetime, and a fetch is tried once a minute. While there are no keys, it is tried after
1, 2, 4, ... 60 seconds.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Final, Protocol

from fastapi_prodkit.auth.fetching import Document, FetchError
from fastapi_prodkit.auth.jose import Token
from fastapi_prodkit.auth.keys import Key, KeySet, read_keys
from fastapi_prodkit.auth.refusal import Refused

__all__ = ["IssuerKeys", "NoKeysError"]

_MINUTE: Final = 60.0  # seconds
_LIFETIME: Final = 3600.0  # seconds for which keys are fresh, unless the issuer says otherwise
_SHORTEST_LIFETIME: Final = 300.0  # seconds
_LONGEST_LIFETIME: Final = 86_400.0  # seconds
_STALE: Final = 86_400.0  # seconds for which keys serve after their lifetime, if no newer ones can be fetched
_AHEAD: Final = 0.8  # part of the lifetime after which keys are refreshed

_logger = logging.getLogger("fastapi_prodkit.auth")


class NoKeysError(Exception):
    """No token of an issuer can be verified, because its keys cannot be fetched.

    Attributes:
        text: What is wrong, for the log.
        retry_after: When the next fetch is tried, seconds from now.
    """

    def __init__(self, text: str, retry_after: int) -> None:
        super().__init__(text)
        self.text = text
        self.retry_after = retry_after


class Source(Protocol):
    """What fetches the key set; a `Fetcher`."""

    async def key_set(self) -> Document:
        """Fetch the key set, or raise a FetchError."""
        ...


class IssuerKeys:
    """The keys of one issuer. No method blocks the event loop.

    Args:
        name: URL of the issuer.
        source: What fetches the key set.
        algorithms: Those that are accepted.
        clock: Seconds, monotonic.
        sleep: Waits that many seconds.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        algorithms: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self._source = source
        self._algorithms = tuple(algorithms)
        self._clock = clock
        self._sleep = sleep
        self._keys: KeySet = {}
        self._due_at = clock()  # when the next fetch is tried
        self._fresh_until = -math.inf
        self._started_at = -math.inf  # when the last fetch was started
        self._failures = 0
        self._error = "its keys have not been fetched yet"
        self._fetching: asyncio.Task[None] | None = None

    async def key_of(self, token: Token) -> Key:
        """Return the key with which a token says that it was signed.

        Raises:
            Refused: The issuer has no such key, or the algorithm is not accepted.
            NoKeysError: The issuer has never been reached, or not for a day.
        """
        if token.algorithm not in self._algorithms:
            raise Refused("algorithm", "the token's alg is not in AUTH_ALGORITHMS")
        if token.key_id is None:
            raise Refused("malformed", "the token has no kid")
        place = token.key_id, token.algorithm
        if self._clock() >= self._due_at:
            fetching = self._fetch()
            if not self._keys:
                await asyncio.wait([fetching])
        if self._keys and place not in self._keys and self._may_ask():
            await asyncio.wait([self._fetch()])
        if not self._keys:
            wait = max(1, math.ceil(self._due_at - self._clock()))
            raise NoKeysError(f"no token can be verified: {self._error}", wait)
        if place not in self._keys:
            raise Refused("unknown_key", "the token's kid is not a key of its issuer for this alg")
        return self._keys[place]

    async def keep_fresh(self) -> None:
        """Fetch the keys now, and again whenever that is due; never returns."""
        while True:
            if self._clock() >= self._due_at:
                await asyncio.wait([self._fetch()])
            await self._sleep(max(0.0, self._due_at - self._clock()))

    async def close(self) -> None:
        """Cancel a fetch that is running."""
        if self._is_fetching():
            fetching = self._fetch()
            fetching.cancel()
            await asyncio.wait([fetching])

    def warning(self) -> str | None:
        """Return what is wrong if there are no fresh keys; None if there are."""
        if not self._keys:
            return f"{self.name}: no token can be verified: {self._error}"
        if self._clock() >= self._fresh_until:
            minutes = (self._clock() - self._fresh_until) / _MINUTE
            return f"{self.name}: its keys expired {minutes:.0f} minutes ago: {self._error}"
        return None

    def _may_ask(self) -> bool:
        """Return whether a token of an unknown key may start a fetch, or wait for the one that is running."""
        return self._is_fetching() or self._clock() >= self._started_at + _MINUTE

    def _is_fetching(self) -> bool:
        task = self._fetching
        return task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop()

    def _fetch(self) -> asyncio.Task[None]:
        """Return the fetch that is running, or start one."""
        if self._fetching is None or not self._is_fetching():
            self._started_at = self._clock()
            self._fetching = asyncio.create_task(self._refresh(), context=Context())  # of no request
        return self._fetching

    async def _refresh(self) -> None:
        try:
            document = await self._source.key_set()
            keys = read_keys(document.content, self._algorithms, self.name, self._keys)
            if not keys:
                raise FetchError(f"{self.name} has no key for an algorithm of AUTH_ALGORITHMS")
        except (FetchError, ValueError) as error:
            self._keep_stale(str(error))
        except Exception as error:  # the keys that are known go on serving, whatever is wrong with the issuer
            _logger.exception("the keys of %s cannot be fetched", self.name)
            self._keep_stale(type(error).__name__)
        else:
            self._use(keys, document.max_age)

    def _use(self, keys: KeySet, max_age: float | None) -> None:
        if self._failures:
            _logger.info("the keys of %s are fetched again", self.name)
        lifetime = min(max(_LIFETIME if max_age is None else max_age, _SHORTEST_LIFETIME), _LONGEST_LIFETIME)
        now = self._clock()
        self._due_at, self._fresh_until = now + _AHEAD * lifetime, now + lifetime
        self._failures = 0
        self._replace(keys)

    def _keep_stale(self, error: str) -> None:
        if not self._failures or error != self._error:
            _logger.warning("the keys of %s cannot be fetched: %s", self.name, error)
        self._error = error
        self._failures += 1
        now = self._clock()
        if now >= self._fresh_until + _STALE:
            self._replace({})
        delay = _MINUTE if self._keys else min(_MINUTE, 2.0 ** min(self._failures - 1, 6))
        self._due_at = now + delay

    def _replace(self, keys: KeySet) -> None:
        for place, key in self._keys.items():
            key.withdrawn = keys.get(place) is not key
        self._keys = keys
