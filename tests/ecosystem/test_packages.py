"""Packages that use FastAPI's public API: dependencies, routers, mounts, middleware and lifespans."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.testclient import TestClient
from redis_servers import redis_or_skip

from fastapi_prodkit import Settings, create_app, install


@pytest.fixture
def complete(way):
    """Return a function that makes an app, adds to it, and returns it complete."""

    def complete(add, **keywords):
        settings = Settings(environment="dev", log=None)
        app = create_app(settings, **keywords) if way == "create_app" else FastAPI(**keywords)
        add(app)
        if way == "install":
            install(app, settings)
        return app

    return complete


def test_fastapi_pagination_works_for_later_routes(complete):
    """A route that is included after `add_pagination` returns pages."""
    from fastapi_pagination import Page, add_pagination, paginate
    from fastapi_pagination.utils import disable_installed_extensions_check

    disable_installed_extensions_check()  # it recommends its integration with SQLAlchemy
    router = APIRouter()

    @router.get("/numbers")
    async def numbers() -> Page[int]:
        return paginate(range(5))

    def add(app):
        add_pagination(app)
        app.include_router(router)

    with TestClient(complete(add)) as client:
        page = client.get("/numbers", params={"size": 2}).json()

    assert (page["items"], page["total"]) == ([0, 1], 5)


def test_fastapi_limiter_reads_app_routes(complete):
    """At each request."""
    from fastapi_limiter.depends import RateLimiter
    from pyrate_limiter import Duration, Limiter, Rate

    limiter = RateLimiter(limiter=Limiter(Rate(1, Duration.MINUTE)))

    def add(app):
        app.add_api_route("/limited", lambda: 1, dependencies=[Depends(limiter)])

    with TestClient(complete(add)) as client:
        assert [client.get("/limited").status_code for _ in range(2)] == [200, 429]


def test_asgi_correlation_id_uses_our_id(complete):
    """The package asgi-correlation-id uses the request id that the response carries, and adds no second one."""
    from asgi_correlation_id import CorrelationIdMiddleware, correlation_id

    def add(app):
        app.add_middleware(CorrelationIdMiddleware, validator=None)

        @app.get("/id")
        async def read_id():
            return correlation_id.get()

    with TestClient(complete(add)) as client:
        response = client.get("/id")
        sent = client.get("/id", headers={"X-Request-ID": "0123456789abcdef"})

    assert response.headers.get_list("x-request-id") == [response.json()]
    assert sent.json() == "0123456789abcdef"


def test_strawberry_router_answers(complete):
    """Strawberry's GraphQL router answers queries when the app includes it under a prefix."""
    import strawberry
    from strawberry.fastapi import GraphQLRouter

    @strawberry.type
    class Query:
        @strawberry.field
        def answer(self) -> int:
            return 42

    def add(app):
        app.include_router(GraphQLRouter(strawberry.Schema(Query)), prefix="/graphql")

    with TestClient(complete(add)) as client:
        assert client.post("/graphql", json={"query": "{ answer }"}).json()["data"] == {"answer": 42}


def test_fastapi_users_registers_a_user(complete, tmp_path):
    """A request to the registration route of fastapi-users stores the user in the database."""
    from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
    from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
    from fastapi_users.db import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.orm import DeclarativeBase

    class Base(DeclarativeBase): ...

    class User(SQLAlchemyBaseUserTableUUID, Base): ...

    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/users.db")

    class Manager(UUIDIDMixin, BaseUserManager[User, object]): ...

    async def manager():
        async with AsyncSession(engine) as session:
            yield Manager(SQLAlchemyUserDatabase(session, User))

    @asynccontextmanager
    async def lifespan(_app):
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield {"rows": rows}
        await engine.dispose()

    async def rows():
        async with AsyncSession(engine) as session:
            return list(await session.scalars(text("SELECT email FROM user")))

    backend = AuthenticationBackend("jwt", BearerTransport("login"), lambda: JWTStrategy("s" * 32, 60))
    users = FastAPIUsers(manager, [backend])

    def add(app):
        app.include_router(users.get_register_router(schemas.BaseUser, schemas.BaseUserCreate))
        app.add_api_route("/users", rows)

    with TestClient(complete(add, lifespan=lifespan)) as client:
        created = client.post("/register", json={"email": "ada@example.com", "password": "correct horse"})
        assert created.status_code == 201, created.text
        assert client.get("/users").json() == ["ada@example.com"]


def test_opentelemetry_instruments_our_engine(complete, way):
    """A query through the engine of `Database` produces an OpenTelemetry span."""
    from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    from fastapi_prodkit.database import Database
    from fastapi_prodkit.sections import DatabaseSettings

    async def query():
        database = Database(DatabaseSettings(url="sqlite://"))
        engine = create_async_engine("sqlite+aiosqlite://") if way == "bare" else database.engine
        instrumentor.instrument(engine=engine.sync_engine, tracer_provider=tracing)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        await engine.dispose()

    spans, tracing, instrumentor = InMemorySpanExporter(), TracerProvider(), SQLAlchemyInstrumentor()
    tracing.add_span_processor(SimpleSpanProcessor(spans))

    asyncio.run(query())
    instrumentor.uninstrument()

    assert "SELECT" in [span.name.split(" ")[0] for span in spans.get_finished_spans()]


def test_arq_enqueues_a_job(complete):
    """With the redis version that it requires."""
    from arq import create_pool
    from arq.connections import RedisSettings

    with redis_or_skip() as server:

        async def enqueue():
            pool = await create_pool(RedisSettings(port=server.port))
            job = await pool.enqueue_job("work", 1)
            await pool.aclose()
            return job is not None

        with TestClient(complete(lambda app: app.add_api_route("/jobs", enqueue))) as client:
            assert client.get("/jobs").json() is True
