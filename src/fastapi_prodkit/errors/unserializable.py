"""Find input in a request that Python accepts and JSON cannot express: NaN, lone surrogates, deep nesting.

Such input may be in JSON, forms, queries and headers. A response that repeats it cannot be rendered.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from starlette.requests import Request

__all__ = ["unserializable_input"]

_DEEPEST: Final = 100  # levels of nesting; pydantic can write 255, json about 900
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class _Defect(NamedTuple):
    symptom: re.Pattern[str]  # in the text of the exception that rendering raises
    type: str
    msg: str
    found_in: Callable[[Any, int], bool]


async def unserializable_input(request: Request, error: Exception) -> list[dict[str, Any]]:
    """Return the places in the request with the input that has caused the error, in the form of pydantic's errors.

    Empty if the error has another cause. Parts of the request that the app has not read are not read here, either.
    """
    text = str(error)
    defect = next((defect for defect in _DEFECTS if defect.symptom.search(text)), None)
    if defect is None:
        return []
    return [
        {"loc": loc, "msg": defect.msg, "type": defect.type}
        for loc, value in await _parts(request)
        if any(defect.found_in(each, depth) for each, depth in _walk(value))
    ]


async def _parts(request: Request) -> list[tuple[tuple[str, ...], Any]]:
    """Return the parts of a request that the app has read; an unread body might not arrive."""
    form = getattr(request, "_form", None)  # Starlette keeps the parsed form here; there is no public attribute
    sources: dict[str, Iterable[tuple[str, Any]]] = {
        "path": request.path_params.items(),
        "query": request.query_params.multi_items(),
        "header": request.headers.items(),
        "cookie": request.cookies.items(),
        "body": [(name, getattr(value, "filename", value)) for name, value in form.multi_items()] if form else [],
    }
    parts: list[tuple[tuple[str, ...], Any]] = [
        ((source, name), [name, value]) for source, items in sources.items() for name, value in items
    ]
    if hasattr(request, "_body"):  # Starlette keeps the body here; there is no public attribute
        with suppress(ValueError, RecursionError):  # the body is not JSON, or was not parsed as JSON
            parts.append((("body",), await request.json()))
    return parts


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield every value and key with its depth; without recursion, because deep nesting would exceed its limit."""
    ahead = [(value, 0)]
    while ahead:
        value, depth = ahead.pop()
        yield value, depth
        if isinstance(value, Mapping):
            value = [*value, *value.values()]
        if isinstance(value, list):
            ahead += [(each, depth + 1) for each in value]


def _is_infinite(value: Any, _depth: int) -> bool:
    """Return whether the value is a number that is not finite, or a text that pydantic reads as such a number."""
    try:
        return isinstance(value, str | float) and not math.isfinite(float(value))
    except ValueError:  # a text that is no number
        return False


def _has_surrogate(value: Any, _depth: int) -> bool:
    return isinstance(value, str) and _SURROGATE.search(value) is not None


def _is_deep(_value: Any, depth: int) -> bool:
    return depth > _DEEPEST


_DEFECTS: Final = (
    _Defect(re.compile("Out of range float"), "finite_number", "Input should be a finite number", _is_infinite),
    _Defect(
        re.compile("surrogates not allowed"), "string_unicode", "Input should not have lone surrogates", _has_surrogate
    ),
    _Defect(
        re.compile("depth exceeded|Stack overflow"),
        "nesting",
        f"Input should have at most {_DEEPEST} levels of nesting",
        _is_deep,
    ),
)
