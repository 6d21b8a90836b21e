"""What a user's type checker infers; read by mypy (`make types`), never run."""

from collections.abc import Sequence
from typing import Annotated, Any, assert_type

from fastapi import APIRouter, Depends, FastAPI
from fastapi.requests import HTTPConnection
from httpx2 import AsyncClient
from prometheus_client import CollectorRegistry
from pydantic import SecretStr
from structlog.processors import TimeStamper

from fastapi_prodkit import Settings, __version__, create_app, install
from fastapi_prodkit.access_log import AccessLogMiddleware
from fastapi_prodkit.allowed_hosts import AllowedHostsMiddleware
from fastapi_prodkit.app import Edge, Layer, LayerStack
from fastapi_prodkit.auth import ApiKey, Auth, CurrentUser, OptionalUser, User
from fastapi_prodkit.body_limit import BodyLimitMiddleware
from fastapi_prodkit.cors import CORSMiddleware
from fastapi_prodkit.database import Database
from fastapi_prodkit.deadline import DeadlineMiddleware
from fastapi_prodkit.errors import ErrorBoundaryMiddleware, ProblemError, add_problem_handlers
from fastapi_prodkit.exceptions import CheckWarning, SettingsError
from fastapi_prodkit.health import HealthCheck, health_router
from fastapi_prodkit.logging import bind, configure_logging
from fastapi_prodkit.metrics import MetricsMiddleware, metrics_router
from fastapi_prodkit.proxy_headers import ProxyHeadersMiddleware
from fastapi_prodkit.rate_limit import (
    Key,
    Limit,
    MemoryStore,
    Quota,
    RateLimit,
    RateLimitMiddleware,
    Store,
    by_user,
)
from fastapi_prodkit.request_id import RequestIDMiddleware, current_request_id
from fastapi_prodkit.routing import index_routes
from fastapi_prodkit.sections import AuthSettings, DatabaseSettings, LimitsSettings, RateLimitSettings
from fastapi_prodkit.security_headers import SecurityHeadersMiddleware
from fastapi_prodkit.testing import ClientAs, HeadersAs


class ShopSettings(Settings):
    page_size: int = 20


async def check() -> None:
    raise CheckWarning("slow")


settings = ShopSettings(rate_limit=None)
database = Database(DatabaseSettings(url=SecretStr("sqlite://")))
app = create_app(settings, routers=[APIRouter()], checks={"stock": check}, title="Shop", docs_url=None)
create_app(settings, database=database, store=MemoryStore(), registry=CollectorRegistry())
create_app(settings, titel="Shop")  # type: ignore[call-arg]  # misspelt
create_app(settings, title=7)  # type: ignore[arg-type]  # a text

assert_type(__version__, str)
assert_type(app, FastAPI)
assert_type(settings.page_size, int)
assert_type(settings.rate_limit, RateLimitSettings | None)
assert_type(current_request_id(), str | None)
assert_type(health_router(checks={"stock": check, "model": HealthCheck(check, startup=True)}), APIRouter)
assert_type(metrics_router(), APIRouter)
assert_type(SettingsError({}).problems, dict[str, str])
assert_type(ProblemError(404, "There is no such item.", item=7).status_code, int)
assert_type(ProblemError(404).title, str)
assert_type(ProblemError(404, item=7).extensions, dict[str, Any])

configure_logging(service="shop", processors=[TimeStamper(fmt="iso")])
bind(customer="c-4711", attempt=2)


class Unlimited:
    async def hit(self, limits: Sequence[Limit], key: str, cost: int = 1) -> list[Quota]:
        return [(limit, limit.amount, limit.seconds) for limit in limits]


async def by_customer(connection: HTTPConnection) -> str | None:
    return connection.headers.get("x-customer")


store: Store = Unlimited()
key: Key = by_customer


class Marking(Layer):
    may_answer = False

    def on_request(self, exchange: Any) -> None:
        exchange.response_headers[b"x-mark"] = b"1"


copied = FastAPI()
Edge([RequestIDMiddleware(copied), Marking()], installed={}).put_around(copied)
stack = LayerStack([Marking()], copied)

existing = FastAPI()
install(existing, settings, database=database, store=store, registry=CollectorRegistry())
add_problem_handlers(existing)
index_routes(existing)
existing.add_middleware(AccessLogMiddleware, exempt={"/health"})
existing.add_middleware(AllowedHostsMiddleware)
existing.add_middleware(BodyLimitMiddleware, LimitsSettings(max_body_size=None))
existing.add_middleware(CORSMiddleware)
existing.add_middleware(ErrorBoundaryMiddleware)
existing.add_middleware(MetricsMiddleware)
existing.add_middleware(ProxyHeadersMiddleware)
existing.add_middleware(RateLimitMiddleware, RateLimitSettings(default="10/minute"), store=MemoryStore())
existing.add_middleware(RequestIDMiddleware)
existing.add_middleware(SecurityHeadersMiddleware)
existing.add_middleware(AllowedHostsMiddleware, allowed=["api.example.com"], exempt={"/health"})
existing.add_middleware(AllowedHostsMiddleware, allowed_hosts=["api.example.com"], www_redirect=False)
existing.add_middleware(CORSMiddleware, settings.cors, allow_origins=["https://app.example.com"], max_age=60)
existing.add_middleware(ProxyHeadersMiddleware, trusted_hosts="10.0.0.0/8")
existing.add_middleware(RateLimitMiddleware, default="10/minute", strategy="moving-window")
existing.add_middleware(CORSMiddleware, orgins=["https://app.example.com"])  # type: ignore[call-arg]  # misspelt
existing.add_middleware(DeadlineMiddleware, request_timeout="10")  # type: ignore[arg-type]  # a number
existing.add_middleware(DeadlineMiddleware, max_body_size=10)  # type: ignore[call-arg]  # another middleware's


@existing.post("/login", dependencies=[Depends(RateLimit("5/minute", name="login", key=key))])
async def login(counted: Annotated[None, Depends(RateLimit("2/second"))]) -> str | None:
    return current_request_id()


class Employee(User):
    @property
    def email(self) -> str:
        return str(self.claims["email"])


async def find_key(hashed: str) -> ApiKey | None:
    return None


by_token = Auth(AuthSettings(issuer=("https://login.example.com/",), audience=("orders",)))
by_key = Auth(settings.auth, find_key=find_key, user=Employee, hierarchy=["admin>editor"], default="optional")
by_bound_token = Auth(settings.auth, store=MemoryStore())
protected = FastAPI(lifespan=by_token.lifespan)
create_app(settings, lifespan=by_token.lifespan, checks={"auth": by_token.check})


@protected.get("/known", dependencies=[Depends(RateLimit("5/minute", key=by_user))])
async def known(caller: CurrentUser, visitor: OptionalUser) -> None:
    assert_type(caller, User)
    assert_type(visitor, User | None)


async def test_of_a_service(client_as: ClientAs, headers_as: HeadersAs) -> None:
    assert_type(headers_as("alice", roles=["admin"]), dict[str, str])
    headers_as("alice", role="admin")  # type: ignore[call-arg]  # misspelt
    async with client_as("alice", scopes={"read"}, claims={"email": "a"}) as client:
        assert_type(client, AsyncClient)


@protected.get("/me")
async def me(
    connection: HTTPConnection,
    user: Annotated[User, Depends(by_token.current_user)],
    caller: Annotated[Employee | None, Depends(by_key.authenticate)],
) -> str:
    assert_type(await by_token.current_user(connection), User)
    assert_type(await by_key.current_user(connection), Employee)
    assert_type(await by_key.authenticate(connection), Employee | None)
    assert_type(by_key.known_user(connection.scope), Employee | None)
    return user.id if caller is None else caller.email
