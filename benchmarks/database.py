"""Throughput of our session handling on a real PostgreSQL, as a ratio to hand-written SQLAlchemy and to its peers.

    python benchmarks/database.py [--seconds 10] [--check]

64 clients call each app through its ASGI interface: two reads by primary key, then an update that is committed before
the response leaves. The apps take turns of half a second in one process, so that a busy machine slows all of them
alike; a ratio is the median over the rounds. With --check the exit code is 1 if ours is slower than the hand-written
session that keeps the same promise (a connection is tested before use), if a request failed, or if a connection is
left.

PostgreSQL comes from tests/postgres.py. advanced-alchemy takes part where it is installed.
"""

import asyncio
import importlib.util
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from postgres import postgres
from tables import Table, parser_of, show

CLIENTS = 64
ROUND = 0.5  # seconds
ROWS = 1000
POOL = {"pool_size": 10, "max_overflow": 10, "pool_timeout": 30.0}
OURS, HAND_WRITTEN = "fastapi-prodkit", "hand-written, pre-ping"
TOLERANCE = 0.97  # what two runs of the same code differ by

Make = Callable[[str], FastAPI]


class Base(DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int]


def with_routes(app: FastAPI, session_of: Any) -> FastAPI:
    @app.get("/items/{item_id}")
    async def read(item_id: int, session: session_of) -> int:
        return (await session.scalars(select(Item.price).where(Item.id == item_id))).one()

    @app.post("/items/{item_id}")
    async def write(item_id: int, session: session_of) -> int:
        raised = update(Item).where(Item.id == item_id).values(price=Item.price + 1).returning(Item.price)
        return (await session.scalars(raised)).one()

    return app


def ours(url: str) -> FastAPI:
    from fastapi_prodkit.database import Database, SessionDep
    from fastapi_prodkit.sections import DatabaseSettings

    database = Database(DatabaseSettings(url=url, ssl="off", **POOL))
    app = FastAPI(lifespan=database.lifespan)
    app.state.database = database
    return with_routes(app, SessionDep)


def hand_written(*, pre_ping: bool) -> Make:
    def make(url: str) -> FastAPI:
        engine = create_async_engine(asyncpg_url(url), pool_pre_ping=pre_ping, **POOL)
        sessionmaker = async_sessionmaker(engine, expire_on_commit=False)

        async def get_session() -> AsyncIterator[AsyncSession]:
            async with sessionmaker() as session:
                yield session
                await session.commit()

        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            yield
            await engine.dispose()

        return with_routes(FastAPI(lifespan=lifespan), Annotated[AsyncSession, Depends(get_session, scope="function")])

    return make


def advanced_alchemy(url: str) -> FastAPI:
    from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, AsyncSessionConfig, SQLAlchemyAsyncConfig
    from advanced_alchemy.extensions.starlette import EngineConfig

    config = SQLAlchemyAsyncConfig(
        connection_string=asyncpg_url(url),
        commit_mode="autocommit",
        session_config=AsyncSessionConfig(expire_on_commit=False),
        engine_config=EngineConfig(**POOL, pool_pre_ping=True),
    )
    app = FastAPI()
    alchemy = AdvancedAlchemy(config=config, app=app)
    provide = alchemy.provide_session()

    return with_routes(app, Annotated[AsyncSession, Depends(provide)])


def asyncpg_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+asyncpg://", 1)


def candidates() -> dict[str, Make]:
    makers: dict[str, Make] = {
        HAND_WRITTEN: hand_written(pre_ping=True),
        "hand-written, no pre-ping": hand_written(pre_ping=False),
        OURS: ours,
    }
    if importlib.util.find_spec("advanced_alchemy"):
        makers["advanced-alchemy"] = advanced_alchemy
    return makers


async def call(app: FastAPI, method: str, path: str) -> bool:
    statuses = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"api.example.com")],
        "client": ("10.0.0.5", 40000),
        "server": ("10.0.0.9", 8000),
        "state": {},
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    try:
        await app(scope, receive, send)
    except Exception as error:  # noqa: BLE001 - counted, whatever it is
        print(repr(error), file=sys.stderr)
        return False
    return statuses == [200]


async def round_of(app: FastAPI, seconds: float) -> tuple[float, int]:
    """Return requests per CPU second, which other load on the machine does not change, and the failed ones."""
    end = time.perf_counter() + seconds
    done = failed = 0

    async def client(number: int) -> None:
        nonlocal done, failed
        turn = 0
        while time.perf_counter() < end:
            turn += 1
            method = "GET" if turn % 3 else "POST"
            good = await call(app, method, f"/items/{(number * 7 + turn * 13) % ROWS}")
            done += 1
            failed += not good

    started = time.process_time()
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return done / (time.process_time() - started), failed


async def measure(url: str, seconds: float) -> dict[str, tuple[float, float, int, int]]:
    """Return for each app: median ratio to the first one, requests per CPU second, failures, connections left."""
    apps = {name: make(url) for name, make in candidates().items()}
    rates: dict[str, list[float]] = {name: [] for name in apps}
    failures = dict.fromkeys(apps, 0)
    left = dict.fromkeys(apps, 0)
    async with AsyncExitStack() as stack:
        closing = {}
        for name, app in apps.items():
            lifespan = await stack.enter_async_context(AsyncExitStack())
            await lifespan.enter_async_context(app.router.lifespan_context(app))
            closing[name] = lifespan
            await round_of(app, 0.3)  # fills the pool and every cache
        rounds = max(3, round(seconds / ROUND))
        for number in range(rounds):
            print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
            for name, app in apps.items():
                rate, failed = await round_of(app, ROUND)
                rates[name].append(rate)
                failures[name] += failed
        print(file=sys.stderr)
        for name, lifespan in closing.items():
            before = await connections(url)
            await lifespan.aclose()
            left[name] = POOL["pool_size"] - (before - await connections(url))
    base = next(iter(rates.values()))
    return {
        name: (
            statistics.median(a / b for a, b in zip(own, base, strict=True)),
            statistics.median(own),
            failures[name],
            max(0, left[name]),
        )
        for name, own in rates.items()
    }


async def connections(url: str) -> int:
    engine = create_async_engine(asyncpg_url(url))
    async with engine.connect() as connection:
        await asyncio.sleep(0.2)  # PostgreSQL takes a moment to forget a backend
        query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        count = int((await connection.execute(text(query))).scalar_one())
    await engine.dispose()
    return count - 1  # this one


async def fill(url: str) -> None:
    engine = create_async_engine(asyncpg_url(url))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO items SELECT n, n FROM generate_series(0, :last) n"), {"last": ROWS})
    await engine.dispose()


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="how long each app is measured")
    parser.add_argument("--check", action="store_true", help="fail if ours is slower, or leaves something behind")
    options = parser.parse_args()

    with postgres() as server:
        asyncio.run(fill(server.url()))
        results = asyncio.run(measure(server.url(), options.seconds))

    columns = ("requests/CPU s, ratio", "requests/CPU s", "failed", "connections left")
    rows = {name: dict(zip(columns, cells, strict=True)) for name, cells in results.items()}
    peers = {name: OURS for name in rows if name != OURS and "no pre-ping" not in name}
    show([Table("database", "A session on PostgreSQL", "of 64 clients", rows, peers, columns[:2])], options.json)
    ratio, _, failed, left = results[OURS]
    return int(options.check and (ratio < TOLERANCE or failed > 0 or left > 0))


if __name__ == "__main__":
    sys.exit(main())
