"""What a second handler on the root logger costs per request, as a ratio to one handler, measured in one process.

    python benchmarks/log_handlers.py [--rounds 100] [--limit 1.35]

With one handler the access line is written without a LogRecord; with a second one there is a record, and two lines. The
rounds are interleaved and short, and the fastest third of each is compared, in CPU time: what else runs on the machine
spoils the others. With --limit the exit code is 1 if a request with a second handler costs more.
"""

import asyncio
import logging
import os
import sys
import time

from asgi import call, fastest_third, output
from fastapi import FastAPI
from in_process import REQUESTS
from ours import whole
from tables import Table, parser_of, show

CALLS_PER_ROUND = 10


def second_handlers() -> dict[str, list[logging.Handler]]:
    text = logging.StreamHandler(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - lives as long as main
    text.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    return {"one handler": [], "and NullHandler": [logging.NullHandler()], "and StreamHandler": [text]}


async def time_calls(app: FastAPI, kind: str, further: list[logging.Handler]) -> float:
    """Return CPU seconds per call with these handlers on the root logger as well."""
    logging.root.handlers.extend(further)
    start = time.process_time()
    for _ in range(CALLS_PER_ROUND):
        await call(app, *REQUESTS[kind])
    seconds = time.process_time() - start
    for handler in further:
        logging.root.removeHandler(handler)
    return seconds / CALLS_PER_ROUND


async def measure(app: FastAPI, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each kind of request and each second handler the ratio to one handler."""
    candidates, results = second_handlers(), {}
    for kind in ("GET", "POST"):
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, further in candidates.items():
                times[name].append(await time_calls(app, kind, further))
        fast = {name: fastest_third(own) for name, own in times.items()}
        results[kind] = {name: seconds / fast["one handler"] for name, seconds in fast.items()}
    return results


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="rounds per kind of request")
    parser.add_argument("--limit", type=float, help="fail if a second handler makes a request cost more times as much")
    options = parser.parse_args()

    with output():
        results = asyncio.run(measure(whole(), options.rounds))

    rows = {name: {kind: ratios[name] for kind, ratios in results.items()} for name in second_handlers()}
    show([Table("log-handlers", "A second handler on the root logger", "times one handler", rows)], options.json)
    worst = max(ratio for ratios in results.values() for ratio in ratios.values())
    print(f"\nwith a second handler a request costs at most {worst:.2f} times what it costs with one")
    return int(options.limit is not None and worst > options.limit)


if __name__ == "__main__":
    sys.exit(main())
