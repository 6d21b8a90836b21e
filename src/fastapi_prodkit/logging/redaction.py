"""Copy any value as plain JSON data, without secrets and within a maximum size.

Secrets are found in two ways. By key: values of `password`, `Set-Cookie`, `aws_secret_access_key` and the like are
always masked. By text: a DSN, a bearer token or `token=...` is masked inside any string. Masking too much is an
inconvenience, masking too little an incident, so doubtful cases are masked.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, time
from enum import Enum
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from pydantic import BaseModel

from fastapi_prodkit.logging import secret_forms
from fastapi_prodkit.logging.repetition import MAX_VALUES, inputs, mask, strings
from fastapi_prodkit.logging.secret_values import SQL, element, option, pair, values

__all__ = ["Redactor", "may_hold_secret"]

REDACTED = "[redacted]"
CUT = "[cut]"

# A key is secret if it ends in one of these words, in its plural, or in the word and digits. Case, `-` and `_` are
# ignored.
_NAMES = (
    *("authorization", "cookie", "credential", "dpop", "session", "session_id", "jwt", "token", "dsn"),
    *("password", "passcode", "passwd", "passphrase", "pwd", "secret"),
    *("access_key", "account_key", "api_key", "private_key", "secret_key", "signing_key"),
)
_COUNTS = ("tokens", "sessions")  # not secret if the value is a number

_QUOTED = re.compile(r"[bfru]{0,2}\\?(['\"])(.*?)\\?\1", re.IGNORECASE | re.DOTALL)
# Anchored at the start of a word, or a long word without digits would be scanned from each of its letters.
_WORD_WITH_DIGIT = re.compile(r"(?<![^\s\"'\\,;()\[\]{}<>@])[^\s\"'\\,;()\[\]{}<>@\d]*+\d[^\s\"'\\,;()\[\]{}<>@]*+")
_HEAD = frozenset({"timestamp", "level", "logger", "service", "environment", "version"})  # in every line
_CODE = frozenset({"exception", "stack"})

# All bytes except those that may indicate a secret, and JSON's own quotes and colons. J and I occur in the prefixes of
# JSON web tokens and of keys of AWS and Google. The other prefixes have no such byte: they are searched for only in a
# line that has any, such as a space.
_NO_MARKS = bytes(set(range(256)).difference(b"=\\@' \":JI<%"))
_BEHIND_TIME = len('{"timestamp":"2026-11-23T09:41:07')
# A colon after a name inside a string: not after a quote, and not in a time or an IPv6 address.
_COLON = re.compile(
    rb":(?<!\":)(?:%s)" % b"|".join(rb"(?<=[G-Zg-z_\x80-\xff][0-9A-Fa-f]{%d}:)" % count for count in range(8))
)
_WINDOW = 262_144  # characters of a string that are searched
_MARGIN = 4_096  # characters dropped at the end of the window, where a secret may be cut in two
_ITEM = 32  # size of a value beside its text: covers any number, and punctuation
_DEPTH = 8


def may_hold_secret(line: bytes) -> bool:
    """Return whether `Redactor.text` could find a secret in a line of JSON that begins with its timestamp."""
    return not _is_punctuation(line.translate(None, _NO_MARKS)) and (
        b"=" in line
        or b"\\" in line
        or (b"@" in line and b"://" in line)
        or (b"'" in line and any(mark in line for mark in (b"':", b"', ", b"d '", b"D '", b"Y '")))
        or (b" " in line and (b": " in line or b"earer " in line or b"EARER " in line or b"PRIVATE KEY" in line))
        or b"--" in line
        or b"</" in line
        or b"%3" in line
        or secret_forms.TOKEN_MARK.search(line) is not None
        or _COLON.search(line, _BEHIND_TIME) is not None
    )


@lru_cache(256)
def _is_punctuation(marks: bytes) -> bool:
    """Return whether `marks` has only the quotes and colons of JSON, and the two colons of a time.

    This holds for nearly every line. Lines of one event have equal marks, so the results are cached.
    """
    return not marks.strip(b'":') and marks.count(b":") == marks.count(b'"":') + 2


class Redactor:
    """Copy events with their secrets masked.

    Args:
        names: Secret key names in addition to the built-in ones.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        every = [name.lower().replace("-", "_") for name in (*_NAMES, *names)]
        endings = [_normalized(name) for name in every]
        self._endings = (*endings, *(f"{name}s" for name in endings))
        self._pair, self._option, self._element = pair(every), option(every), element(every)
        self._repeated = (*secret_forms.REPEATED, self._element)

    def is_secret(self, key: str) -> bool:
        """Return whether values of this key are masked, except counts; see `hides`."""
        return _normalized(key).rstrip("0123456789").endswith(self._endings)

    def hides(self, key: str, value: Any) -> bool:
        """Return whether this value of this key is masked."""
        is_count = isinstance(value, int | float) and key.lower().endswith(_COUNTS)
        return self.is_secret(key) and not is_count

    def text(self, text: str) -> str:
        """Return the text with its secrets masked."""
        if "earer " in text or "EARER " in text:
            text = secret_forms.BEARER.sub(rf"\1 {REDACTED}", text)
        if "PRIVATE KEY" in text:
            text = secret_forms.PRIVATE_KEY.sub(rf"\1{REDACTED}", text)
        if "</" in text:
            text = self._element.sub(rf"\1{REDACTED}", text)
        if "--" in text:
            text = self._mask(self._option, text)
        if any(mark in text for mark in ("=", ":", ", ", "%3")):
            text = secret_forms.QUOTED_DATA.sub(rf"\1{REDACTED}", text)
            text = secret_forms.HEADER.sub(rf"\1{REDACTED}", text)
            text = secret_forms.QUERY.sub(rf"\1{REDACTED}", text)
            text = secret_forms.WEBHOOK.sub(rf"\1{REDACTED}", text)
            text = secret_forms.TOKEN_IN_URL.sub(rf"\1{REDACTED}@", text)
            text = secret_forms.DSN.sub(rf"\1{REDACTED}@", text)
            text = self._mask(self._pair, text)
        if "'" in text:
            text = self._mask(SQL, text)
        return secret_forms.TOKEN.sub(REDACTED, text)

    @staticmethod
    def _mask(names: re.Pattern[str], text: str) -> str:
        parts, done = [], 0
        for start, end in values(names, text):
            parts += [text[done:start], REDACTED]
            done = end
        return "".join([*parts, text[done:]]) if parts else text

    def values(self, text: str) -> Iterator[str]:
        """Yield masked parts of a text that are secrets in other texts, too: quoted values and words with a digit."""
        places = [(match.end(1), match.end()) for pattern in self._repeated for match in pattern.finditer(text)]
        for start, end in chain(places, *(values(names, text) for names in (self._pair, self._option, SQL))):
            value = text[start:end]
            quoted = _QUOTED.fullmatch(value)
            yield from [quoted[2]] if quoted else _WORD_WITH_DIGIT.findall(value)

    def fields(self, fields: Mapping[str, Any], *, size: int, withheld: Iterable[str] = ()) -> dict[str, Any]:
        """Return a copy that any JSON encoder accepts. A value masked in one field is masked in all but standard ones.

        Args:
            fields: The event. If two values are too large, more of the first one is kept.
            size: Maximum size of the copy, in characters before escaping.
            withheld: Values to mask in every field.
        """
        copy = _Copy(self, size)
        plain = copy.mapping(fields.items(), 0)
        secrets = [*withheld, *copy.hidden]
        for text in copy.masked:
            secrets += strings(list(islice(self.values(text), MAX_VALUES)))
        if not secrets:
            return plain
        return plain | mask({name: plain[name] for name in plain if name not in _HEAD}, secrets, REDACTED)


class _Copy:
    """The copy of one event. A value may use at most half of the remaining size, so that some is left for the next."""

    def __init__(self, redactor: Redactor, size: int) -> None:
        self._redactor = redactor
        self._left = size
        self.hidden: list[str] = []  # values that were masked because of their keys
        self.masked: list[str] = []  # texts in which a part was masked

    def mapping(self, items: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, item in items:
            if self._full():
                plain[CUT] = "more items"
                break
            name = str(self.value(key, depth))
            if self._redactor.hides(name, item):
                plain[name] = REDACTED
                self.hidden += strings(item)
            else:
                known = len(self.masked)
                plain[name] = self.value(item, depth)
                if name in _CODE:
                    # In source code, `token = read_token()` is not a secret: do not search other fields for it.
                    del self.masked[known:]
        return plain

    def value(self, value: Any, depth: int) -> Any:
        if self._full() or depth > _DEPTH:
            return CUT
        reserve = self._left // 2
        self._left -= reserve + _ITEM
        try:
            return self._convert(value, depth + 1)
        except Exception:  # noqa: BLE001 - a foreign __str__, __iter__ or property fails; the rest of the event is kept
            return f"[unprintable {type(value).__name__}]"
        finally:
            self._left += reserve

    def _full(self) -> bool:
        return self._left < 2 * _ITEM

    def _convert(self, value: Any, depth: int) -> Any:  # noqa: C901, PLR0911, PLR0912 - one case per type
        match value:
            case None | bool():
                return value
            case Enum():
                return self._convert(value.value, depth)
            case int():
                return value if -(2**63) <= value < 2**64 else self._string(str(value))
            case float():
                return float(value)  # JSON has no NaN or infinity; orjson writes null
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
                self.hidden += inputs(value)
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
        if len(plain) == 2 and isinstance(plain[0], str) and self._redactor.hides(*plain):  # noqa: PLR2004 - a pair
            self.hidden += strings(plain[1])
            plain[1] = REDACTED  # headers in ASGI are pairs
        return plain

    def _string(self, value: str) -> str:
        text = value[:_WINDOW]
        if not text.isascii():
            text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not UTF-8
        masked = self._redactor.text(text)
        if masked != text:
            self.masked.append(text)
            text = masked
        if len(value) > _WINDOW:
            text = text[:-_MARGIN]
        if len(text) > self._left:
            # Keeps the end as well: a traceback ends with the exception.
            head, tail = self._left * 3 // 4, self._left // 4
            text = f"{text[:head]}...[cut {len(value) - head - tail} characters]...{text[len(text) - tail :]}"
        self._left -= len(text)
        return text


def _normalized(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
