"""The probes: their answers, time-outs and caches."""

import asyncio
import functools
import gc
import logging
import re
import time
import urllib.error
import urllib.request

import pytest
from clock import Clock
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from httpx2 import ASGITransport, AsyncClient
from processes import free_port, running

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError
from fastapi_prodkit.health import HealthCheck, health_router
from fastapi_prodkit.sections import HealthSettings

DETAILS = HealthSettings(details=True)
UNCACHED = HealthSettings(cache=0)


class Probe:
    """A check that counts its runs, and fails, warns or passes."""

    def __init__(self, error=None):
        self.runs = 0
        self.error = error

    async def __call__(self):
        self.runs += 1
        if self.error is not None:
            raise self.error


class Held(Probe):
    """A check that ends when the test releases it."""

    def __init__(self):
        super().__init__()
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self):
        await super().__call__()
        self.started.set()
        try:
            await self.release.wait()
        finally:
            self.ended.set()


class Stubborn(Held):
    """A check that ignores its cancellation until the test releases it; then it raises."""

    async def __call__(self):
        self.cancelled = 0
        self.started.set()
        self.runs += 1
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
        raise RuntimeError("too late")


def client_for(*args, **kwargs):
    app = FastAPI()
    app.include_router(health_router(*args, **kwargs))
    return TestClient(app, follow_redirects=False)


def async_client_for(*args, **kwargs):
    app = FastAPI()
    app.include_router(health_router(*args, **kwargs))
    return AsyncClient(transport=ASGITransport(app), base_url="http://test")


# What the probes answer


@pytest.mark.parametrize("path", ["/health", "/health/"])
def test_liveness_passes_without_running_checks(path):
    """With or without a trailing slash, and without a redirect."""
    check = Probe(OSError("database is down"))
    client = client_for(checks={"database": check}, draining=lambda: True)

    response = client.get(path)

    assert response.status_code == 200
    assert response.text == '{"status":"pass"}'
    assert response.headers["content-type"] == "application/health+json"
    assert response.headers["cache-control"] == "no-store"
    assert check.runs == 0


@pytest.mark.parametrize("path", ["/ready", "/ready/"])
@pytest.mark.parametrize(
    ("error", "code", "status"),
    [(None, 200, "pass"), (CheckWarning("replica lags"), 200, "warn"), (OSError("down"), 503, "fail")],
)
def test_readiness_has_the_worst_status(path, error, code, status):
    """Pass and warn are 200, fail is 503; without details only the status is shown."""
    client = client_for(checks={"good": Probe(), "database": Probe(error), "also good": Probe()})

    response = client.get(path)

    assert response.status_code == code
    assert response.json() == {"status": status}
    assert response.headers["content-type"] == "application/health+json"
    assert response.headers["cache-control"] == "no-store"


def test_failure_outweighs_a_warning():
    """A single failing check makes `/ready` answer 503, even if other checks only warn."""
    client = client_for(checks={"a": Probe(CheckWarning("slow")), "b": Probe(OSError()), "c": Probe(CheckWarning())})

    response = client.get("/ready")

    assert response.json() == {"status": "fail"}


def test_readiness_without_checks_passes():
    """`/ready` answers 200 with status pass if the app has registered no checks."""
    response = client_for().get("/ready")

    assert (response.status_code, response.json()) == (200, {"status": "pass"})


@pytest.mark.parametrize("path", ["/health", "/health/", "/ready", "/ready/"])
def test_probes_answer_head(path):
    """With the status of GET."""
    response = client_for().head(path)

    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("cache", "seconds"), [(0, "1"), (0.2, "1"), (2.5, "3")])
def test_503_has_retry_after(cache, seconds):
    """In whole seconds, never zero: when another answer is possible."""
    client = client_for(HealthSettings(cache=cache), checks={"database": Probe(OSError())})

    response = client.get("/ready")

    assert response.headers["retry-after"] == seconds
    assert "retry-after" not in client.get("/health").headers


def test_draining_fails_readiness_before_cache_and_checks():
    """A draining app answers 503 to `/ready` even if a passing result is cached, and runs no check for this."""
    draining = False
    check = Probe()
    client = client_for(HealthSettings(cache=3600), checks={"database": check}, draining=lambda: draining)
    before = client.get("/ready")

    draining = True
    during = client.get("/ready")

    assert before.status_code == 200
    assert (during.status_code, during.json()) == (503, {"status": "fail"})
    assert during.headers["retry-after"] == "1"
    assert during.headers["cache-control"] == "no-store"
    assert check.runs == 1


def test_probes_are_not_in_the_schema_and_skip_dependencies():
    """The OpenAPI schema omits the probes, and the dependencies of the app do not run for them."""

    def authenticated():
        raise HTTPException(401)

    app = FastAPI(dependencies=[Depends(authenticated)])
    app.include_router(health_router(), prefix="/internal")
    client = TestClient(app)

    response = client.get("/internal/ready")

    assert response.status_code == 200
    assert app.openapi()["paths"] == {}


def test_two_routers_have_separate_results():
    """Each health router runs its own checks, so a failure in one does not change the result of the other."""
    good, bad = client_for(checks={"x": Probe()}), client_for(checks={"x": Probe(OSError())})

    statuses = [good.get("/ready").status_code, bad.get("/ready").status_code, good.get("/ready").status_code]

    assert statuses == [200, 503, 200]


# Details


def test_details_have_status_duration_and_time_of_each_check():
    """By the names of the draft."""
    client = client_for(DETAILS, checks={"database": Probe(), "cache": Probe(CheckWarning("replica lags by 4 s"))})

    body = client.get("/ready").json()

    database, cache = body["checks"]["database"], body["checks"]["cache"]
    assert body["status"] == "warn"
    assert len(database) == len(cache) == 1
    assert database[0].keys() == {"status", "observedValue", "observedUnit", "time"}
    assert database[0]["status"] == "pass"
    assert 0 <= database[0]["observedValue"] < 1000
    assert database[0]["observedUnit"] == "ms"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", database[0]["time"])
    assert cache[0]["status"] == "warn"
    assert cache[0]["output"] == "replica lags by 4 s"


def test_details_of_a_failure_have_only_the_exception_type():
    """A message may contain credentials."""
    error = ConnectionRefusedError("postgresql://app:hunter2@db/app")
    client = client_for(DETAILS, checks={"database": Probe(error)})

    response = client.get("/ready")

    assert response.json()["checks"]["database"][0]["output"] == "ConnectionRefusedError"
    assert "hunter2" not in response.text


TOKEN = "t0p-s3cret-pässword"


@pytest.mark.parametrize(
    ("authorization", "told"),
    [
        (f"Bearer {TOKEN}".encode(), True),
        (f"bearer  {TOKEN}".encode(), True),
        (b"Bearer wrong", False),
        (f"Basic {TOKEN}".encode(), False),
        (b"Bearer", False),
        (None, False),
    ],
)
def test_token_shows_the_details(authorization, told):
    """With a wrong token or none, the probe answers without details."""
    client = client_for(HealthSettings(token=TOKEN), checks={"database": Probe()}, warning=lambda: "slow")
    headers = {"Authorization": authorization} if authorization else {}

    ready, live = client.get("/ready", headers=headers), client.get("/health", headers=headers)

    assert (ready.status_code, live.status_code) == (200, 200)
    assert ("checks" in ready.json(), "output" in live.json()) == (told, told)


def test_empty_token_shows_no_details():
    """If no token is set."""
    client = client_for(checks={"database": Probe()})

    response = client.get("/ready", headers={"Authorization": "Bearer "})

    assert response.json() == {"status": "pass"}


# Liveness


def test_liveness_warns_with_200():
    """A warning leaves the status of `/health` at 200, so an orchestrator does not restart the process."""
    wrong = None
    client = client_for(DETAILS, warning=lambda: wrong)
    before = client.get("/health")

    wrong = "the event loop was blocked"
    after = client.get("/health")

    assert before.json() == {"status": "pass"}
    assert (after.status_code, after.json()) == (200, {"status": "warn", "output": wrong})


def test_warning_of_liveness_without_details_is_the_status():
    """Unless details are enabled, `/health` returns only the status warn and omits the text of the warning."""
    response = client_for(warning=lambda: "the event loop was blocked").get("/health")

    assert (response.status_code, response.json()) == (200, {"status": "warn"})


# Start-up


def test_startup_and_readiness_fail_until_startup_checks_pass():
    """Liveness passes."""
    warming = Probe(RuntimeError("still loading"))
    client = client_for(UNCACHED, checks={"model": HealthCheck(warming, startup=True), "database": Probe()})
    during = [client.get(path).status_code for path in ("/startup", "/startup/", "/ready", "/health")]

    warming.error = None
    after = [client.get(path).status_code for path in ("/startup", "/startup/", "/ready", "/health")]

    assert during == [503, 503, 503, 200]
    assert after == [200, 200, 200, 200]


def test_startup_check_is_not_called_after_it_has_passed():
    """A startup check is not called again once it has passed, so a later failure changes no probe."""
    warming = Probe()
    client = client_for(UNCACHED, checks={"model": HealthCheck(warming, startup=True)})
    client.get("/startup")

    warming.error = RuntimeError("too late to matter")
    statuses = [client.get(path).status_code for path in ("/startup", "/ready")]

    assert statuses == [200, 200]
    assert warming.runs == 1


def test_startup_ignores_other_checks_and_draining():
    """`/startup` passes while the service drains, and does not run a database check that would fail."""
    database = Probe(OSError("down"))
    client = client_for(DETAILS, checks={"database": database}, draining=lambda: True)

    response = client.get("/startup")

    assert (response.status_code, response.json()) == (200, {"status": "pass", "checks": {}})
    assert database.runs == 0


# Paths


def test_probe_answers_on_each_of_its_paths():
    """And on no other."""
    paths = {"live_paths": "/livez,/healthz", "ready_paths": ("/readyz", "/"), "startup_paths": ()}
    client = client_for(HealthSettings(**paths), checks={"database": Probe(OSError())})
    asked = ("/livez", "/livez/", "/healthz", "/readyz", "/readyz/", "/", "/health", "/ready", "/startup")

    statuses = [client.get(path).status_code for path in asked]

    assert statuses == [200, 200, 200, 503, 503, 503, 404, 404, 404]


@pytest.mark.parametrize("path", ["health", "/health/", "/{probe}", "", "//", "/health?x", "/a b"])
def test_invalid_path_is_refused(path):
    """A probe path must begin with a slash, not end with one, and contain no parameter, query or space."""
    with pytest.raises(ValueError, match="must start with a slash, not end with one"):
        HealthSettings(live_paths=(path,))


@pytest.mark.parametrize("paths", [{"live_paths": "/x,/x"}, {"ready_paths": "/health"}, {"startup_paths": "/y,/ready"}])
def test_path_of_two_probes_is_refused(paths):
    """The settings refuse a path that is configured for two probes, because only one of them could answer."""
    with pytest.raises(ValueError, match="one path is one probe"):
        HealthSettings(**paths)


# Options of a check


@pytest.mark.parametrize("error", [OSError("down"), asyncio.CancelledError()])
def test_check_that_is_not_critical_warns(error, caplog):
    """With 200; the log still says that it fails."""
    checks = {"recommendations": HealthCheck(Probe(error), critical=False), "database": Probe()}
    client = client_for(DETAILS, checks=checks)

    response = client.get("/ready")

    found = response.json()["checks"]["recommendations"][0]
    assert (response.status_code, response.json()["status"]) == (200, "warn")
    assert (found["status"], found["output"]) == ("warn", type(error).__name__)
    assert [record.getMessage() for record in caplog.records] == [
        f"check recommendations fails: {type(error).__name__}"
    ]


async def test_check_may_have_its_own_timeout():
    """The time-out of a HealthCheck overrides HEALTH_TIMEOUT; a non-critical check that exceeds it only warns."""
    held = Held()
    client = async_client_for(
        HealthSettings(timeout=60, details=True),
        checks={"slow": HealthCheck(held, timeout=0.05, critical=False), "database": Probe()},
    )

    response = await client.get("/ready")

    found = response.json()["checks"]["slow"][0]
    assert response.status_code == 200
    assert (found["status"], found["output"], found["observedValue"]) == ("warn", "timed out", 50.0)


def test_check_may_have_its_own_cache():
    """The cache time of a HealthCheck overrides HEALTH_CACHE, so an expensive check runs less often."""
    clock, dear, cheap = Clock(), Probe(), Probe()
    client = client_for(
        HealthSettings(cache=1), checks={"dear": HealthCheck(dear, cache=60), "cheap": cheap}, clock=clock
    )
    runs = []

    for seconds in (0, 2, 57, 1):
        clock.now += seconds
        client.get("/ready")
        runs.append((dear.runs, cheap.runs))

    assert runs == [(1, 1), (1, 2), (1, 3), (2, 4)]


async def test_probe_that_joins_a_run_gets_its_time_out():
    """At the same time as the probe that started it."""
    held = Held()
    client = async_client_for(HealthSettings(timeout=0.2, details=True), checks={"slow": held})
    first = asyncio.create_task(client.get("/ready"))
    await held.started.wait()

    second = await client.get("/ready")

    outputs = [response.json()["checks"]["slow"][0]["output"] for response in (await first, second)]
    assert outputs == ["timed out", "timed out"]
    assert held.runs == 1


def test_replaced_check_has_no_cached_result():
    """A check that replaces another one under its name runs at the next probe, despite the cached result."""
    checks = {"database": HealthCheck(Probe(), cache=3600)}
    client = client_for(checks=checks)
    before = client.get("/ready")

    checks["database"] = Probe(OSError())
    after = client.get("/ready")

    assert (before.status_code, after.status_code) == (200, 503)


# Time


async def test_checks_run_concurrently():
    """A readiness probe starts all checks at once, so it takes only as long as the slowest check."""
    first, second = Held(), Held()
    client = async_client_for(checks={"first": first, "second": second})

    probe = asyncio.create_task(client.get("/ready"))
    await first.started.wait()
    await second.started.wait()
    first.release.set()
    second.release.set()
    response = await probe

    assert response.status_code == 200


async def test_slow_check_fails_as_timed_out():
    """The others keep their results."""
    held = Held()
    settings = HealthSettings(timeout=0.05, details=True)
    client = async_client_for(settings, checks={"slow": held, "fast": Probe()})

    response = await client.get("/ready")

    checks = response.json()["checks"]
    assert response.status_code == 503
    assert (checks["slow"][0]["output"], checks["slow"][0]["observedValue"]) == ("timed out", 50.0)
    assert checks["fast"][0]["status"] == "pass"


async def test_check_that_ignores_its_cancellation_is_not_started_again(caplog):
    """The answer is in time; its late error is not logged."""
    unheard = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    stubborn = Stubborn()
    client = async_client_for(HealthSettings(timeout=0.05, cache=0), checks={"stubborn": stubborn})

    started = time.perf_counter()
    statuses = [(await client.get("/ready")).status_code for _ in range(3)]
    elapsed = time.perf_counter() - started
    gc.collect()
    alive = (stubborn.runs, stubborn.cancelled)
    stubborn.release.set()
    last = await client.get("/ready")
    gc.collect()

    assert statuses == [503, 503, 503]
    assert elapsed < 1
    assert alive == (1, 1)
    assert last.status_code == 503
    assert unheard == []
    assert [record.getMessage() for record in caplog.records] == ["check stubborn fails: timed out"]


async def test_check_runs_again_after_a_time_out():
    """A check that was cancelled by its time-out runs again at the next probe, so readiness can recover."""
    held = Held()
    client = async_client_for(HealthSettings(timeout=0.05, cache=0), checks={"slow": held})
    late = await client.get("/ready")
    await held.ended.wait()

    held.release.set()
    recovered = await client.get("/ready")

    assert (late.status_code, recovered.status_code) == (503, 200)
    assert held.runs == 2


# Cost


def test_result_is_reused_within_the_cache_time():
    """A probe within the cache time reuses the last result; the first probe after it runs the check again."""
    clock, check = Clock(), Probe()
    client = client_for(HealthSettings(cache=5), checks={"database": check}, clock=clock)
    runs = []

    for seconds in (0, 4.9, 0.1, 4.9, 0.1):
        clock.now += seconds
        client.get("/ready")
        runs.append(check.runs)

    assert runs == [1, 1, 2, 2, 3]


def test_cache_of_zero_runs_the_check_for_each_probe():
    """A cache time of zero disables the reuse of results."""
    check = Probe()
    client = client_for(UNCACHED, checks={"database": check}, clock=Clock())

    for _ in range(3):
        client.get("/ready")

    assert check.runs == 3


async def test_concurrent_probes_share_one_run():
    """Twenty probes that arrive during one run of a check wait for its result and start no further run."""
    held = Held()
    client = async_client_for(UNCACHED, checks={"database": held})

    probes = [asyncio.create_task(client.get("/ready")) for _ in range(20)]
    await held.started.wait()
    held.release.set()
    responses = await asyncio.gather(*probes)

    assert [response.status_code for response in responses] == [200] * 20
    assert held.runs == 1


async def test_disconnect_of_one_probe_does_not_cancel_a_shared_run():
    """A run shared by two probes continues for the second one when the client of the first disconnects."""
    held = Held()
    client = async_client_for(UNCACHED, checks={"database": held})
    first = asyncio.create_task(client.get("/ready"))
    await held.started.wait()
    second = asyncio.create_task(client.get("/ready"))

    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    held.release.set()
    response = await second

    assert response.status_code == 200
    assert held.runs == 1


def test_router_works_in_a_second_event_loop():
    """Tests start an app several times."""
    app = FastAPI()
    stubborn = []

    async def check():
        if not stubborn:
            stubborn.append(asyncio.current_task())
            await asyncio.Event().wait()

    app.include_router(health_router(HealthSettings(timeout=0.05, cache=0), checks={"database": check}))

    statuses = [TestClient(app).get("/ready").status_code for _ in range(3)]

    assert statuses == [503, 200, 200]


def test_run_of_a_closed_event_loop_is_not_awaited():
    """A probe in a new event loop starts its own run and does not wait for a run left in the previous loop."""
    app = FastAPI()
    check = Probe()

    async def hang():
        check.runs += 1
        if check.runs == 1:
            await asyncio.Event().wait()

    app.include_router(health_router(HealthSettings(timeout=60, cache=0), checks={"database": hang}))
    client = AsyncClient(transport=ASGITransport(app), base_url="http://test")
    loop = asyncio.new_event_loop()
    probe = loop.create_task(client.get("/ready"))
    while check.runs == 0:
        loop.run_until_complete(asyncio.sleep(0))
    abandoned = asyncio.all_tasks(loop)

    response = TestClient(app).get("/ready")

    assert response.status_code == 200
    for task in abandoned:
        task.cancel()
    loop.run_until_complete(asyncio.gather(probe, *abandoned, return_exceptions=True))
    loop.close()


# What checks may raise


def test_cancelled_error_of_a_check_is_a_failure():
    """A check that raises CancelledError fails with 503, and the probe itself is not cancelled."""
    client = client_for(DETAILS, checks={"database": Probe(asyncio.CancelledError())})

    response = client.get("/ready")

    assert response.status_code == 503
    assert response.json()["checks"]["database"][0]["output"] == "CancelledError"


def test_keyboard_interrupt_in_a_check_passes():
    """A KeyboardInterrupt raised in a check propagates to the process and is not reported as a failed check."""
    app = FastAPI()
    app.include_router(health_router(checks={"database": Probe(KeyboardInterrupt())}))
    client = AsyncClient(transport=ASGITransport(app), base_url="http://test")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(client.get("/ready"))


def test_check_may_be_added_later():
    """A check added to the mapping after the router was created is run by the next probe."""
    checks = {}
    client = client_for(UNCACHED, checks=checks)
    before = client.get("/ready")

    checks["database"] = Probe(OSError())
    after = client.get("/ready")

    assert (before.status_code, after.status_code) == (200, 503)


# The log


def test_change_of_state_is_logged_once(caplog):
    """A warning with the exception's type, and one line for the recovery."""
    caplog.set_level(logging.INFO)
    check = Probe()
    client = client_for(UNCACHED, checks={"database": check})

    for error in (None, OSError("hunter2"), OSError("hunter2"), CheckWarning("slow"), None):
        check.error = error
        client.get("/ready")

    lines = [record for record in caplog.records if record.name == "fastapi_prodkit.health"]
    assert [(line.levelname, line.getMessage()) for line in lines] == [
        ("WARNING", "check database fails: OSError"),
        ("INFO", "check database has recovered"),
    ]
    assert "hunter2" not in caplog.text


def test_debug_level_logs_the_traceback(caplog):
    """The log contains the traceback of a failed check if the level of the health logger is DEBUG."""
    caplog.set_level(logging.DEBUG, "fastapi_prodkit.health")
    client = client_for(checks={"database": Probe(OSError("connection refused"))})

    client.get("/ready")

    assert "OSError: connection refused" in caplog.text


# Misconfiguration


def synchronous():
    """A check that is not async."""


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({"": Probe()}, "empty name"),
        ({"database": "SELECT 1"}, "'database' is not callable"),
        ({"database": synchronous}, "'database' is not async"),
        ({"database": Clock().__call__}, "'database' is not async"),
        ({"database": HealthCheck(synchronous)}, "'database' is not async"),
    ],
)
def test_check_that_is_not_async_is_refused(checks, message):
    """When the router is made."""
    with pytest.raises(ConfigurationError, match=message):
        health_router(checks=checks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"timeout": float("nan")}, "timeout must be more than 0"),
        ({"cache": -1}, "cache must be 0 or more"),
    ],
)
def test_invalid_option_of_a_check_is_refused(options, message):
    """A HealthCheck with a time-out of 0 or NaN or a negative cache time raises a ConfigurationError."""
    with pytest.raises(ConfigurationError, match=message):
        HealthCheck(Probe(), **options)


@pytest.mark.parametrize("check", [lambda: None, Clock()], ids=["lambda", "callable object"])
def test_check_without_an_awaitable_fails_at_the_probe(check):
    """With the reason."""
    client = client_for(DETAILS, checks={"database": check})

    response = client.get("/ready")

    assert response.status_code == 503
    assert response.json()["checks"]["database"][0]["output"] == "not async: the check returned no awaitable"


def test_lambda_that_returns_an_awaitable_is_a_check():
    """A lambda that returns a coroutine is accepted as a check, and the coroutine is awaited."""
    seen = []

    async def check(name):
        seen.append(name)

    client = client_for(checks={"database": lambda: check("replica")})

    response = client.get("/ready")

    assert response.status_code == 200
    assert seen == ["replica"]


def test_decorated_check_is_a_check():
    """The decorator returns a plain function."""

    async def check():
        raise CheckWarning("decorated")

    @functools.wraps(check)
    def retried():
        return check()

    client = client_for(checks={"database": retried})

    response = client.get("/ready")

    assert response.json() == {"status": "warn"}


# In the whole app


def test_alias_is_exempt_like_a_probe(capsys):
    """It is not logged and not limited, and answers to any host."""
    settings = Settings(
        _env_file=None,
        environment="prod",
        hosts={"allowed": "api.example.com"},
        rate_limit={"default": "1/minute"},
        health={"live_paths": "/,/livez", "ready_paths": "/readyz"},
    )
    paths = ("/", "/livez", "/livez/", "/readyz", "/startup") * 2

    with TestClient(create_app(settings), base_url="http://10.0.0.7:8000") as client:
        statuses = [client.get(path).status_code for path in paths]

    assert statuses == [200] * 10
    assert '"event":"request"' not in capsys.readouterr().out


def test_check_of_the_user_replaces_that_of_a_piece():
    """By its name."""
    pytest.importorskip("sqlalchemy")
    settings = Settings(
        _env_file=None, environment="test", database={"url": "sqlite+aiosqlite:///:memory:"}, rate_limit=None
    )
    checks = {"database": HealthCheck(Probe(OSError("down")), critical=False)}

    with TestClient(create_app(settings, checks=checks)) as client:
        response = client.get("/ready")

    assert response.status_code == 200
    assert response.json()["checks"]["database"][0]["output"] == "OSError"


# Real processes

SLOW_START = """
import asyncio
from contextlib import asynccontextmanager
from fastapi_prodkit import create_app
from fastapi_prodkit.health import HealthCheck

loaded = asyncio.Event()

async def load():
    await asyncio.sleep(1.5)
    loaded.set()

async def model_is_loaded():
    assert loaded.is_set()

@asynccontextmanager
async def lifespan(app):
    print("starting", flush=True)
    await asyncio.sleep(3)
    task = asyncio.create_task(load())
    yield

app = create_app(lifespan=lifespan, checks={"model": HealthCheck(model_is_loaded, cache=0, startup=True)})
"""


def status_of(port, path):
    """Return the status for a probe with a time-out of half a second; None without an answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=0.5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.system
def test_probe_during_a_slow_start(tmp_path):
    """Nothing answers before the lifespan has started; then liveness passes, and the others fail."""
    pytest.importorskip("uvicorn")
    (tmp_path / "service.py").write_text(SLOW_START)
    port = free_port()
    command = ("uvicorn", "service:app", "--port", str(port))
    seen = []

    with running(*command, directory=tmp_path, port=port, listening=False, ENVIRONMENT="test") as server:
        deadline = time.monotonic() + 40
        while (statuses := [status_of(port, path) for path in ("/health", "/ready", "/startup")]) != [200] * 3:
            assert time.monotonic() < deadline, server.output()
            seen.append(("starting" in server.output(), statuses))
            time.sleep(0.05)

    assert (True, [None, None, None]) in seen
    assert (True, [200, 503, 503]) in seen
    assert all(live in (None, 200) for _, (live, _, _) in seen)
