"""Fill the blocks of the documentation and draw the charts from the newest results.

    python benchmarks/report.py

A block stands between `<!-- benchmark: NAME -->` and `<!-- end -->`; NAME is that of a table or of one of `TEXTS`.
"""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from candidates import CAREFUL, TUTORIAL
from charts import bars
from ours import BARE, WHOLE
from tables import from_json, number

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHARTS = ROOT / "docs" / "charts"
PAGES = (ROOT / "README.md", ROOT / "docs" / "why.md", ROOT / "docs" / "performance.md")
WIDTH = 120

PACKAGES = (
    "fastapi",
    "starlette",
    "uvicorn",
    "slowapi",
    "asgi-correlation-id",
    "secure",
    "prometheus-fastapi-instrumentator",
    "starlette-exporter",
    "lite-bootstrap",
    "microbootstrap",
    "fastapi-guard",
    "auth0-fastapi-api",
    "fastapi-azure-auth",
    "authlib",
    "opentelemetry-instrumentation-fastapi",
    "litestar",
    "structlog",
    "advanced-alchemy",
)
# The charts: a column of a table, and a title.
DRAWN = {
    "in-process": ("GET", "CPU time of a GET, times that of bare FastAPI()"),
    "wire": ("requests/CPU s, ratio", "Requests per CPU second of the server, share of bare FastAPI()"),
    "hostile": ("RSS, MB more", "MB more after 200 000 hostile requests"),
}


class Results:
    """What one run of all benchmarks has measured."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.tables = {table.name: table for table in map(from_json, facts["tables"])}

    def ratio(self, table: str, row: str, column: str) -> str:
        value = self.tables[table].rows[row][column]
        assert value is not None
        return number(value)


def newest() -> Results:
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return Results(max(runs, key=lambda run: (run["date"], run["python"])))


def environment(results: Results) -> str:
    facts = results.facts
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in PACKAGES)
    return (
        f"{facts['date']}, Python {facts['python']}, {facts['system']}, {facts['cores']} cores of "
        f"{facts['processor']}, with {versions}."
    )


def summary(results: Results) -> str:
    tutorial, careful, whole = (results.ratio("in-process", name, "GET") for name in (TUTORIAL, CAREFUL, WHOLE))
    routes = results.ratio("routes-last", WHOLE, "100 routes")
    wire = results.ratio("wire", WHOLE, "requests/CPU s, ratio")
    theirs = results.ratio("wire", CAREFUL, "requests/CPU s, ratio")
    return (
        f"A small request takes {tutorial} times as long as with bare FastAPI if these packages are combined as in "
        f"tutorials, and {careful} times if they are combined with care. With `create_app` and everything on it takes "
        f"{whole} times as long; for the last of 100 routes, which an index finds, {routes} times as long as with bare "
        f"FastAPI. Over the network `create_app` serves {wire} times as many requests per CPU second as bare FastAPI, "
        f"the careful combination {theirs} times."
    )


def better(results: Results) -> str:
    """Return a list of everything in which a peer is better."""
    lines = []
    for table in results.tables.values():
        for peer, ours in table.instead_of.items():
            own = [defeat for defeat in table.defeats() if defeat.peer == peer]
            if own:
                figures = ", ".join(f"{each.column} {number(each.theirs)} ({number(each.own)})" for each in own)
                lines.append(f"- {table.title}: {peer} against {ours}: {figures}")
    return "\n".join(lines) or "In nothing that is measured here."


TEXTS: dict[str, Callable[[Results], str]] = {"better": better, "environment": environment, "summary": summary}


def block(name: str, results: Results) -> str:
    if name in results.tables:
        return results.tables[name].markdown()
    paragraphs = TEXTS[name](results).splitlines()
    indents = ("  " if line.startswith("- ") else "" for line in paragraphs)
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        for line, indent in zip(paragraphs, indents, strict=True)
    )


def filled(page: str, results: Results) -> str:
    """Return the page with each of its blocks as the results have it."""
    return re.sub(
        r"(<!-- benchmark: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{block(match[2], results)}\n\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def chart(name: str, results: Results) -> str:
    """Return the bars of `create_app`, bare FastAPI and what does the same as `create_app`."""
    column, title = DRAWN[name]
    table = results.tables[name]
    whole = {BARE, WHOLE, *(peer for peer, ours in table.instead_of.items() if ours == WHOLE)}
    values = {row: max(0.0, cells[column] or 0.0) for row, cells in table.ordered() if row in whole}
    return bars(title, values, frozenset({WHOLE}))


def main() -> None:
    results = newest()
    for page in PAGES:
        page.write_text(filled(page.read_text(), results))
    for name in DRAWN:
        CHARTS.mkdir(exist_ok=True)
        (CHARTS / f"{name}.svg").write_text(chart(name, results))


if __name__ == "__main__":
    main()
