"""Find the values of secrets in a text: each begins after a secret name, and its form determines where it ends.

A quoted value ends at the closing quote; quotes inside may be doubled or escaped. A collection or a call ends at its
closing bracket, including nested ones. `<a repr>` ends at `>`. A YAML block ends with its last indented line. Any other
value ends at a space, a quote or a bracket, but not at a comma or semicolon that is followed by more text.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["SQL", "element", "option", "pair", "values"]

# name=value, name: value, name:value, "name": value and "name", value, name[]=value; the quotes of JSON within JSON
# have backslashes, those in URLs are %22. A number of tokens or sessions is a count.
_PAIR: Final = (
    r"(?:%s)(?>((?<=token|ssion)s)|s|\d{1,2}|)"
    r"(?:\\*+[\"'], |(?:\\*+[\"']|%%22)?(?:\[\d*\]|\]|%%5B\d*%%5D|%%5D)?"
    r"(?:[ \t]|\\t)*+(?::=|=>?(?!=)|:(?![:=]|//)|%%3[AD])"
    r"(?:[ \t]|\\t)*+)(?!(?:bearer )?\[redacted\])(?(1)(?!(?:\d{1,12}(?:[._]\d{1,12})?|none|null)(?![\w.-])))"
)
SQL: Final = re.compile(r"\b(?:[Pp]assword|PASSWORD|IDENTIFIED BY) (?=\\?')")

_MAX_BACKSLASHES: Final = 63  # before a quote that is recognized
_MAX_UNCLOSED: Final = 4  # unclosed brackets for which the whole text is searched; bounded for linear time

_QUOTE: Final = re.compile(r"[befnru]{0,2}(\\*)([\"'])", re.IGNORECASE)
_BRACKET: Final = re.compile(r"(?:[a-z_][\w.]*+)?[\[({]", re.IGNORECASE)
_INSIDE: Final = re.compile(r"[\[({]|[\])}]|(?<!\w)[befnru]{0,2}(\\*)([\"'])", re.IGNORECASE)
_LINE: Final = r"(?:[^\r\n\\]|\\(?!n))*+"
_BLOCK_OR_REPR: Final = re.compile(
    rf"[|>][+-]?\d?[ \t]*+(?:(?:\r?\n|\\n)[ \t]++{_LINE})++|(?:(?:\r?\n|\\n)[ \t]*+- {_LINE})++|<[^<>\n]*+>"
)
_MORE: Final = re.compile(r"\.?\w|[\[({]")  # continues a value after a quote or a bracket
_BARE: Final = re.compile(r"(?:basic |bearer )?(?:[^\s&,;\"'<>)\]}]++|[,;]++(?=[^\s&,;\"'<>)\]}]))++", re.IGNORECASE)


def pair(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for a name and its separator, up to the value; `_` in a name also matches `-`."""
    return re.compile(_PAIR % _spellings(names), re.IGNORECASE)


def option(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for an option of a command, such as `--db-password`, up to the value behind a space."""
    return re.compile(rf"(?<![\w-])--[\w-]{{0,60}}?(?:{_spellings(names)})s? +(?=[^\s-])", re.IGNORECASE)


def element(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for the start tag of an XML element, as group 1, and its text up to the end tag."""
    tag = rf"<[\w.:-]{{0,60}}?(?:{_spellings(names)})s?(?:\s[^<>]{{0,300}})?(?<!/)>"
    cdata = r"<!\[CDATA\[[^<]*+(?:<(?!/)[^<]*+)*+"
    return re.compile(rf"({tag}\s*+)(?!</)[^<]*+(?:{cdata})?(?=</)", re.IGNORECASE)


def _spellings(names: Iterable[str]) -> str:
    return "|".join(re.escape(name).replace("_", "[-_]?") for name in names)


def values(names: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each value that follows a match of the pattern."""
    scanner, place = _ValueScanner(text), 0
    while match := names.search(text, place):
        place = scanner.end(match.end())
        if place > match.end():
            yield match.end(), place


class _ValueScanner:
    """Find the ends of values in one text, in linear time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._unclosed = 0

    def end(self, start: int) -> int:
        """Return the end of the value that begins at `start`; `start` if there is no value."""
        text = self._text
        while True:
            if quote := _QUOTE.match(text, start):
                start = self._quoted_end(quote) or len(text)
            elif bracket := _BRACKET.match(text, start):
                start = self._bracket_end(bracket.end()) or self._line_end(start)
            else:
                found = _BLOCK_OR_REPR.match(text, start) or _BARE.match(text, start)
                return found.end() if found else start
            if not _MORE.match(text, start):
                return start

    def _line_end(self, start: int) -> int:
        found = self._text.find("\n", start)
        return found if found >= 0 else len(self._text)

    def _quoted_end(self, opening: re.Match[str]) -> int | None:
        """Return the end of a quoted string; None if it is not closed.

        In JSON inside JSON, each level of nesting adds backslashes to a quote; quotes inside the string have more.
        """
        text, (escape, quote) = self._text, opening.groups()
        period = 2 * len(escape) + 2
        place = opening.end()
        while (found := text.find(quote, place)) >= 0:
            place = found + 1
            before = text[max(opening.end(), found - _MAX_BACKSLASHES) : found]
            backslashes = len(before) - len(before.rstrip("\\"))
            if backslashes % period == len(escape):
                if not text.startswith(opening[0][-len(escape) - 1 :], place):
                    return place
                place += len(escape) + 1  # doubled, as in SQL
        return None

    def _bracket_end(self, place: int) -> int | None:
        """Return the end of the bracket that opens just before `place`; None if it is not closed."""
        text, depth = self._text, 1
        if self._unclosed >= _MAX_UNCLOSED:
            return None
        while found := _INSIDE.search(text, place):
            place = found.end()
            if found[2]:
                place = self._quoted_end(found) or place
            else:
                depth += 1 if found[0] in "[({" else -1
            if not depth:
                return place
        self._unclosed += 1
        return None
