"""What a request costs, as a ratio to bare `FastAPI()`: `create_app`, our pieces, their peers, and whole assemblies.

    python benchmarks/in_process.py [--rounds 20] [--limit 1.25]

Each app is measured in a process of its own, in turns with bare `FastAPI()`, because many configure logging for the
whole process; before that it has to show that it does its job. With --limit only `create_app` is measured, and the exit
code is 1 if a GET, a POST or a plain `def` endpoint costs more.
"""

import asyncio
import sys
from collections.abc import Iterable

import apps
from asgi import Output, Request, answer, call, in_another_process, interleave, output
from candidates import GET, LIMITS, ONE_A_DAY, UNLIMITED, Candidate, prove
from ours import BARE, WHOLE, assembly, bare, whole
from tables import Table, parser_of, show

__all__ = ["REQUESTS", "assembly", "bare", "call", "measure_named", "ratios", "table", "whole"]

REQUESTS = {
    "GET": GET,
    "POST": Request("POST", "/items", b'{"name": "lamp", "price": 9.5}'),
    "sync": Request("GET", "/sync/42"),
    "404": Request("GET", "/wp-login.php"),
    "422": Request("POST", "/items", b'{"name": "lamp", "price": "low"}'),
    "stream": Request("GET", "/stream"),
    "8 KB head": GET._replace(headers=tuple((b"x-header-%d" % n, b"0123456789" * 20) for n in range(40))),
    "429": GET,  # of an app with another limit, so the last
}
STATUSES = {"404": (404,), "422": (422, 400), "429": (429,)}
LIMITED = ("GET", "POST", "sync")
CALLS = {"stream": 1}  # in a round, of kinds that take long

Measured = dict[str, tuple[float, float]]


async def measure(name: str, candidate: Candidate, kinds: Iterable[str], rounds: int, out: Output) -> Measured:
    base, app = bare(), candidate.make(UNLIMITED)
    await prove(name, candidate, app, out)
    results: Measured = {}
    for kind in kinds:
        if kind == "429" and LIMITS not in candidate.jobs:
            continue
        if kind == "429":
            app = candidate.make(ONE_A_DAY)
            await call(app, *GET)
        seen = await answer(app, REQUESTS[kind])
        if seen.status not in STATUSES.get(kind, (200,)):
            raise SystemExit(f"{name}: {kind} answered {seen.status} {seen.body.decode()}")
        if seen.whole:
            seconds = await interleave({BARE: base, name: app}, REQUESTS[kind], rounds, CALLS.get(kind, 30))
            results[kind] = (seconds[BARE], seconds[name])
    return results


def measure_named(name: str, kinds: Iterable[str], rounds: int) -> Measured:
    """Return CPU seconds per request of each kind: of bare `FastAPI()`, and of the app with this name."""
    with output() as out:
        return asyncio.run(measure(name, apps.find(name), kinds, rounds, out))


def ratios(measured: Measured) -> dict[str, float]:
    return {kind: own / base for kind, (base, own) in measured.items()}


def table(names: Iterable[str], rounds: int) -> Table:
    rows: dict[str, dict[str, float]] = {BARE: dict.fromkeys(REQUESTS, 1.0)}
    for name in (each for each in names if each != BARE):
        rows[name] = ratios(in_another_process(measure_named, name, list(REQUESTS), rounds))
        print(f"\r{name:60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Table(
        name="in-process",
        title="In process",
        unit="CPU time, times that of bare FastAPI()",
        rows=rows,
        instead_of={name: ours for name in rows if (ours := apps.find(name).instead_of) in rows},
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds per kind of request")
    parser.add_argument("--limit", type=float, help="fail if create_app costs more than this many times bare FastAPI()")
    parser.add_argument("--apps", nargs="+", help="those of the table that are measured")
    options = parser.parse_args()
    if options.limit is None:
        show([table(options.apps or apps.names(), options.rounds)], options.json)
        return 0
    costs = ratios(measure_named(WHOLE, LIMITED, options.rounds))
    print("  ".join(f"{kind} {ratio:.2f}" for kind, ratio in costs.items()))
    worst = max(costs.values())
    print(f"create_app(settings) costs at most {worst:.2f} times bare FastAPI()")
    return int(worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
