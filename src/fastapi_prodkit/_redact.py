"""What may be written: a copy of any value as plain JSON data, without secrets and within a size.

Two readings of an event: by key (`password`, `Set-Cookie`, `aws_secret_access_key` are masked whatever they hold) and
by text (a DSN, a bearer token or `token=...` inside of any string is masked where it stands). Masking too much is an
inconvenience and masking too little an incident, so every doubt is resolved towards masking.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time
from enum import Enum
from typing import Any

from pydantic import BaseModel

__all__ = ["Redactor", "may_hold_secret"]

REDACTED = "[redacted]"
CUT = "[cut]"

# A key is secret if it ends in one of these; case, `-` and `_` make no difference.
_NAMES = (
    *("authorization", "cookie", "cookies", "credential", "credentials", "session", "session_id", "jwt", "token"),
    *("password", "passwd", "passphrase", "pwd", "secret", "secrets", "dsn"),
    *("access_key", "api_key", "private_key", "secret_key", "signing_key"),
)

# Every pattern runs in linear time: repetitions are possessive, bounded, or end at a character that they exclude.
# scheme://user:password@host; a password may hold `/` and `@`, a port followed by a path is not one.
_DSN = re.compile(r"(://[^\s:/@]*+:)(?!\d{1,5}/)(?:[^\s/@]*+(?:/(?!/)[^\s/@]*+)*+@)++")
_BEARER = re.compile(r"\b([Bb]earer|BEARER) +[^\s\"',;]++")
# A whole header line, because a cookie has several parts.
_HEADER = re.compile(r"((?:cookie|authorization): )[^\r\n\"']++", re.IGNORECASE)
# What database drivers and pydantic quote from the data: up to the next part of their message, or to the end.
_QUOTED_DATA = re.compile(
    r"(\[parameters: |\bDETAIL: +|\binput_value=).*?(?=\n\n|\n[\[(]|\n[A-Z]{4,}:|\nTraceback|, input_type=|\Z)",
    re.DOTALL,
)
# name=value, name: value, "name": value and "name", "value", where the name is one of the secret ones: `Redactor` puts
# them in. A quoted value ends at its quote, or at the end of the text if that was cut off.
_PAIR = (
    r"((?:%s)(?:[\\\"']{1,3}(?:: ?|, )b?|:[ \t]|[\\\"']{0,3} ?=(?!=) ?))(?!(?:bearer )?\[redacted\])"
    r"(?:\\?\"(?:[^\"\\]|\\.)*+\"?|\\?'(?:[^'\\]|\\.)*+'?|(?:basic |bearer )?[^\s&,;\"'<>)\]}]++)"
)

MARKS = b"=\\@' "  # without one of these there is no secret in a line of JSON
_WINDOW = 262_144  # characters of a string that are looked at
_MARGIN = 4_096  # and what is dropped from the end of a longer one: a secret may have been cut in two there
_ITEM = 32  # what a value costs beside its text: more than any number, and its punctuation
_DEPTH = 8


def may_hold_secret(line: bytes) -> bool:
    """Whether `Redactor.text` could find something in a line of JSON.

    A line without any of MARKS need not be asked about.
    """
    return (
        b"=" in line
        or b"\\" in line
        or (b"@" in line and b"://" in line)
        or (b"'" in line and (b"':" in line or b"', " in line))
        or (b" " in line and (b": " in line or b"earer " in line or b"EARER " in line))
    )


class Redactor:
    """Mask secrets in events.

    Args:
        names: Key names that are secret beside the built-in ones.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        every = [name.lower().replace("-", "_") for name in (*_NAMES, *names)]
        self._endings = tuple(_squeeze(name) for name in every)
        spellings = (re.escape(name).replace("_", "[-_]?") for name in every)
        self._pair = re.compile(_PAIR % "|".join(spellings), re.IGNORECASE | re.DOTALL)

    def is_secret(self, key: str) -> bool:
        """Whether what stands under this key is masked."""
        return _squeeze(key).endswith(self._endings)

    def text(self, text: str) -> str:
        """Return the text with the secrets in it masked."""
        if "earer " in text or "EARER " in text:
            text = _BEARER.sub(rf"\1 {REDACTED}", text)
        if "=" in text or ":" in text or ", " in text:
            text = _QUOTED_DATA.sub(rf"\1{REDACTED}", text)
            text = _HEADER.sub(rf"\1{REDACTED}", text)
            text = _DSN.sub(rf"\1{REDACTED}@", text)
            text = self._pair.sub(rf"\1{REDACTED}", text)
        return text

    def fields(self, fields: Mapping[str, Any], *, size: int) -> dict[str, Any]:
        """Return a copy that any JSON encoder takes.

        Args:
            fields: The event. Of two values that are too large the first gets more room.
            size: Bound of the copy, in characters, before they are escaped.
        """
        return _Copy(self, size).mapping(fields.items(), 0)


class _Copy:
    """One copy of one event. A value gets at most half of the room that is left, so there is some for the next."""

    def __init__(self, redactor: Redactor, size: int) -> None:
        self._redactor = redactor
        self._left = size

    def mapping(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, item in items:
            if self._full():
                plain[CUT] = "more items"
                break
            name = str(self.value(key, depth))
            plain[name] = REDACTED if self._redactor.is_secret(name) else self.value(item, depth)
        return plain

    def value(self, value: Any, depth: int) -> Any:
        if self._full() or depth > _DEPTH:
            return CUT
        reserve = self._left // 2
        self._left -= reserve + _ITEM
        try:
            return self._convert(value, depth + 1)
        except Exception:  # noqa: BLE001 - a foreign __str__, __iter__ or property; the rest of the event is still good
            return f"[unprintable {type(value).__name__}]"
        finally:
            self._left += reserve

    def _full(self) -> bool:
        return self._left < 2 * _ITEM

    def _convert(self, value: Any, depth: int) -> Any:  # noqa: C901, PLR0911, PLR0912 - one case for each type
        match value:
            case None | bool():
                return value
            case Enum():
                return self._convert(value.value, depth)
            case int():
                return value if -(2**63) <= value < 2**64 else self._string(str(value))
            case float():
                return float(value)  # JSON has no NaN and no infinities; they are written as null
            case str():
                return self._string(value)
            case bytes() | bytearray() | memoryview():
                return self._string(bytes(value[:_WINDOW]).decode("utf-8", "backslashreplace"))
            case datetime() if value.tzinfo is UTC:
                return value
            case date() | time():
                return value.isoformat()
            case Mapping():
                return self.mapping(value.items(), depth)
            case BaseModel():
                return self.mapping(value, depth)
            case set() | frozenset():
                return sorted(self._sequence(value, depth), key=str)
            case tuple() if hasattr(value, "_asdict"):
                return self.mapping(value._asdict().items(), depth)
            case list() | tuple() | deque():
                return self._sequence(value, depth)
            case BaseException():
                return self._string(f"{type(value).__name__}: {value}")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            shown = (field.name for field in dataclasses.fields(value) if field.repr)
            return self.mapping(((name, getattr(value, name)) for name in shown), depth)
        return self._string(str(value))

    def _sequence(self, items: Iterable[Any], depth: int) -> list[Any]:
        plain: list[Any] = []
        for item in items:
            if self._full():
                plain.append(CUT)
                break
            plain.append(self.value(item, depth))
        if len(plain) == 2 and isinstance(plain[0], str) and self._redactor.is_secret(plain[0]):  # noqa: PLR2004 - a pair
            plain[1] = REDACTED  # ASGI has headers as pairs
        return plain

    def _string(self, value: str) -> str:
        text = value[:_WINDOW]
        if not text.isascii():
            text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not UTF-8
        text = self._redactor.text(text)
        if len(value) > _WINDOW:
            text = text[:-_MARGIN]
        if len(text) > self._left:
            # The end is kept as well: of a traceback it is the exception.
            head, tail = self._left * 3 // 4, self._left // 4
            text = f"{text[:head]}...[cut {len(value) - head - tail} characters]...{text[len(text) - tail :]}"
        self._left -= len(text)
        return text


def _squeeze(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
