"""What is compared: how to make an app, and its jobs, each of which is proven before the app is measured."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from asgi import App, Output, Request, answer, call

CAREFUL, TUTORIAL, LITESTAR = "careful assembly", "tutorial assembly", "Litestar with its built-ins"

UNLIMITED = "100000000/minute"
ONE_A_DAY = "1/day"
ORIGIN = "https://app.example.com"
PROXIES = "10.0.0.0/8"
GET = Request("GET", "/items/42")
LIMITS = "rate limit"  # the one job whose proof is measured, too: 429
LINES = 20  # some peers keep ten lines in memory

Proof = Callable[[App, Output], Awaitable[bool]]


class Candidate(NamedTuple):
    """An app to be measured.

    Args:
        make: Returns the app; the argument is its limit for each client, which apps without the job ignore.
        jobs: Names of `PROOFS`.
        instead_of: The app of ours that does the same job.
    """

    make: Callable[[str], Any]
    jobs: tuple[str, ...] = ()
    instead_of: str = ""


def sends(name: bytes, value: bytes | None = None) -> Proof:
    async def proof(app: App, _output: Output) -> bool:
        headers = (await answer(app, GET)).headers
        return headers.get(name) == value if value else name in headers

    return proof


def refuses(status: int, request: Request, **entries: Any) -> Proof:
    async def proof(app: App, _output: Output) -> bool:
        return (await answer(app, request, **entries)).status == status

    return proof


async def changes_client(app: App, _output: Output) -> bool:
    return (await answer(app, GET)).client == "198.51.100.7"


async def logs(app: App, output: Output) -> bool:
    with output.kept() as text:
        for _ in range(LINES):
            await call(app, *GET)
        return sum(GET.path in line for line in text().splitlines()) >= LINES // 2


async def counts(app: App, _output: Output) -> bool:
    before = requests_counted()
    await call(app, *GET)
    return requests_counted() > before


def requests_counted() -> float:
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if "request" in sample.name and sample.name.endswith(("_total", "_count"))
    )


async def records_spans(app: App, _output: Output) -> bool:
    await call(app, *GET)
    return bool(app.state.spans())


PROOFS: dict[str, Proof] = {
    "access log": logs,
    "allowed hosts": refuses(400, GET, headers=[(b"host", b"elsewhere.example.com")]),
    "body size": refuses(413, Request("POST", "/items", b"", ((b"content-length", b"10000000000"),))),
    "client address": changes_client,
    "CORS": sends(b"access-control-allow-origin", ORIGIN.encode()),
    "head size": refuses(431, GET._replace(headers=((b"x-header", b"value"),) * 1000)),
    "metrics": counts,
    "request id": sends(b"x-request-id"),
    "security headers": sends(b"x-content-type-options"),
    "spans": records_spans,
}


async def prove(name: str, candidate: Candidate, app: App, output: Output) -> None:
    """Raise SystemExit if the app does not do each of its jobs."""
    for job in candidate.jobs:
        if job != LIMITS and not await PROOFS[job](app, output):
            raise SystemExit(f"{name} does not do its job: {job}")
