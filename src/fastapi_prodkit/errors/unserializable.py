"""What JSON cannot express, and Python reads from a request all the same: NaN, lone surrogates, deep nesting.

It comes in JSON, forms, queries and headers, and a response that repeats it cannot be rendered.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from starlette.requests import Request

__all__ = ["unserializable_input"]

_DEEPEST: Final = 100  # levels; pydantic writes 255 of them, json some 900
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class _Defect(NamedTuple):
    symptom: re.Pattern[str]  # in the text of the exception that rendering raises
    type: str
    msg: str
    found_in: Callable[[Any, int], bool]


async def unserializable_input(request: Request, error: Exception) -> list[dict[str, Any]]:
    """Return where the request carries what the error is about, as pydantic reports errors; nothing else is read of it.

    Empty if the error is another one, or the request has nothing to do with it.
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
    """Return the parts of a request that have been read: a body that has not been would have to be waited for."""
    form = getattr(request, "_form", None)  # Starlette keeps here what has been read, and has no other way to ask
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
    if hasattr(request, "_body"):  # likewise
        with suppress(ValueError, RecursionError):  # it is no JSON, or none that anybody has read
            parts.append((("body",), await request.json()))
    return parts


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Yield every value and key with its depth; without recursion, which is what deep nesting is about."""
    ahead = [(value, 0)]
    while ahead:
        value, depth = ahead.pop()
        yield value, depth
        if isinstance(value, Mapping):
            value = [*value, *value.values()]
        if isinstance(value, list):
            ahead += [(each, depth + 1) for each in value]


def _is_infinite(value: Any, _depth: int) -> bool:
    """Say whether it is a number that is not finite, or a text that pydantic reads as one."""
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
