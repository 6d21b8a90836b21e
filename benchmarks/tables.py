"""Tables of results: on the terminal, as JSON, and as Markdown."""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Table", "add_option", "number", "show"]

Cells = Mapping[str, float | None]


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
        for name, cells in self.rows.items():
            row = "".join(f"{number(cells.get(column)):>{_width(column)}}" for column in self.columns)
            lines.append(f"{name:{width}}{row}")
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        lines = [f"| | {' | '.join(self.columns)} |", "|---|" + "---:|" * len(self.columns)]
        for name, cells in self.rows.items():
            lines.append(f"| {name} | {' | '.join(number(cells.get(column)) for column in self.columns)} |")
        return "\n".join(lines)

    def defeats(self, margin: float) -> list[tuple[str, str, str, float, float]]:
        """Return peer, ours, column and both numbers where a peer is better by more than this share."""
        found = []
        for peer, ours in self.instead_of.items():
            for column, theirs in self.rows[peer].items():
                own = self.rows[ours].get(column)
                if theirs is None or own is None:
                    continue
                better, worse = (own, theirs) if column in self.higher else (theirs, own)
                if better * (1 + margin) < worse:
                    found.append((peer, ours, column, theirs, own))
        return found


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


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the tables to this file, too")


def show(tables: Iterable[Table], path: Path | None) -> None:
    """Print the tables, and write them to the file."""
    tables = list(tables)
    for table in tables:
        print(f"\n{table.text()}", flush=True)
    if path:
        path.write_text(json.dumps([dataclasses.asdict(table) for table in tables]))


def from_json(entry: dict[str, Any]) -> Table:
    return Table(**{**entry, "higher": tuple(entry["higher"]), "notes": tuple(entry["notes"])})
