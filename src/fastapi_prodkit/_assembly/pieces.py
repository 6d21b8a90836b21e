"""The objects of an app: those that are passed to `create_app`, and others that are created from the settings."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute

from fastapi_prodkit._instruments import collector
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.event_loop import EventLoop
from fastapi_prodkit.health import Check, health_router
from fastapi_prodkit.logging import LostLines
from fastapi_prodkit.metrics import metrics_router
from fastapi_prodkit.rate_limit import Store
from fastapi_prodkit.rate_limit.shared import store_of
from fastapi_prodkit.sections import CorsSettings
from fastapi_prodkit.settings import Settings
from fastapi_prodkit.shutdown import Shutdown

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from fastapi_prodkit.auth import Auth
    from fastapi_prodkit.database import Database

__all__ = ["Given", "cors_settings", "make_management", "make_pieces", "make_probes"]


_DPOP_HEADERS: Final = {"allow_headers": ("DPoP",), "expose_headers": ("DPoP-Nonce", "WWW-Authenticate")}


class Given(NamedTuple):
    """The arguments of `create_app` beside the settings; the objects replace those that the settings would create."""

    checks: Mapping[str, Check] | None
    mounted_lifespans: bool
    auth: "Auth[Any] | None"
    database: "Database | None"
    store: Store | None
    registry: "CollectorRegistry | None"
    csp_policies: Mapping[str, str] | None


def make_pieces(settings: Settings, given: Given) -> dict[str, Any]:
    """Return the objects that dependencies look up, by name; objects that are not given are created."""
    pieces: dict[str, Any] = {}
    if given.store is not None:
        pieces["rate_limit"] = given.store
    elif settings.rate_limit is not None:
        pieces["rate_limit"] = store_of(settings.rate_limit, prefix=settings.service.name, registry=given.registry)
    if given.auth is not None:
        pieces["auth"] = given.auth
    elif settings.auth is not None:
        from fastapi_prodkit.auth import Auth  # noqa: PLC0415 - needs an extra

        pieces["auth"] = Auth(settings.auth, store=pieces.get("rate_limit"), registry=given.registry)
    if given.database is not None:
        pieces["database"] = given.database
    elif settings.database is not None:
        from fastapi_prodkit.database import Database  # noqa: PLC0415 - needs an extra

        pieces["database"] = Database(settings.database, registry=given.registry)
    if settings.event_loop is not None:
        pieces["event_loop"] = EventLoop(settings.event_loop, registry=given.registry)
    if settings.shutdown is not None:
        pieces["shutdown"] = Shutdown(settings.shutdown)
    return pieces


def cors_settings(settings: Settings) -> CorsSettings | None:
    """Return the section of CORS; if tokens may be bound to keys, scripts can send proofs and read the nonce."""
    cors = settings.cors
    if cors is None or settings.auth is None or settings.auth.dpop == "off":
        return cors
    return cors.model_copy(update={name: (*getattr(cors, name), *more) for name, more in _DPOP_HEADERS.items()})


def make_probes(settings: Settings, pieces: Mapping[str, Any], given: Given) -> list[APIRouter]:
    """Return the routers of the probes and of the metrics."""
    routers = []
    if settings.health is not None:
        ours: dict[str, Check] = {}
        if "database" in pieces:
            from fastapi_prodkit.database.readiness import readiness_checks  # noqa: PLC0415 - needs an extra

            ours = readiness_checks(pieces["database"], settings.database)
        if "auth" in pieces:
            ours["auth"] = pieces["auth"].check
        every = ChainMap(cast("dict[str, Check]", given.checks or {}), ours)
        shutdown = pieces.get("shutdown")
        draining = shutdown.draining if shutdown is not None else None
        warning = pieces["event_loop"].warning if "event_loop" in pieces else None
        routers.append(
            health_router(settings.health, checks=every, draining=draining, warning=warning, registry=given.registry)
        )
    if settings.metrics is not None:
        routers.append(metrics_router(settings.metrics, registry=given.registry))
        if settings.log is not None:
            collector(LostLines, given.registry)
    return routers


def make_management(routes: Sequence[BaseRoute]) -> FastAPI:
    """Return the app that serves the management routes, without the user's middleware, dependencies and handlers.

    So a load balancer, for example, needs no authentication for its probes.
    """
    management = FastAPI(openapi_url=None, telemetry={"tracing": False, "metrics": False, "logs": False})
    management.router.routes.extend(routes)
    add_problem_handlers(management)
    return management
