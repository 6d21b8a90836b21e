"""Cursor pagination: a page ends with an opaque cursor, from which the next page starts.

Unlike an offset, a cursor costs the same on every page, and rows that come or go in between are neither shown twice
nor skipped.
"""

import base64
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import Request, Response

Row = TypeVar("Row")


def encode_cursor(key: str | int) -> str:
    """Return the cursor for the rows after the one with this key."""
    return base64.urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def decode_cursor(cursor: str, *, pattern: str) -> str:
    """Return the key in a cursor.

    Raises:
        ValueError: It is not a cursor, or its key does not match `pattern`: it belongs to another list.
    """
    try:
        key = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except ValueError:
        key = ""
    if not re.fullmatch(pattern, key):
        raise ValueError("not a cursor of this list; start again without one")
    return key


def cut(rows: Sequence[Row], limit: int, key: Callable[[Row], str | int]) -> tuple[Sequence[Row], str | None]:
    """Return the page and the cursor of the next one, from rows that were queried with a limit of one more."""
    page = rows[:limit]
    return page, encode_cursor(key(page[-1])) if len(rows) > limit else None


def link_next(request: Request, response: Response, cursor: str | None) -> None:
    """Add the Link header (RFC 8288) to the next page, relative to the current one."""
    if cursor is not None:
        query = request.url.include_query_params(cursor=cursor).query
        response.headers["Link"] = f'<?{query}>; rel="next"'
