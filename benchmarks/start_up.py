"""How long a server takes from the start of its process until it has answered the first request.

    python benchmarks/start_up.py [--rounds 3]

uvicorn serves each app. The apps take turns, and the medians count: seconds, and CPU seconds of the server.
"""

import statistics
import sys
import time
from contextlib import ExitStack

from candidates import CAREFUL, LITESTAR, TUTORIAL
from fixed_rate import latencies
from ours import BARE, WHOLE
from over_the_wire import cpu_seconds, request_of_bytes, server
from tables import Table, parser_of, show

NAMES = (BARE, WHOLE, CAREFUL, TUTORIAL, "lite-bootstrap", "microbootstrap", LITESTAR)


def first_answer(name: str) -> tuple[float, float]:
    """Return seconds and CPU seconds."""
    start = time.perf_counter()
    with ExitStack() as stack:
        process = server(stack, name)
        latencies(process.port, request_of_bytes(), rate=1, seconds=1)
        return time.perf_counter() - start, cpu_seconds(process.pid)


def table(names: tuple[str, ...], rounds: int) -> Table:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, own in times.items():
            own.append(first_answer(name))
    rows = {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in own),
            "CPU seconds": statistics.median(used for _, used in own),
        }
        for name, own in times.items()
    }
    return Table(
        name="start-up",
        title="Start-up until the first answer",
        unit="seconds",
        rows=rows,
        instead_of={name: WHOLE for name in names if name not in {BARE, WHOLE}},
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server")
    options = parser.parse_args()
    show([table(NAMES, options.rounds)], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
