"""What 200 000 hostile requests leave in memory: from 50 000 addresses, half of them for 20 000 unknown paths.

    python benchmarks/hostile.py [--requests 200000]

Each app is in a process of its own, and called through its ASGI interface. The other half of the requests is for one
route with 20 000 different parameters. RSS is that of the process after a garbage collection; series are the samples of
its metrics.
"""

import asyncio
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apps
from asgi import App, Request, answer, call, in_another_process, output
from candidates import CAREFUL, LITESTAR, UNLIMITED
from ours import BARE, WHOLE
from prometheus_client import REGISTRY
from tables import Table, parser_of, show

ADDRESSES, PATHS = 50_000, 20_000
NAMES = (BARE, WHOLE, CAREFUL, "SlowAPIASGIMiddleware", LITESTAR)


def resident_megabytes() -> float:
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def series() -> int:
    return sum(len(family.samples) for family in REGISTRY.collect())


async def attack(app: App, requests: int) -> None:
    for number in range(requests):
        each = number % PATHS
        path = f"/wp-content/{each}.php" if number % 2 else f"/items/{each}"
        address = number % ADDRESSES
        await answer(app, Request("GET", path), client=(f"198.18.{address >> 8}.{address & 255}", 40000))


async def measure(app: App, requests: int) -> dict[str, float]:
    for _ in range(200):
        await call(app, "GET", "/items/42")
        await call(app, "GET", "/unknown")
    memory, before = resident_megabytes(), series()
    await attack(app, requests)
    return {"RSS, MB more": resident_megabytes() - memory, "series more": series() - before}


def measure_named(name: str, requests: int) -> dict[str, float]:
    with output():
        return asyncio.run(measure(apps.find(name).make(UNLIMITED), requests))


def table(names: tuple[str, ...], requests: int) -> Table:
    with ThreadPoolExecutor(2) as two:  # it is memory that counts
        measured = two.map(lambda name: in_another_process(measure_named, name, requests), names)
        rows = dict(zip(names, measured, strict=True))
    return Table(
        name="hostile",
        title=f"Memory after {requests} hostile requests",
        unit="in a process that has served 400",
        rows=rows,
        instead_of={name: WHOLE for name in names if name not in {BARE, WHOLE}},
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args()
    show([table(NAMES, options.requests)], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
