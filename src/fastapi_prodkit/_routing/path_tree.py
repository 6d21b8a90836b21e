"""A tree of path segments, which finds the routes that can match a path."""

import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, Final, Generic, Protocol, TypeVar

from starlette.convertors import FloatConvertor, IntegerConvertor, StringConvertor, UUIDConvertor
from starlette.routing import PARAM_REGEX

__all__ = ["PathTree", "Place"]

# The regular expressions of parameters that contain no slash. Of others, such as `{rest:path}`, it is not known.
_WITHIN_SEGMENT: Final = frozenset(
    kind.regex for kind in (StringConvertor, IntegerConvertor, FloatConvertor, UUIDConvertor)
)


class Ordered(Protocol):
    """An entry of the tree; `order` is its place among all entries."""

    @property
    def order(self) -> int: ...


_Entry = TypeVar("_Entry", bound=Ordered)
_ORDER: Final = attrgetter("order")

# The segments of a path template: a text that is the segment, or None for any segment; True if anything may follow.
Place = tuple[list[str | None], bool]
ANYWHERE: Final[Place] = ([], True)


class PathTree(Generic[_Entry]):
    """Find the entries that can match a path, in their order.

    It finds every entry whose route matches, and possibly some whose routes do not: those have to be asked.
    """

    def __init__(self) -> None:
        self._root: _Node[_Entry] = _Node(depth=1)  # the first segment is the text in front of the first slash

    def add(self, place: Place, entry: _Entry) -> None:
        """Add an entry at its place."""
        node = self._root
        segments, open_ended = place
        for segment in segments:
            node = node.child(segment)
        (node.below if open_ended else node.here).append(entry)

    def find(self, path: str) -> list[_Entry]:
        """Return the entries that can match a path, in their order. The path must not contain a line break."""
        found: list[_Entry] = []
        self._root.collect(path.split("/"), found)
        if len(found) > 1:
            found.sort(key=_ORDER)
        return found


class _Node(Generic[_Entry]):
    """The entries whose paths begin with the same segments; `depth` is their number."""

    __slots__ = ("any_text", "below", "by_text", "depth", "here")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.here: list[_Entry] = []  # their paths end here
        self.below: list[_Entry] = []  # their paths may go on with anything
        self.by_text: dict[str, _Node[_Entry]] = {}
        self.any_text: _Node[_Entry] | None = None

    def child(self, segment: str | None) -> "_Node[_Entry]":
        """Return the node for a further segment, which is made if there is none."""
        if segment is not None:
            return self.by_text.setdefault(segment, _Node(self.depth + 1))
        if self.any_text is None:
            self.any_text = _Node(self.depth + 1)
        return self.any_text

    def collect(self, segments: list[str], found: list[_Entry]) -> None:
        """Add the entries that can match the segments from its depth on. It calls itself where the way forks."""
        node = self
        for segment in segments[self.depth :]:
            if node.below:
                found += node.below
            child = node.by_text.get(segment)
            if child is None:
                child = node.any_text
                if child is None:
                    return
            elif node.any_text is not None:
                node.any_text.collect(segments, found)
            node = child
        if node.below:
            found += node.below
        found += node.here


def place_of(path: str, regex: re.Pattern[str], convertors: Mapping[str, Any]) -> Place:
    """Return the place of a route in the tree.

    A route whose regular expression is not the one that Starlette makes of its path can match any path.

    Args:
        path: As it was declared, such as `/items/{item_id:int}`.
        regex: What the route compares with the path of a request.
        convertors: The convertor of each parameter.
    """
    if regex.pattern != "".join(_pattern(path, convertors)) or regex.flags != re.UNICODE:
        return ANYWHERE
    segments: list[str | None] = []
    for segment in path.split("/")[1:]:
        names = [match[1] for match in PARAM_REGEX.finditer(segment)]
        if any(convertors[name].regex not in _WITHIN_SEGMENT for name in names):
            return segments, True
        segments.append(None if names else segment)
    return segments, False


def _pattern(path: str, convertors: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of the regular expression that Starlette makes of a path."""
    yield "^"
    end = 0
    for match in PARAM_REGEX.finditer(path):
        yield re.escape(path[end : match.start()])
        yield f"(?P<{match[1]}>{convertors[match[1]].regex})"
        end = match.end()
    yield re.escape(path[end:])
    yield "$"
