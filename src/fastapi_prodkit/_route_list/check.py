"""What a review has to see: how the routes differ from `routes.lock`, in words, and which have no rule of their own."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Final, NamedTuple

from fastapi_prodkit._route_list.lock import HIDDEN, Line, command_in, lines_of, read_lines
from fastapi_prodkit._route_list.row import ListedRoute

__all__ = ["Failure", "Finding", "changes", "check_routes", "differences"]

_OPEN: Final = ("public", "optional", "unguarded")
_WITHOUT: Final = ("none", "exempt")  # no limit
_LIMITS: Final = {"limit": "rate limit", "deadline": "deadline", "body": "body limit"}


class Finding(NamedTuple):
    """What is wrong with a route.

    Attributes:
        route: Method and path.
        text: What is wrong, such as `now public; was role editor`.
        source: Where its endpoint is defined; empty if it is not known.
        opens: More may reach the route than before.
    """

    route: str
    text: str
    source: str
    opens: bool


class Failure(NamedTuple):
    """A check that has failed: what is wrong, with which routes, and what to do."""

    title: str
    findings: Sequence[Finding]
    remedy: str

    def __str__(self) -> str:
        """Return the failure as lines."""
        width = max((len(each.route) for each in self.findings), default=0)
        lines = [f"  {each.route:{width}}  {each.text}" for each in self.findings]
        return "\n".join([f"{self.title}:" if lines else f"{self.title}.", *lines, self.remedy])


def check_routes(routes: Sequence[ListedRoute], file: Path | None, *, strict: bool) -> list[Failure]:
    """Return the checks that have failed.

    Args:
        routes: The routes of the app.
        file: The file with which they are compared; None without one.
        strict: Demand an explicit rule of each route.
    """
    failures = [None if file is None else differences(routes, file), _without_rule(routes) if strict else None]
    return [each for each in failures if each is not None]


def differences(routes: Sequence[ListedRoute], file: Path) -> Failure | None:
    """Return how routes differ from a file; None if they do not."""
    command = command_in(file)
    if not file.is_file():
        return Failure(f"{file} does not exist", [], f"Write it, and commit it: {command}")
    findings = changes(read_lines(file), lines_of(routes))
    if not findings:
        return None
    return Failure(f"The routes differ from {file}", findings, f"If all of this is intended: {command}")


def changes(before: Iterable[Line], after: Iterable[Line]) -> list[Finding]:
    """Return what has changed, by path, and what has opened first.

    Lines of the same method and path are compared in their order.
    """
    by_route: dict[str, tuple[list[Line], list[Line]]] = defaultdict(lambda: ([], []))
    for place, lines in enumerate((before, after)):
        for line in lines:
            by_route[line.route][place].append(line)
    findings = [
        _change(route, old, new)
        for route in sorted(by_route, key=lambda route: route.partition(" ")[::-1])
        for old, new in zip_longest(*by_route[route])
        if old is None or new is None or old.text != new.text
    ]
    return sorted(findings, key=lambda each: not each.opens)


def _without_rule(routes: Sequence[ListedRoute]) -> Failure | None:
    without = [each for each in routes if not each.explicit]
    if not without:
        return None
    findings = [Finding(f"{each.method} {each.path}", each.rule, each.source, opens=False) for each in without]
    remedy = "Give each of them one: public, CurrentUser, require_roles or require_scopes."
    return Failure("These routes have no rule of their own", findings, remedy)


def _change(route: str, old: Line | None, new: Line | None) -> Finding:
    if new is None:
        return Finding(route, "removed", "", opens=False)
    if old is None:
        fields = [new.rule, *(f"{name} {value}".strip() for name, value in new.fields.items())]
        return Finding(route, f"new route: {', '.join(fields)}", new.source, opens=True)
    text = ", ".join(_differences(old, new)) or "the line is written in another way"
    return Finding(route, text, new.source, opens=_opens(old, new))


def _differences(old: Line, new: Line) -> Iterator[str]:
    if old.rule != new.rule:
        yield f"now {new.rule} (was {old.rule})"
    for name, label in _LIMITS.items():
        was, now = (each.fields.get(name, "default") for each in (old, new))
        if was != now:
            yield f"{label} removed (was {was})" if now in _WITHOUT else f"{label} now {now} (was {was})"
    if (HIDDEN in old.fields) != (HIDDEN in new.fields):
        yield "no longer in the schema" if HIDDEN in new.fields else "now in the schema"
    was, now = (each.fields.get("is", "an ordinary route") for each in (old, new))
    if was != now:
        yield f"now {now} (was {was})"


def _opens(old: Line, new: Line) -> bool:
    """Return whether a caller may reach the route that did not before, or may do so more often."""
    if old.rule not in _OPEN and (new.rule in _OPEN or _demands(old) - _demands(new)):
        return True
    return any(new.fields.get(name) in _WITHOUT and old.fields.get(name) not in _WITHOUT for name in _LIMITS)


def _demands(line: Line) -> set[str]:
    return set(line.rule.split("; ")) - {"any user"}
