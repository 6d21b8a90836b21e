"""What one request allocates: the peak of its memory by `tracemalloc`, and the blocks that stay after it.

    python benchmarks/allocations.py [--requests 300]

The peak is the median over the requests, in kB above what was allocated before each of them. The blocks are those of
`sys.getallocatedblocks` for each request: 0 if nothing grows.
"""

import asyncio
import gc
import statistics
import sys
import tracemalloc

import apps
from asgi import App, call, in_another_process, output
from candidates import CAREFUL, GET, LITESTAR, TUTORIAL, UNLIMITED
from ours import BARE, WHOLE
from tables import Table, parser_of, show

NAMES = (BARE, WHOLE, CAREFUL, TUTORIAL, "lite-bootstrap", LITESTAR)
WARM_UP = 300


async def peak(app: App) -> int:
    """Return the bytes that one request has in use at most."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    await call(app, *GET)
    return tracemalloc.get_traced_memory()[1] - before


async def blocks(app: App, requests: int) -> float:
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(requests):
        await call(app, *GET)
    gc.collect()
    return (sys.getallocatedblocks() - before) / requests


async def measure(app: App, requests: int) -> dict[str, float]:
    await blocks(app, WARM_UP)
    kept = await blocks(app, requests)
    tracemalloc.start()
    await peak(app)
    peaks = [await peak(app) for _ in range(requests)]
    tracemalloc.stop()
    return {"peak, kB": statistics.median(peaks) / 1000, "blocks kept": max(0.0, kept)}


def measure_named(name: str, requests: int) -> dict[str, float]:
    with output():
        return asyncio.run(measure(apps.find(name).make(UNLIMITED), requests))


def table(names: tuple[str, ...], requests: int) -> Table:
    return Table(
        name="allocations",
        title="Memory that one request allocates",
        unit="peak while it runs, and blocks that stay afterwards",
        rows={name: in_another_process(measure_named, name, requests) for name in names},
        instead_of={name: WHOLE for name in names if name not in {BARE, WHOLE}},
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    show([table(NAMES, options.requests)], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
