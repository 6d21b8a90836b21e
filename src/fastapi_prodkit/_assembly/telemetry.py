"""Switch FastAPI's own telemetry off if nothing uses it: it costs a tenth of every small request."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import wraps
from typing import Any

from fastapi import FastAPI

__all__ = ["switch_off_if_unused"]


def switch_off_if_unused(app: FastAPI) -> None:
    """Switch FastAPI's telemetry off when the app has started, unless OpenTelemetry has a provider by then.

    A provider comes from `FastAPI(telemetry={...})`, from the environment with FASTAPI_OTEL_AUTO_CONFIGURE, or from
    code that sets a global one. A provider that is set later receives no data.
    """
    start = app.router.lifespan_context

    @asynccontextmanager
    @wraps(start)  # keeps its attributes, such as LIFESPAN_COMPOSED
    async def lifespan(running: FastAPI) -> AsyncIterator[Mapping[str, Any] | None]:
        async with start(running) as state:
            used = app._native_telemetry.enabled()  # noqa: SLF001 - there is no public way to ask
            with nullcontext() if used else _switched_off(app):
                yield state

    app.router.lifespan_context = lifespan  # type: ignore[assignment]  # Starlette's is a union of state and None


@contextmanager
def _switched_off(app: FastAPI) -> Iterator[None]:
    before = app._telemetry.copy()  # noqa: SLF001 - there is no public way to read it
    app._telemetry |= {"tracing": False, "metrics": False, "logs": False}  # noqa: SLF001 - or to switch it off
    try:
        yield
    finally:
        app._telemetry |= before  # noqa: SLF001 - restored for the next start of the app
