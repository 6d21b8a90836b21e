"""Tables of results: on the terminal, as JSON, and as Markdown."""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Defeat", "Table", "from_json", "number", "parser_of", "show"]

MARGIN = 0.03  # what two runs differ by

Cells = Mapping[str, float | None]


class Defeat(NamedTuple):
    peer: str
    ours: str
    column: str
    theirs: float
    own: float


@dataclass(frozen=True)
class Table:
    """What was measured: a row for each app, a column for each kind of measurement.

    Args:
        name: Unique, of lower-case letters and hyphens.
        title: What the table shows.
        unit: Of the numbers, where columns do not name one.
        rows: The cells of each app by column. None: the app does not do that.
        instead_of: The row of ours that does the same job, for each row of a peer.
        higher: The columns in which a higher number is better; in the others a lower one is.
        notes: What a reader has to know about a row or a column.
    """

    name: str
    title: str
    unit: str
    rows: Mapping[str, Cells]
    instead_of: Mapping[str, str] = field(default_factory=dict)
    higher: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for cells in self.rows.values() for column in cells))

    def text(self) -> str:
        """Return the table in columns of equal width."""
        width = max(map(len, self.rows)) + 2
        lines = [
            f"{self.title}, {self.unit}",
            " " * width + "".join(f"{name:>{_width(name)}}" for name in self.columns),
        ]
        for name, cells in self.ordered():
            row = "".join(f"{number(cells.get(column)):>{_width(column)}}" for column in self.columns)
            lines.append(f"{name:{width}}{row}")
        return "\n".join([*lines, *self.notes])

    def ordered(self) -> list[tuple[str, Cells]]:
        """Return the rows, each of ours followed by those of its peers."""
        names = [name for name in self.rows if name not in self.instead_of]
        return [
            (name, self.rows[name])
            for ours in names
            for name in (ours, *(peer for peer, own in self.instead_of.items() if own == ours))
        ]

    def markdown(self) -> str:
        """Return the table with those cells in bold in which a peer is better than ours."""
        better = {(defeat.peer, defeat.column) for defeat in self.defeats()}
        lines = [f"| | {' | '.join(self.columns)} |", "|---|" + "---:|" * len(self.columns)]
        for name, cells in self.ordered():
            texts = [
                f"**{number(cells.get(column))}**" if (name, column) in better else number(cells.get(column))
                for column in self.columns
            ]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def defeats(self) -> list[Defeat]:
        """Return where a peer is better than the row of ours that does the same job."""
        return [
            Defeat(peer, ours, column, theirs, own)
            for peer, ours in self.instead_of.items()
            for column, theirs in self.rows[peer].items()
            if theirs is not None and (own := self.rows[ours].get(column)) is not None
            if (own * (1 + MARGIN) < theirs if column in self.higher else theirs * (1 + MARGIN) < own)
        ]


def _width(column: str) -> int:
    return max(len(column), 7) + 2


def number(value: float | None) -> str:
    """Return three digits or so; a dash for what was not measured."""
    if value is None:
        return "-"
    return (
        f"{value:,.0f}".replace(",", " ")
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's command line, to which the benchmark adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the tables to this file, too")
    return parser


def show(tables: Iterable[Table], path: Path | None) -> None:
    """Print the tables, and write them to the file."""
    tables = list(tables)
    for table in tables:
        print(f"\n{table.text()}", flush=True)
    if path:
        path.write_text(json.dumps([dataclasses.asdict(table) for table in tables]))


def from_json(entry: dict[str, Any]) -> Table:
    """Return what `show` has written."""
    return Table(**{**entry, "higher": tuple(entry["higher"]), "notes": tuple(entry["notes"])})
