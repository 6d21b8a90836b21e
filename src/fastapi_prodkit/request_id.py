"""Every request has an id: in its response, its log lines and its error body.

A valid id that the client sends is kept, so that one id follows a request through several services; anything else
is replaced, because a reflected value may not carry line breaks or markup.
"""

import os
import re
from itertools import chain, repeat
from typing import TypedDict, Unpack

from starlette.types import ASGIApp

from fastapi_prodkit import _context
from fastapi_prodkit._keywords import with_keywords
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.sections import RequestIdSettings

__all__ = ["RequestIDMiddleware", "current_request_id"]

_is_valid = re.compile(rb"[A-Za-z0-9._-]{8,128}").fullmatch


def current_request_id() -> str | None:
    """Return the id of the request that is being served, or None outside of any."""
    return _context.request_id()


class RequestIDKeywords(TypedDict, total=False):
    """Fields of `RequestIdSettings`."""

    header: str
    trust_inbound: bool


class RequestIDMiddleware(Layer):
    """Give each request an id, put it into its context, and send it with the response.

        app.add_middleware(RequestIDMiddleware, header="X-Correlation-ID")

    New ids are 32 hexadecimal digits from the system's random source. A header of that name that the app sets is
    replaced.

    Args:
        app: The app to serve.
        settings: Values of the keywords that are not given.

    Keyword Args:
        header: Header that carries the id. Default: X-Request-ID.
        trust_inbound: Keep an id that the client sent, if it matches `[A-Za-z0-9._-]{8,128}`. Default: True.
    """

    scope_types = frozenset({"http", "websocket"})
    may_answer = False

    def __init__(
        self, app: ASGIApp, settings: RequestIdSettings | None = None, **keywords: Unpack[RequestIDKeywords]
    ) -> None:
        accepted = RequestIDKeywords.__optional_keys__
        settings = with_keywords(self, settings or RequestIdSettings(), keywords, accepted)
        self.app = app
        self._header = settings.header.lower().encode()
        self._trust_inbound = settings.trust_inbound
        # A pool of urandom: an id then costs 0.2 us instead of the 2 us of a system call. It is first filled by the
        # first request, so processes that fork before serving do not share it.
        self._new_id = chain.from_iterable(map(_draw_ids, repeat(256))).__next__

    def on_request(self, exchange: Exchange) -> None:
        """Choose the id of the request."""
        name = self._header
        raw = exchange.headers.get(name) if self._trust_inbound else None
        if "request_id" in exchange.context:  # an app around this one has chosen
            raw = str(exchange.context["request_id"]).encode()
        if raw is None or not _is_valid(raw):
            request_id = self._new_id()
            raw = request_id.encode()
        else:
            request_id = raw.decode()
        exchange.context["request_id"] = request_id
        exchange.response_headers[name] = raw


def _draw_ids(count: int) -> list[str]:
    digits = os.urandom(16 * count).hex()
    return [digits[start : start + 32] for start in range(0, 32 * count, 32)]
