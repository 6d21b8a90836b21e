"""Limits in a shared store: a real Redis, and outages of it."""

import asyncio
import gc
import socket
import ssl
import statistics
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import httpx2 as httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.testclient import TestClient
from faults import proxy
from limits.aio.storage import Storage
from processes import free_port, running
from prometheus_client import CollectorRegistry
from redis_servers import redis_or_skip

from fastapi_prodkit import _extras, create_app
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError, ProblemError
from fastapi_prodkit.rate_limit import MemoryStore, RateLimit, RateLimitMiddleware, SharedStore
from fastapi_prodkit.rate_limit.limits import Limit, refused
from fastapi_prodkit.rate_limit.remote import reason_about_key
from fastapi_prodkit.rate_limit.time_limit import TimeLimit
from fastapi_prodkit.sections import RateLimitSettings
from fastapi_prodkit.settings import Settings

pytest.importorskip("redis", reason="needs the extra: pip install 'fastapi-prodkit[redis]'")


@pytest.fixture(scope="module")
def server():
    with redis_or_skip() as server:
        yield server


@pytest.fixture
def url(server):
    """The URL of the running, empty server."""
    server.kill()
    server.start()
    return server.url()


@pytest.fixture(autouse=True)
def _avoid_window_ends():
    """Wait at the end of a fixed window of Redis; the limits here are per hour."""
    left = 3600 - time.time() % 3600
    if left < 15:  # seconds
        time.sleep(left)


def store_of(url, registry=None, *, storage_timeout=5, **options):
    """Make a store with a long time-out, because the machine may be busy."""
    settings = RateLimitSettings(storage_url=url, storage_timeout=storage_timeout, **options)
    return SharedStore(settings, registry=registry or CollectorRegistry())


def service(store, default="5/hour"):
    app = FastAPI(lifespan=store.lifespan)
    app.state.rate_limit = store
    app.add_middleware(RateLimitMiddleware, RateLimitSettings(default=default), store=store, exempt={"/health"})

    @app.get("/")
    async def read():
        return "ok"

    @app.get("/health")
    async def health():
        return "ok"

    @app.get("/limited", dependencies=[Depends(RateLimit("2/hour"))])
    async def limited():
        return "ok"

    return app


async def burst(app, count=50, path="/"):
    """Send concurrent requests; return statuses and durations."""
    transport = httpx.ASGITransport(app)

    async def one(client):
        started = time.perf_counter()
        response = await client.get(path)
        return response.status_code, time.perf_counter() - started

    async with httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=30) as client:
        return await asyncio.gather(*[one(client) for _ in range(count)])


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
async def test_limit_holds_for_two_apps_that_share_a_store(url, strategy):
    """Of fifty concurrent requests five are served."""
    stores = [store_of(url, strategy=strategy) for _ in range(2)]
    first, second = (service(store, default="5/hour") for store in stores)

    results = [*await burst(first, 25), *await burst(second, 25)]

    assert sorted(status for status, _ in results) == [200] * 5 + [429] * 45
    for store in stores:
        async with store.lifespan(None):
            pass


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
def test_headers_have_the_numbers_of_the_store(url, strategy):
    """The headers state the remaining quota and reset time of the shared store, with one item for each limit."""
    with TestClient(service(store_of(url, strategy=strategy), default="5/hour; 100/day")) as client:
        first, second = client.get("/"), client.get("/")

    assert first.headers["ratelimit-policy"] == (
        '"default-5-per-3600s";q=5;w=3600, "default-100-per-86400s";q=100;w=86400'
    )
    left = [item.split(";")[1] for item in second.headers["ratelimit"].split(", ")]
    seconds = [int(item.split("t=")[1]) for item in second.headers["ratelimit"].split(", ")]
    assert left == ["r=3", "r=98"]
    assert 0 < seconds[0] <= 3601
    assert 0 < seconds[1] <= 86_401


def test_dependency_of_one_route_is_shared_by_processes(url):
    """Two processes share one counter for an unnamed limit, because its id is derived from the route."""
    apps = [service(store_of(url), default="100/minute") for _ in range(2)]

    statuses = []
    for app in apps:
        with TestClient(app) as client:
            statuses += [client.get("/limited").status_code for _ in range(2)]

    assert statuses == [200, 200, 429, 429]


def ids_of(*limits):
    return [limit._limits[0].id for limit in limits]


def app_with(store):
    app = FastAPI()
    app.state.rate_limit = store
    return app


async def nothing():
    return "ok"


def test_limits_without_a_name_are_identified_by_their_first_route():
    """An unnamed limit has the id of the first route that uses it, so equal limits of two routes are separate."""
    app, router = app_with(store_of("memory://")), APIRouter(prefix="/inner")
    first, second, third, shared, outer = *(RateLimit("1/hour") for _ in range(4)), RateLimit("9/hour")
    app.get("/a/{number}", dependencies=[Depends(first)])(nothing)
    app.post("/a/{number}", dependencies=[Depends(second)])(nothing)
    router.get("/b", dependencies=[Depends(shared)])(nothing)
    router.get("/c", dependencies=[Depends(shared)])(nothing)
    app.include_router(router, prefix="/outer", dependencies=[Depends(outer)])

    @app.websocket("/socket", dependencies=[Depends(third)])
    async def socket(websocket: WebSocket):
        await websocket.accept()
        await websocket.close()

    paths = [("GET", "/a/1"), ("POST", "/a/1"), ("GET", "/a/2"), ("GET", "/outer/inner/c"), ("GET", "/outer/inner/b")]
    with TestClient(app) as client:
        statuses = [client.request(*each).status_code for each in paths]
        with client.websocket_connect("/socket"):
            pass

    assert statuses == [200, 200, 429, 200, 429]
    assert ids_of(first, second, third, shared, outer) == [
        "GET:/a/%7Bnumber%7D/route/1/3600",
        "POST:/a/%7Bnumber%7D/route/1/3600",
        "WEBSOCKET:/socket/route/1/3600",
        "GET:/outer/inner/b/route/1/3600",
        "GET:/outer/inner/b/route/9/3600",
    ]


def test_equal_limits_of_one_route_need_a_name():
    """The store would count them together."""

    def ask(**options):
        app = app_with(store_of("memory://"))
        limits = [
            Depends(RateLimit("5/hour", key=key, **option))
            for key, option in ((lambda _: "a", {}), (lambda _: "b", options))
        ]
        app.get("/", dependencies=limits)(nothing)
        return TestClient(app).get("/").headers["ratelimit"]

    with pytest.raises(ConfigurationError, match="count two rate limits together, both GET://route/5/3600: give one"):
        ask()
    assert ask(name="other").count("r=4") == 2


def test_equal_limits_of_mounted_apps_need_a_name():
    """Their routes have the same path within each app."""
    store, outer = store_of("memory://"), FastAPI()
    for path in ("/v1", "/v2"):
        app = app_with(store)
        app.get("/login", dependencies=[Depends(RateLimit("5/hour"))])(nothing)
        outer.mount(path, app)
    client = TestClient(outer)

    assert client.get("/v1/login").status_code == 200
    with pytest.raises(ConfigurationError, match="both GET:/login/route/5/3600"):
        client.get("/v2/login")


def test_limit_without_a_route_needs_a_name():
    """In memory it needs none."""

    def ask(store, limit):
        app = app_with(store)

        @app.get("/")
        async def read(request: Request, response: Response):
            await limit(request, response)

        with TestClient(app) as client:
            return [client.get("/").status_code for _ in range(2)]

    named = RateLimit("1/hour", name="login")

    assert ask(MemoryStore(), RateLimit("1/hour")) == [200, 429]
    assert ask(store_of("memory://"), named) == [200, 429]
    assert ids_of(named) == ["/login/1/3600"]
    with pytest.raises(ConfigurationError, match="give it a name"):
        ask(store_of("memory://"), RateLimit("1/hour"))


def test_limit_may_be_used_in_two_stores():
    """A limit keeps its id when a second store, or a custom store, counts its requests."""

    class Counted:
        def __init__(self):
            self.ids = []

        async def hit(self, limits, key, cost=1):
            self.ids += [limit.id for limit in limits]
            return [(limit, 1, 1) for limit in limits]

    limit, own = RateLimit("1/hour"), Counted()
    for store in (own, store_of("memory://"), store_of("memory://")):
        app = app_with(store)
        app.get("/", dependencies=[Depends(limit)])(nothing)
        assert TestClient(app).get("/").status_code == 200

    assert own.ids == ids_of(limit) == ["GET://route/1/3600"]


def test_name_of_the_service_begins_each_key(url):
    """Two services on one Redis count separately, because each key starts with the name of the service."""
    statuses = []
    for name in ("a", "b"):
        settings = Settings(
            environment="test",
            service={"name": name},
            rate_limit={"default": "1/hour", "storage_url": url, "storage_timeout": 5},
        )
        with TestClient(create_app(settings)) as client:
            statuses += [client.get("/nowhere").status_code for _ in range(2)]

    assert statuses == [404, 429, 404, 429]


async def test_fixed_window_takes_one_round_trip(server, url):
    """For any number of limits."""
    store = store_of(url)
    limits = [Limit(f"l{number}", 10, 60) for number in range(3)]
    await store.hit(limits, "a")
    client = store._remote().storage.bridge.storage
    before = (await client.info("stats"))["total_commands_processed"]

    await store.hit(limits[:1], "a")

    after = (await client.info("stats"))["total_commands_processed"]
    assert after - before <= 4  # the script, the two commands in it, and INFO itself
    async with store.lifespan(None):
        pass


async def test_clear_resets_all_counters(url):
    """After `clear` the shared store admits a client that had used up its quota."""
    store, limit = store_of(url), Limit("default", 1, 3600)
    before = [refused(await store.hit([limit], "a")) for _ in range(2)]

    await store.clear()

    assert before == [False, True]
    assert not refused(await store.hit([limit], "a"))
    async with store.lifespan(None):
        pass


# Servers


def commands(port, *lines):
    """Send commands to a server, and return the first answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        for line in lines:
            client.sendall(f"{line}\r\n".encode())
            answer = client.recv(4096).decode()
    return answer


def until(answers, word):
    deadline = time.monotonic() + 10
    while word not in answers():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def unix_socket(directory):
    with redis_or_skip("--unixsocket", f"{directory}/redis.sock"):
        yield f"redis+unix://{directory}/redis.sock"


@contextmanager
def cluster(directory):
    bus = str(free_port())  # by default the port plus 10000, which may be too large
    options = ("--cluster-enabled", "yes", "--cluster-port", bus, "--dir", str(directory))
    with redis_or_skip(*options, "--requirepass", "p@ss/word") as server:
        commands(server.port, "AUTH p@ss/word", "CLUSTER ADDSLOTSRANGE 0 16383")
        until(lambda: commands(server.port, "AUTH p@ss/word", "CLUSTER INFO"), "cluster_state:ok")
        yield f"redis+cluster://:p%40ss%2Fword@127.0.0.1:{server.port}"


@contextmanager
def sentinel(directory):
    with redis_or_skip() as server:
        file = directory / "sentinel.conf"
        file.write_text(f"sentinel monitor mine 127.0.0.1 {server.port} 1\n")
        with redis_or_skip(str(file), "--sentinel") as watcher:
            until(lambda: commands(watcher.port, "SENTINEL CKQUORUM mine"), "OK")
            yield f"redis+sentinel://127.0.0.1:{watcher.port}/mine"


@pytest.mark.parametrize("kind", [unix_socket, cluster, sentinel])
@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window", "moving-window"])
async def test_socket_cluster_and_sentinels_count(tmp_path, kind, strategy):
    """No connection is left open."""
    limits = [Limit("default", 2, 3600), Limit("default-2", 100, 86_400)]
    with kind(tmp_path) as url:
        store = store_of(url, strategy=strategy)
        found = [await store.hit(limits, "a") for _ in range(3)]
        async with store.lifespan(None):
            pass
        del store
        gc.collect()  # an open connection would warn when it is collected

    assert [[left for _, left, _ in quotas] for quotas in found] == [[1, 99], [0, 98], [-1, 97]]


def test_cluster_with_tls_counts():
    """`limits` has no scheme for it."""
    store = store_of("rediss+cluster://host:6379")

    async def secured():
        return store._remote().storage.bridge.storage.connection_kwargs["connection_class"].__name__

    assert asyncio.run(secured()) == "SSLConnection"


async def test_number_of_connections_is_bounded(url):
    """For any number of requests; this is not an outage."""
    store = store_of(url)
    limits = [Limit("default", 10_000, 3600), Limit("default-2", 10_000, 86_400)]

    await asyncio.gather(*[store.hit(limits, "a") for _ in range(300)])

    clients = await store._remote().storage.bridge.storage.info("clients")
    assert clients["connected_clients"] <= 16
    assert not store._outage.active
    assert [left for _, left, _ in await store.hit(limits, "a")] == [9699, 9699]
    async with store.lifespan(None):
        pass


async def test_wait_for_a_connection_times_out_without_an_outage(url):
    """The request is decided without the store."""
    store = store_of(url, storage_timeout=0.01)
    store._remote().connections = asyncio.Semaphore(0)

    quotas = await store.hit([Limit("default", 5, 60)], "a")

    assert [left for _, left, _ in quotas] == [4]
    assert not store._outage.active


async def test_request_that_waited_during_a_failure_skips_the_store(url):
    """A request that waits for a store connection while an outage begins proceeds without a call to the store."""
    store = store_of(url, on_storage_error="allow")
    connections = store._remote().connections = asyncio.Semaphore(0)
    waiting = asyncio.create_task(store.hit([Limit("default", 5, 60)], "a"))
    await asyncio.sleep(0)
    store._outage.report(TimeoutError())

    connections.release()

    assert await waiting == []
    assert connections._value == 1


# Outages


def failing(policy, registry, url):
    return store_of(url, registry, on_storage_error=policy, storage_timeout=0.5)


@pytest.mark.parametrize(("policy", "statuses"), [("memory", {200, 429}), ("allow", {200}), ("deny", {503})])
@pytest.mark.parametrize("fault", ["refused", "silent"])
async def test_outage_delays_only_the_first_requests(server, url, policy, statuses, fault, caplog):
    """No 500, and probes are not affected; the store is used again within two seconds."""
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


async def test_store_is_probed_without_requests(server, url):
    """Two seconds after a restart of Redis requests count again, because the probe needs no request to run."""
    store = store_of(url, on_storage_error="allow", storage_timeout=0.5)
    limit = Limit("default", 5, 3600)
    server.kill()
    missed = await store.hit([limit], "a")
    server.start()
    await asyncio.sleep(2)

    quotas = await store.hit([limit], "a")

    assert missed == []
    assert [left for _, left, _ in quotas] == [4]  # the probes have counted nothing
    async with store.lifespan(None):
        pass


def test_outage_continues_in_another_event_loop(server, url):
    """The next request starts another probe task."""
    store = store_of(url, on_storage_error="allow")
    limit = Limit("default", 5, 3600)

    async def hit():
        await store.hit([limit], "a")
        return store._outage._task

    async def hit_until_back():
        async with store.lifespan(None):
            await asyncio.wait_for(await hit(), 10)

    server.kill()
    first = asyncio.run(hit())
    server.start()
    asyncio.run(hit_until_back())

    assert first.cancelled()
    assert not store._outage.active


# Errors about one key


def spoil(server, value):
    """Replace the value of each key."""
    keys = commands(server.port, "KEYS LIMITS*").splitlines()[2::2]
    assert keys
    for key in keys:
        commands(server.port, f"DEL {key}", f"{value[0]} {key} {value[1]}")


KINDS = {"fixed-window": ("HSET", "field 1"), "sliding-window": ("HSET", "field 1"), "moving-window": ("SET", "1")}


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize(("policy", "left"), [("memory", 2), ("allow", None)])
async def test_key_of_another_type_is_no_outage(server, url, strategy, policy, left, caplog):
    """Only its requests are decided without the store; one log line a minute."""
    registry = CollectorRegistry()
    store = store_of(url, registry, strategy=strategy, on_storage_error=policy)
    limit = Limit("default", 3, 3600)
    await store.hit([limit], "a")
    spoil(server, KINDS[strategy])

    spoiled = [await store.hit([limit], "a") for _ in range(2)]
    other = await store.hit([limit], "b")

    assert [quota[1] for quota in spoiled[0]] == ([] if left is None else [left])
    assert other[0][1] == 2
    assert registry.get_sample_value("rate_limit_storage_up") == 1
    assert registry.get_sample_value("rate_limit_storage_missed_total", {"policy": policy}) == 2
    assert [record.message for record in caplog.records] == [
        f"the rate limit's store cannot count a key (WRONGTYPE); for its requests: {policy}"
    ]
    async with store.lifespan(None):
        pass


@pytest.mark.parametrize(
    ("strategy", "value"),
    [
        ("fixed-window", ("SET", "text")),
        ("fixed-window", ("SET", "1.5")),
        ("fixed-window", ("SET", "9223372036854775807")),  # it cannot grow
        ("moving-window", ("RPUSH", "a b c")),
    ],
)
async def test_value_that_is_no_number_is_no_outage(server, url, strategy, value):
    """A non-numeric value in a Redis key disables the limit for that key only and starts no outage."""
    store, limit = store_of(url, strategy=strategy, on_storage_error="allow"), Limit("default", 3, 3600)
    await store.hit([limit], "a")
    spoil(server, value)

    assert await store.hit([limit], "a") == []
    assert not store._outage.active
    assert [left for _, left, _ in await store.hit([limit], "b")] == [2]
    async with store.lifespan(None):
        pass


async def test_value_that_the_client_cannot_read_is_no_outage(server, url):
    """`limits` reads the previous sliding window after the script."""
    store, limit = store_of(url, strategy="sliding-window", on_storage_error="allow"), Limit("default", 3, 3600)
    await store.hit([limit], "a")
    key = commands(server.port, "KEYS LIMITS*").splitlines()[2]
    commands(server.port, f"SET {key}/-1 text PX 3600000")

    assert await store.hit([limit], "a") == []
    assert not store._outage.active
    async with store.lifespan(None):
        pass


FAILURES = {
    "OutOfMemoryError": ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
    "ReadOnlyError": ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
    "NoPermissionError": ("ACL SETUSER default -@scripting", "ACL SETUSER default +@all"),
}


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize("failure", FAILURES)
async def test_store_that_answers_ping_but_cannot_count_is_an_outage(server, url, strategy, failure, caplog):
    """A store that answers PING but cannot count stays in outage until a probe can count again."""
    caplog.set_level("INFO", "fastapi_prodkit.rate_limit")
    store, limit = store_of(url, strategy=strategy, on_storage_error="allow"), Limit("default", 3, 3600)
    await store.hit([limit], "a")
    break_it, mend_it = FAILURES[failure]
    commands(server.port, break_it)

    assert await store.hit([limit], "a") == []
    await store._outage._probe(partial(store._remote().probe, [limit], "a"))
    assert store._outage.active
    assert f"({failure})" in caplog.text

    commands(server.port, mend_it)
    await store._outage._probe(partial(store._remote().probe, [limit], "a"))
    assert not store._outage.active
    assert [left for _, left, _ in await store.hit([limit], "a")] == [1]
    async with store.lifespan(None):
        pass


@pytest.mark.parametrize(
    "error",
    [
        "OOM command not allowed when used memory > 'maxmemory'.",
        "READONLY You can't write against a read only replica.",
        "LOADING Redis is loading the dataset in memory",
        "NOAUTH Authentication required.",
        "MOVED 3999 127.0.0.1:6381",
        "CLUSTERDOWN The cluster is down",
        "MISCONF Redis is configured to save RDB snapshots",
        "BUSY Redis is busy running a script",
    ],
)
def test_errors_of_redis_itself_are_not_about_a_key(error):
    """Redis errors such as OOM, READONLY or LOADING concern the whole server, not one key."""
    from redis._parsers.base import BaseParser

    assert reason_about_key(BaseParser.parse_error(error)) is None


def test_errors_of_the_network_are_not_about_a_key():
    """A refused certificate is a ValueError as well."""
    assert reason_about_key(ssl.SSLCertVerificationError()) is None
    assert reason_about_key(TimeoutError()) is None


async def test_error_about_a_key_ends_an_outage(server, url):
    """The store has responded."""
    store, limit = store_of(url), Limit("default", 3, 3600)
    await store.hit([limit], "a")
    spoil(server, ("HSET", "field 1"))
    store._outage.report(TimeoutError())

    await store._outage._probe(partial(store._remote().probe, [limit], "a"))

    assert not store._outage.active
    async with store.lifespan(None):
        pass


# Costs


@pytest.mark.parametrize("strategy", KINDS)
async def test_huge_cost_is_refused_without_an_outage(url, strategy):
    """A request whose cost exceeds the limit is refused, changes no counter and starts no outage."""
    store, limit = store_of(url, strategy=strategy), Limit("default", 3, 3600)

    refusals = [refused(await store.hit([limit], "a", cost)) for cost in (4, 2**31, 2**63, 10**30)]

    assert refusals == [True] * 4
    assert not store._outage.active
    assert [left for _, left, _ in await store.hit([limit], "a", 3)] == [0]
    async with store.lifespan(None):
        pass


async def test_denial_is_a_503_problem_with_retry_after(url, server):
    """From the middleware and from a dependency."""
    store = failing("deny", CollectorRegistry(), "redis://127.0.0.1:1/0")

    with pytest.raises(ProblemError) as denied:
        await store.hit([Limit("default", 1, 60)], "a")

    assert denied.value.status_code == 503
    assert denied.value.headers["Retry-After"] == "1"


async def test_app_starts_without_its_store(server):
    """It counts in memory until the store is available."""
    store = failing("memory", CollectorRegistry(), "redis://127.0.0.1:1/0")

    results = await burst(service(store), 10)

    assert sorted(status for status, _ in results) == [200] * 5 + [429] * 5


async def test_slow_probe_does_not_end_the_outage(server, url):
    """A probe that gets no answer within its time-out leaves the outage active."""
    registry = CollectorRegistry()
    store = failing("allow", registry, url)
    ask = partial(store._remote().probe, [Limit("default", 1, 60)], "a")
    store._outage.report(TimeoutError())
    server.pause()
    try:
        await store._outage._probe(ask)
    finally:
        server.resume()
    still = registry.get_sample_value("rate_limit_storage_up")

    await store._outage._probe(ask)

    assert still == 0
    assert registry.get_sample_value("rate_limit_storage_up") == 1
    async with store.lifespan(None):
        pass


async def test_store_without_connections_can_be_closed():
    """A store can be closed before its first use and with a client that has no connections to close."""
    store = store_of("memory://")

    async with store.lifespan(None):
        pass
    store._remote()
    async with store.lifespan(None):
        pass

    assert not store._remotes


class Plain(Storage):
    """A store with increments only, as may be registered with `limits`."""

    STORAGE_SCHEME = ["async+plain"]  # noqa: RUF012 - how `limits` finds it

    base_exceptions = LookupError

    async def incr(self, key, expiry, amount=1):
        raise LookupError(key)

    async def check(self): ...

    async def get(self, key): ...

    async def get_expiry(self, key): ...

    async def reset(self): ...

    async def clear(self, key): ...


@pytest.mark.parametrize("strategy", ["sliding-window", "moving-window"])
def test_unsupported_strategy_is_refused(strategy):
    """A strategy that the storage cannot provide fails at construction with an error that names fixed-window."""
    with pytest.raises(ConfigurationError, match="use fixed-window"):
        store_of("plain://", strategy=strategy)


async def test_any_exception_of_the_client_is_an_outage(caplog):
    """Also in a probe."""
    store = store_of("plain://", on_storage_error="allow")

    quotas = await store.hit([Limit("default", 1, 60)], "a")
    await store._outage._probe(partial(store._remote().probe, [], "a"))

    assert quotas == []
    assert store._outage.active
    assert "(LookupError)" in caplog.text
    store._outage.close()


class Distant(Plain):
    """A store that takes long to connect to."""

    STORAGE_SCHEME = ["async+distant"]  # noqa: RUF012 - how `limits` finds it

    connected = False

    async def incr(self, key, expiry, amount=1):
        await asyncio.sleep(0 if self.connected else 0.1)
        self.connected = True
        return amount


async def test_probe_may_take_longer_to_connect():
    """A probe may connect for longer than `storage_timeout`, because no request waits for a probe."""
    store = store_of("distant://", storage_timeout=0.05)
    store._outage.report(TimeoutError())

    await store._outage._probe(partial(store._remote().probe, [], "a"))

    assert not store._outage.active


async def test_shutdown_ends_the_probe(url, server):
    """The probe task has ended when the lifespan of the store is over."""
    store = failing("allow", CollectorRegistry(), url)
    async with store.lifespan(None):
        store._outage.report(TimeoutError())
        await store.hit([Limit("default", 1, 60)], "a")
        probing = store._outage._task
    await asyncio.sleep(0)

    assert probing.done()


@pytest.mark.parametrize(
    "url",
    [
        "nonsense://:hunter2@host",
        "redis+sentinel://:hunter2@host:26379",
        "redis://:hunter2@host:port",
        "redis+cluster://:hunter2@host:port",
        "redis://:hunter2@[::1",
        "hunter2@myredis:6379/0",
        "hunter2",
        "hunter2://myredis",
        "redishunter2@myredis:6379",
        "redis+hunter2://myredis",
        "memory-hunter2:6379",
        "redis:hunter2@host/0",
        "redis:hunter2@host:6379/0",
        "redis:/hunter2@host:6379/0",
        "redis//:hunter2@host:6379/0",
        "redis:",
        "redis",
        "redis://",
        "redis:///0",
        "redis://:hunter2@",
        "redis://:hunter2@:6379/0",
        "redis://:hunter2@host:0/0",
        "redis://:hunter2@host:65536/0",
        "redis://:hunter2@host:/0",
        " redis://:hunter2@host:6379/0",
        "redis://:hunter2@host:6379/0 ",
        "redis://:hunter2@ho st:6379/0",
        "redis://:hunter2@host:6379/first",
        "redis://:hunter2@host:6379/0?socket_timeout=hunter2",
        "redis+sentinel://:hunter2@host:26379/",
        "REDIS://:hunter2@host:6379/0",
        "redis+unix://",
        "redis+unix:///",
        "redis+cluster://:hunter2@host:1,:2",
        "memcached://",
        "mongodb://u:hunter2@",
        "http://hunter2@host",
        "memory:hunter2",
        "memory://hunter2@host",
        "memory:",
        " ",
        "none",
    ],
)
def test_invalid_url_is_an_error_without_the_password(url):
    """The error for an invalid URL names RATE_LIMIT_STORAGE_URL and repeats neither password nor bad scheme."""
    with pytest.raises(ConfigurationError, match="RATE_LIMIT_STORAGE_URL") as refused:
        store_of(url)

    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_missing_client_names_its_package(monkeypatch):
    """The error for a missing Redis or Valkey client names the package and extra to install."""

    def missing(module, *, extra):
        raise MissingExtraError(f"{module} is not installed: pip install 'fastapi-prodkit[{extra}]'")

    monkeypatch.setattr(_extras, "require", missing)

    with pytest.raises(MissingExtraError, match=r"fastapi-prodkit\[redis\]"):
        store_of("redis://host")
    with pytest.raises(MissingExtraError, match=r"limits\[async-valkey\]"):
        store_of("valkeys://host")


async def test_a_lost_cancellation_is_repeated():
    """TimeLimit cancels an operation again each time that the operation suppresses CancelledError."""
    lost = []

    async def operation():
        for number in range(3):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost.append(number)
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError), TimeLimit(0.01):
        await operation()

    assert lost == [0, 1, 2]
    assert not asyncio.current_task().cancelling()


async def test_result_of_a_cancelled_operation_counts():
    """The result of an operation that suppresses its cancellation is used; no TimeoutError is raised."""
    with TimeLimit(0.01):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        answer = "answer"

    assert answer == "answer"
    assert not asyncio.current_task().cancelling()


async def test_answer_during_a_blocked_event_loop_counts():
    """The store was not slow."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.send(b"answer")
        asyncio.get_running_loop().call_soon(time.sleep, 0.05)

        with TimeLimit(0.01):
            await asyncio.sleep(0)
            answer = await asyncio.get_running_loop().sock_recv(ours, 16)

    assert answer == b"answer"


@pytest.mark.parametrize("too_late", [False, True])
async def test_cancelled_request_stays_cancelled(too_late):
    """Even if the time-out expires at the same moment."""

    async def operation():
        with TimeLimit(0.01 if too_late else 60):
            try:
                await asyncio.sleep(60)
            finally:
                request.cancel()
                await asyncio.sleep(60)

    request = asyncio.create_task(operation())
    await asyncio.sleep(0)
    if not too_late:
        request.cancel()

    with pytest.raises(asyncio.CancelledError):
        await request


async def test_time_limit_outside_of_a_task_is_an_error():
    """A TimeLimit entered in an event loop callback raises RuntimeError, because no task can be cancelled."""
    found = []

    def callback():
        try:
            with TimeLimit(1):
                pass
        except RuntimeError as error:
            found.append(str(error))

    asyncio.get_running_loop().call_soon(callback)
    await asyncio.sleep(0)

    assert found == ["a TimeLimit must be entered in a task"]


@pytest.mark.parametrize("fault", ["slow", "reset"])
async def test_slow_or_reset_connections_are_outages(server, url, fault):
    """Late answers and reset connections start an outage, during which requests are still served quickly."""
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


@pytest.mark.system
@pytest.mark.parametrize(("path", "allowed"), [("/", 5), ("/limited", 3)])
def test_two_workers_share_a_limit(url, tmp_path, path, allowed):
    """Of fifty parallel requests as many are served as the limit says."""
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


@pytest.mark.system
def test_restarts_of_redis_under_load_cause_no_error(server, url):
    """Requests stay fast."""
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

    slow = [seconds for _, seconds in answers if seconds > 0.45]
    assert {status for status, _ in answers} == {200}
    assert len(slow) < 10, slow
    assert statistics.median(seconds for _, seconds in answers) < 0.05


async def test_key_is_accepted_once_by_all_processes(url):
    """Of many at the same moment, too; under another name of the service it is another key."""
    first, second = store_of(url), store_of(url)
    other = SharedStore(RateLimitSettings(storage_url=url), prefix="other", registry=CollectorRegistry())

    added = await asyncio.gather(*[store.add_once("a", 60) for store in (first, second) * 10])
    later = [await store.add_once(key, 60) for store, key in ((first, "a"), (second, "b"), (other, "a"))]

    assert sorted(added) == [False] * 19 + [True]
    assert later == [False, True, True]
    assert first.shared
    for store in (first, second, other):
        async with store.lifespan(None):
            pass


async def test_key_expires_when_its_time_is_over(server, url):
    """It is counted from the moment at which the key was added, and not prolonged by a second attempt."""
    store = store_of(url)

    async with store.lifespan(None):
        await store.add_once("a", 60)
        await store.add_once("a", 60_000)

    assert commands(server.port, "TTL LIMITS:fastapi-prodkit/once/a") in (":60\r\n", ":59\r\n")


@pytest.mark.parametrize("policy", ["memory", "allow", "deny"])
async def test_key_is_not_accepted_without_the_store(server, url, policy, caplog):
    """Whatever the policy of the limits is: nobody knows whether another process has accepted it."""
    store = store_of(url, on_storage_error=policy)

    async with store.lifespan(None):
        assert await store.add_once("a", 60) is True
        server.kill()
        statuses = []
        for key in ("b", "c"):  # the first one finds the failure, the second one skips the store
            with pytest.raises(ProblemError) as caught:
                await store.add_once(key, 60)
            statuses.append((caught.value.status_code, caught.value.headers))

    assert statuses == [(503, {"Retry-After": "1"})] * 2
    assert [record.levelname for record in caplog.records if "store fails" in record.message] == ["WARNING"]


async def test_store_is_back_after_a_key_was_refused(server, url):
    """It is probed without requests."""
    store = store_of(url)
    server.kill()

    async with store.lifespan(None):
        with pytest.raises(ProblemError):
            await store.add_once("a", 60)
        server.start()
        while store._outage.active:
            await asyncio.sleep(0.01)

        assert await store.add_once("a", 60) is True


def test_store_in_memory_is_not_shared():
    """Even as a SharedStore."""
    assert not store_of("memory://").shared
