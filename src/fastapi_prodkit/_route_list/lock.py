"""The file `routes.lock`: one line for each route, made for reviews.

    GET /prices  public
    POST /reports  role editor  limit default; 5/minute  deadline 120 s

A line has what decides who reaches a route. It has no line number and no path of a file, which change without a
meaning, and leaves out what is as for all routes. Probes, metrics and docs pages are not in the file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fastapi_prodkit._route_list.row import ListedRoute

__all__ = ["HIDDEN", "Line", "command_in", "lines_of", "read_lines", "write_lines"]

HIDDEN: Final = "hidden"  # `include_in_schema=False`
_GAP: Final = "  "
_WRITTEN_BY: Final = "# Written by: "


class Line:
    """One line of the file.

    Attributes:
        text: As in the file.
        route: Method and path.
        rule: Who may call it.
        fields: The other fields by their first word, such as `limit`.
        source: Where the endpoint is defined; empty for a line that was read.
    """

    def __init__(self, text: str, source: str = "") -> None:
        self.text = text
        self.route, _, rest = text.partition(_GAP)
        self.rule, *fields = rest.split(_GAP)
        self.fields = {name: value for name, _, value in (each.partition(" ") for each in fields)}
        self.source = source


def lines_of(routes: Iterable[ListedRoute]) -> list[Line]:
    """Return the lines for routes, without those about which settings decide: environments differ in them."""
    return [_line(each) for each in routes if not each.by_settings]


def _line(route: ListedRoute) -> Line:
    limits = {"limit": route.limit, "deadline": route.deadline, "body": route.body, "is": route.note}
    fields = [f"{name} {value}" for name, value in limits.items() if value not in ("", "default")]
    fields += [HIDDEN] if route.hidden else []
    return Line(_GAP.join([f"{route.method} {route.path}", route.rule, *fields]), route.source)


def read_lines(file: Path) -> list[Line]:
    """Return the lines of a file, without comments."""
    texts = file.read_text(encoding="utf-8").splitlines()
    return [Line(each) for each in texts if each and not each.startswith("#")]


def command_in(file: Path) -> str:
    """Return the command that writes a file, which its first line names."""
    first = file.read_text(encoding="utf-8").partition("\n")[0] if file.is_file() else ""
    known = first.startswith(_WRITTEN_BY)
    return first.removeprefix(_WRITTEN_BY) if known else f"fastapi-prodkit routes MODULE:APP --write --lock {file}"


def write_lines(file: Path, lines: Iterable[Line], command: str) -> None:
    """Write a file, with the command in its first line."""
    texts = [f"{_WRITTEN_BY}{command}", *(each.text for each in lines)]
    file.write_text("".join(f"{each}\n" for each in texts), encoding="utf-8")
