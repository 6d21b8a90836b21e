"""Throughput and latency over the wire: uvicorn with one worker, uvloop and httptools, for whole assemblies.

    python benchmarks/over_the_wire.py [--rounds 5]

All servers run from the start, and take turns. In a round, wrk keeps 16 connections busy for two seconds: requests per
second, and per second of CPU time of the server, which other load on the machine changes less. Then requests are sent
at a fixed rate that every server can hold, for latencies. A ratio is the median over the rounds.
"""

import re
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from asgi import scope_of
from candidates import CAREFUL, GET, TUTORIAL
from fixed_rate import CONNECTIONS, latencies, percentile
from ours import BARE, WHOLE
from tables import Table, parser_of, show

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from processes import Process, free_port, running

NAMES = (BARE, WHOLE, CAREFUL, TUTORIAL, "lite-bootstrap")
THROUGHPUT_SECONDS, LATENCY_SECONDS = 2, 4  # of a round
RATE = 100  # requests per second, which every server can hold
UVICORN = ("--loop", "uvloop", "--http", "httptools", "--no-access-log", "--no-proxy-headers", "--log-level", "warning")
HEADERS = {name.decode().title(): value.decode() for name, value in scope_of(*GET)["headers"]}


def server(stack: ExitStack, name: str) -> Process:
    port = free_port()
    command = ("uvicorn", "--factory", "serve:app", "--port", str(port), *UVICORN)
    return stack.enter_context(running(*command, directory=HERE, port=port, BENCHMARK_APP=name))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process that have not ended."""
    nanoseconds = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def throughput(process: Process) -> tuple[float, float]:
    """Return requests per second, and per CPU second of the server."""
    headers = [part for name, value in HEADERS.items() for part in ("--header", f"{name}: {value}")]
    load = ("--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{THROUGHPUT_SECONDS}s")
    before = cpu_seconds(process.pid)
    report = subprocess.run(
        ["wrk", *load, *headers, f"http://127.0.0.1:{process.port}{GET.path}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    used = cpu_seconds(process.pid) - before
    done = re.search(r"(\d+) requests in ([\d.]+)s", report)
    if done is None or "Non-2xx" in report:
        raise SystemExit(report)
    return int(done[1]) / float(done[2]), int(done[1]) / used


def request_of_bytes() -> bytes:
    lines = [f"GET {GET.path} HTTP/1.1", *(f"{name}: {value}" for name, value in HEADERS.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def throughputs(servers: dict[str, Process], rounds: int) -> dict[str, dict[str, float]]:
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, process in servers.items():
            measured[name].append(throughput(process))
    rows = {}
    for name, own in measured.items():
        pairs = list(zip(own, measured[BARE], strict=True))
        rows[name] = {
            "requests/s": statistics.median(rate for rate, _ in own),
            "requests/s, ratio": statistics.median(mine[0] / base[0] for mine, base in pairs),
            "requests/CPU s, ratio": statistics.median(mine[1] / base[1] for mine, base in pairs),
        }
    return rows


def table(names: tuple[str, ...], rounds: int) -> Table:
    with ExitStack() as stack:
        servers = {name: server(stack, name) for name in names}
        for process in servers.values():
            latencies(process.port, request_of_bytes(), RATE, 1)  # fills every cache
        notes: tuple[str, ...] = ()
        rows: dict[str, dict[str, float]] = {name: {} for name in servers}
        if shutil.which("wrk"):
            rows = throughputs(servers, rounds)
        else:
            notes = ("No throughput: wrk is not installed (apt install wrk).",)
        times: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, process in servers.items():
                times[name] += latencies(process.port, request_of_bytes(), RATE, LATENCY_SECONDS)
    for name, own in times.items():
        for share, label in ((0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")):
            rows[name][f"{label}, ms"] = percentile(own, share) * 1000
    return Table(
        name="wire",
        title="Over the wire",
        unit=f"ratios to bare FastAPI(), latencies at {RATE} requests per second",
        rows=rows,
        instead_of={name: WHOLE for name in names if name not in {BARE, WHOLE}},
        higher=("requests/s", "requests/s, ratio", "requests/CPU s, ratio"),
        notes=notes,
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    options = parser.parse_args()
    show([table(NAMES, options.rounds)], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
