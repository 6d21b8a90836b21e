"""Give every request an id, which is in its response, its log lines and its error body.

A valid id that the client sends is kept, so that one id follows a request through several services; anything else
is replaced, because a value that is sent back must not contain line breaks or markup. The app can read the id from the
header of the request, too.

    app.add_middleware(RequestIDMiddleware, generator=lambda: str(uuid4()), validator=is_uuid)
"""

import logging
import os
import re
from collections.abc import Callable
from functools import partial
from inspect import iscoroutinefunction
from itertools import chain, repeat
from typing import TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit import _context
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import RequestIdSettings

__all__ = ["RequestIDMiddleware", "current_request_id"]

_is_valid = re.compile(rb"[A-Za-z0-9._-]{8,128}").fullmatch
_is_safe = re.compile(rb"[!-~]{1,128}").fullmatch  # also with a validator: visible ASCII, without line breaks

_logger = logging.getLogger("fastapi_prodkit.request_id")


def current_request_id() -> str | None:
    """Return the id of the current request, or None outside of a request.

    For example, for a call to another service: `headers={"X-Request-ID": current_request_id() or ""}`.
    """
    return _context.request_id()


class RequestIDKeywords(TypedDict, total=False):
    """Fields of `RequestIdSettings`."""

    header: str
    trust_inbound: bool


class RequestIDMiddleware(Layer):
    """Give each request an id, put it into its context, and send it with the response.

        app.add_middleware(RequestIDMiddleware, header="X-Correlation-ID")

    New ids are 32 hexadecimal digits from the system's random source. A header of that name that the app sets is
    replaced. If another RequestIDMiddleware is further out, this one sends the same id in its own header.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.
        generator: Returns a new id: 1 to 128 visible ASCII characters. Where it raises or returns anything else, the
            request has an id as without a generator, and an error is logged.
        validator: Says whether an inbound id is kept, in place of the pattern. It is asked about 1 to 128 visible ASCII
            characters; any other id is replaced. Where it raises, the id is replaced, and an error is logged.

    Keyword Args:
        header: Header that carries the id. Default: X-Request-ID.
        trust_inbound: Keep an id that the client sent, if it matches `[A-Za-z0-9._-]{8,128}`. Default: True.

    Raises:
        ConfigurationError: A keyword does not exist, or its value cannot be used; or the generator or validator is
            async or not a function.
    """

    scope_types = frozenset({"http", "websocket"})
    may_answer = False

    def __init__(
        self,
        app: ASGIApp,
        settings: RequestIdSettings | None = None,
        *,
        generator: Callable[[], str] | None = None,
        validator: Callable[[str], bool] | None = None,
        **keywords: Unpack[RequestIDKeywords],
    ) -> None:
        accepted = RequestIDKeywords.__optional_keys__
        settings = with_keywords(self, settings or RequestIdSettings(), keywords, accepted)
        functions: dict[str, object] = {"generator": generator, "validator": validator}
        for name, function in functions.items():
            if function is not None and (not callable(function) or iscoroutinefunction(function)):
                raise ConfigurationError(f"RequestIDMiddleware({name}=...): use a function that is not async")
        self.app = app
        self._header = settings.header.lower().encode()
        self._trust_inbound = settings.trust_inbound
        # One call of urandom returns 256 ids: an id then costs 0.2 us instead of the 2 us of a system call. The first
        # request makes the first call, so processes that fork before serving do not share ids.
        draw: Callable[[], bytes] = chain.from_iterable(map(_draw_ids, repeat(256))).__next__
        self._new_id = draw if generator is None else partial(_generate, generator, draw)
        self._accepts: Callable[[bytes], object] = _is_valid if validator is None else partial(_validate, validator)

    def on_request(self, exchange: Exchange) -> None:
        """Choose the id of the request."""
        name, context = self._header, exchange.context
        sent = exchange.headers.get(name)
        chosen = sent if self._trust_inbound and sent is not None and self._accepts(sent) else None
        if "request_id" in context:  # an outer app has chosen the id
            outer = str(context["request_id"]).encode()
            chosen = outer if _is_safe(outer) else None
        if chosen is None:
            chosen = self._new_id()
        context["request_id"] = chosen.decode()
        exchange.response_headers[name] = chosen
        if chosen != sent or exchange.has_repeated_headers:
            exchange.set_request_header(name, chosen)


def _draw_ids(count: int) -> list[bytes]:
    digits = os.urandom(16 * count).hex().encode()
    return [digits[start : start + 32] for start in range(0, 32 * count, 32)]


def _generate(generator: Callable[[], str], draw: Callable[[], bytes]) -> bytes:
    try:
        request_id = generator().encode()
    except Exception:  # whatever it raises, the request is served
        _logger.exception("the generator of request ids has failed, so this request has another id")
        return draw()
    if _is_safe(request_id):
        return request_id
    _logger.error("the generator of request ids has returned %.200r: use 1 to 128 visible ASCII characters", request_id)
    return draw()


def _validate(validator: Callable[[str], bool], sent: bytes) -> bool:
    try:
        return _is_safe(sent) is not None and validator(sent.decode())
    except Exception:  # whatever it raises, the request is served
        _logger.exception("the validator of request ids has failed, so this request has a new id")
        return False
