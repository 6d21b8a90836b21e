"""Mask values that one part of a record masks wherever the record repeats them, such as in a traceback."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar, cast

from pydantic import SecretBytes, SecretStr, ValidationError

__all__ = ["MAX_VALUES", "inputs", "mask", "strings"]

Plain = TypeVar("Plain")

_SHORTEST: Final = 6  # characters; a shorter value may occur in a text by chance
MAX_VALUES: Final = 100  # values of one record
_DEPTH: Final = 8


def inputs(error: BaseException) -> Iterator[str]:
    """Yield the inputs of pydantic's validation errors in an error, its causes and exception groups.

    pydantic shows the input as `input_value=`, which is masked, but a validator may repeat the input in its message.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending and len(seen) < MAX_VALUES:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        pending += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions
        if isinstance(each, ValidationError):
            for details in each.errors(include_url=False, include_context=False)[:MAX_VALUES]:
                yield from strings(details["input"])


def strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the strings in a value that are long enough to search for; keys are skipped."""
    if isinstance(value, SecretStr | SecretBytes):
        value = value.get_secret_value()
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        if len(value := value.strip()) >= _SHORTEST:
            yield value
    elif depth < _DEPTH and isinstance(value, Mapping | list | tuple | set | frozenset):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings(item, depth + 1)


def mask(value: Plain, secrets: Iterable[str], mark: str) -> Plain:
    """Return plain data with `mark` in place of each secret, which may be escaped by Python or JSON."""
    first = list(dict.fromkeys(secrets))[:MAX_VALUES]
    spellings = {spelling for secret in first for spelling in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1])}
    return cast("Plain", _mask(value, sorted(spellings, key=len, reverse=True), mark))


def _mask(value: Any, spellings: list[str], mark: str) -> Any:
    if isinstance(value, str):
        for spelling in spellings:
            value = value.replace(spelling, mark)
        return value
    if isinstance(value, dict):
        return {key: _mask(item, spellings, mark) for key, item in value.items()}
    return [_mask(item, spellings, mark) for item in value] if isinstance(value, list) else value
