"""The probes: what /health and /ready answer, how long they take, and what they cost."""

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
    """A check that counts its runs, and fails, warns or passes as told."""

    def __init__(self, error=None):
        self.runs = 0
        self.error = error

    async def __call__(self):
        self.runs += 1
        if self.error is not None:
            raise self.error


class Held(Probe):
    """A check that ends when it is released."""

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
    """A check that goes on when it is cancelled, until it is released; then it raises."""

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
def test_liveness_passes_and_touches_nothing(path):
    """Liveness says that the process can answer; it runs no check, in either spelling and without a redirect."""
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
def test_readiness_says_what_the_worst_check_says(path, error, code, status):
    """Pass and warn are 200, fail is 503; without details nothing but the status is told."""
    client = client_for(checks={"good": Probe(), "database": Probe(error), "also good": Probe()})

    response = client.get(path)

    assert response.status_code == code
    assert response.json() == {"status": status}
    assert response.headers["content-type"] == "application/health+json"
    assert response.headers["cache-control"] == "no-store"


def test_a_failure_outweighs_a_warning():
    """One failing check is enough for 503, whatever the others say."""
    client = client_for(checks={"a": Probe(CheckWarning("slow")), "b": Probe(OSError()), "c": Probe(CheckWarning())})

    response = client.get("/ready")

    assert response.json() == {"status": "fail"}


def test_without_checks_the_service_is_ready():
    """An app without dependencies is ready as soon as it answers."""
    response = client_for().get("/ready")

    assert (response.status_code, response.json()) == (200, {"status": "pass"})


@pytest.mark.parametrize("path", ["/health", "/health/", "/ready", "/ready/"])
def test_probes_answer_head(path):
    """Balancers that probe with HEAD get the status of GET."""
    response = client_for().head(path)

    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(("cache", "seconds"), [(0, "1"), (0.2, "1"), (2.5, "3")])
def test_a_503_says_when_to_ask_again(cache, seconds):
    """Retry-After is the time after which another answer is possible, in whole seconds and never zero."""
    client = client_for(HealthSettings(cache=cache), checks={"database": Probe(OSError())})

    response = client.get("/ready")

    assert response.headers["retry-after"] == seconds
    assert "retry-after" not in client.get("/health").headers


def test_draining_fails_readiness_at_once():
    """Draining is asked before the cache and before any check, so the balancer hears it on its next probe."""
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


def test_probes_are_no_part_of_the_api():
    """The schema does not show the probes, and dependencies of the app do not run for them."""

    def authenticated():
        raise HTTPException(401)

    app = FastAPI(dependencies=[Depends(authenticated)])
    app.include_router(health_router(), prefix="/internal")
    client = TestClient(app)

    response = client.get("/internal/ready")

    assert response.status_code == 200
    assert app.openapi()["paths"] == {}


def test_two_apps_in_one_process_keep_their_own_results():
    """Nothing is shared between two routers."""
    good, bad = client_for(checks={"x": Probe()}), client_for(checks={"x": Probe(OSError())})

    statuses = [good.get("/ready").status_code, bad.get("/ready").status_code, good.get("/ready").status_code]

    assert statuses == [200, 503, 200]


# Details


def test_details_name_each_check_as_the_draft_has_it():
    """With details each check shows its status, its time in milliseconds, and when it was looked at."""
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


def test_details_of_a_failure_carry_no_message():
    """A message may hold credentials, so a failed check shows only the type of its exception."""
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
def test_the_token_shows_the_details(authorization, told):
    """Whoever has the token sees the checks; without it, or with a wrong one, the probe answers and shows none."""
    client = client_for(HealthSettings(token=TOKEN), checks={"database": Probe()}, warning=lambda: "slow")
    headers = {"Authorization": authorization} if authorization else {}

    ready, live = client.get("/ready", headers=headers), client.get("/health", headers=headers)

    assert (ready.status_code, live.status_code) == (200, 200)
    assert ("checks" in ready.json(), "output" in live.json()) == (told, told)


def test_without_a_token_there_is_none_to_guess():
    """An empty token opens nothing where none is set."""
    client = client_for(checks={"database": Probe()})

    response = client.get("/ready", headers={"Authorization": "Bearer "})

    assert response.json() == {"status": "pass"}


# Liveness


def test_liveness_warns_of_a_process_that_answers_late():
    """What is wrong with a process that still answers is a warning and no reason to restart it."""
    wrong = None
    client = client_for(DETAILS, warning=lambda: wrong)
    before = client.get("/health")

    wrong = "the event loop was blocked"
    after = client.get("/health")

    assert before.json() == {"status": "pass"}
    assert (after.status_code, after.json()) == (200, {"status": "warn", "output": wrong})


def test_a_warning_of_liveness_shows_no_details_to_strangers():
    """Without details the status is all that is told."""
    response = client_for(warning=lambda: "the event loop was blocked").get("/health")

    assert (response.status_code, response.json()) == (200, {"status": "warn"})


# Start-up


def test_the_service_is_not_ready_before_it_has_come_up():
    """Until a check of the start has passed, `/startup` and `/ready` say 503 while the process is alive."""
    warming = Probe(RuntimeError("still loading"))
    client = client_for(UNCACHED, checks={"model": HealthCheck(warming, startup=True), "database": Probe()})
    during = [client.get(path).status_code for path in ("/startup", "/startup/", "/ready", "/health")]

    warming.error = None
    after = [client.get(path).status_code for path in ("/startup", "/startup/", "/ready", "/health")]

    assert during == [503, 503, 503, 200]
    assert after == [200, 200, 200, 200]


def test_what_has_started_once_has_started():
    """A check of the start is not asked again once it has passed, so `/startup` never goes back."""
    warming = Probe()
    client = client_for(UNCACHED, checks={"model": HealthCheck(warming, startup=True)})
    client.get("/startup")

    warming.error = RuntimeError("too late to matter")
    statuses = [client.get(path).status_code for path in ("/startup", "/ready")]

    assert statuses == [200, 200]
    assert warming.runs == 1


def test_startup_asks_nothing_but_the_start():
    """A database that is down does not keep a service from having started, and draining does not undo it."""
    database = Probe(OSError("down"))
    client = client_for(DETAILS, checks={"database": database}, draining=lambda: True)

    response = client.get("/startup")

    assert (response.status_code, response.json()) == (200, {"status": "pass", "checks": {}})
    assert database.runs == 0


# Paths


def test_paths_are_names_and_aliases():
    """Each probe answers on every path that it is given, and on no other."""
    paths = {"live_paths": "/livez,/healthz", "ready_paths": ("/readyz", "/"), "startup_paths": ()}
    client = client_for(HealthSettings(**paths), checks={"database": Probe(OSError())})
    asked = ("/livez", "/livez/", "/healthz", "/readyz", "/readyz/", "/", "/health", "/ready", "/startup")

    statuses = [client.get(path).status_code for path in asked]

    assert statuses == [200, 200, 200, 503, 503, 503, 404, 404, 404]


@pytest.mark.parametrize("path", ["health", "/health/", "/{probe}", "", "//", "/health?x", "/a b"])
def test_a_path_that_cannot_be_served_is_refused(path):
    """A path is plain: it begins with a slash, ends without one, and has no parameters."""
    with pytest.raises(ValueError, match="must start with a slash, not end with one"):
        HealthSettings(live_paths=(path,))


@pytest.mark.parametrize("paths", [{"live_paths": "/x,/x"}, {"ready_paths": "/health"}, {"startup_paths": "/y,/ready"}])
def test_a_path_is_one_probe(paths):
    """The same path for two probes would leave one of them unanswered."""
    with pytest.raises(ValueError, match="one path is one probe"):
        HealthSettings(**paths)


# Options of a check


@pytest.mark.parametrize("error", [OSError("down"), asyncio.CancelledError()])
def test_what_is_not_critical_warns(error, caplog):
    """The service can live without it: 200 with `warn`, and the log still says that the check fails."""
    checks = {"recommendations": HealthCheck(Probe(error), critical=False), "database": Probe()}
    client = client_for(DETAILS, checks=checks)

    response = client.get("/ready")

    found = response.json()["checks"]["recommendations"][0]
    assert (response.status_code, response.json()["status"]) == (200, "warn")
    assert (found["status"], found["output"]) == ("warn", type(error).__name__)
    assert [record.getMessage() for record in caplog.records] == [
        f"check recommendations fails: {type(error).__name__}"
    ]


async def test_a_check_has_its_own_time():
    """One check may take less time than the others, and one that is not critical only warns when it takes too long."""
    held = Held()
    client = async_client_for(
        HealthSettings(timeout=60, details=True),
        checks={"slow": HealthCheck(held, timeout=0.05, critical=False), "database": Probe()},
    )

    response = await client.get("/ready")

    found = response.json()["checks"]["slow"][0]
    assert response.status_code == 200
    assert (found["status"], found["output"], found["observedValue"]) == ("warn", "timed out", 50.0)


def test_a_check_has_its_own_cache():
    """What is dear to ask is asked less often than the rest."""
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


async def test_all_who_waited_hear_that_it_took_too_long():
    """A probe that joins a run hears the same as the one that began it, and at the same time."""
    held = Held()
    client = async_client_for(HealthSettings(timeout=0.2, details=True), checks={"slow": held})
    first = asyncio.create_task(client.get("/ready"))
    await held.started.wait()

    second = await client.get("/ready")

    outputs = [response.json()["checks"]["slow"][0]["output"] for response in (await first, second)]
    assert outputs == ["timed out", "timed out"]
    assert held.runs == 1


def test_another_check_of_the_same_name_is_another_check():
    """A check that is replaced leaves nothing of what it said."""
    checks = {"database": HealthCheck(Probe(), cache=3600)}
    client = client_for(checks=checks)
    before = client.get("/ready")

    checks["database"] = Probe(OSError())
    after = client.get("/ready")

    assert (before.status_code, after.status_code) == (200, 503)


# Time


async def test_checks_run_at_the_same_time():
    """The probe takes as long as the slowest check, not as long as all of them."""
    first, second = Held(), Held()
    client = async_client_for(checks={"first": first, "second": second})

    probe = asyncio.create_task(client.get("/ready"))
    await first.started.wait()
    await second.started.wait()
    first.release.set()
    second.release.set()
    response = await probe

    assert response.status_code == 200


async def test_a_check_that_takes_too_long_fails():
    """A check without an answer within its time fails as "timed out", and the others keep their own result."""
    held = Held()
    settings = HealthSettings(timeout=0.05, details=True)
    client = async_client_for(settings, checks={"slow": held, "fast": Probe()})

    response = await client.get("/ready")

    checks = response.json()["checks"]
    assert response.status_code == 503
    assert (checks["slow"][0]["output"], checks["slow"][0]["observedValue"]) == ("timed out", 50.0)
    assert checks["fast"][0]["status"] == "pass"


async def test_a_check_that_ignores_its_cancellation_delays_nobody(caplog):
    """The answer comes in time, the check is cancelled once and never doubled, and its late error is no noise."""
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


async def test_after_a_timeout_the_next_probe_asks_again():
    """A check that was cancelled and has ended is run anew, so a service recovers."""
    held = Held()
    client = async_client_for(HealthSettings(timeout=0.05, cache=0), checks={"slow": held})
    late = await client.get("/ready")
    await held.ended.wait()

    held.release.set()
    recovered = await client.get("/ready")

    assert (late.status_code, recovered.status_code) == (503, 200)
    assert held.runs == 2


# Cost


def test_a_result_is_reused_for_a_moment():
    """Within the cache time a probe costs nothing; after it the checks run again."""
    clock, check = Clock(), Probe()
    client = client_for(HealthSettings(cache=5), checks={"database": check}, clock=clock)
    runs = []

    for seconds in (0, 4.9, 0.1, 4.9, 0.1):
        clock.now += seconds
        client.get("/ready")
        runs.append(check.runs)

    assert runs == [1, 1, 2, 2, 3]


def test_without_cache_each_probe_asks():
    """A cache of zero seconds means none."""
    check = Probe()
    client = client_for(UNCACHED, checks={"database": check}, clock=Clock())

    for _ in range(3):
        client.get("/ready")

    assert check.runs == 3


async def test_concurrent_probes_share_one_run():
    """However many balancers ask at once, each check runs once."""
    held = Held()
    client = async_client_for(UNCACHED, checks={"database": held})

    probes = [asyncio.create_task(client.get("/ready")) for _ in range(20)]
    await held.started.wait()
    held.release.set()
    responses = await asyncio.gather(*probes)

    assert [response.status_code for response in responses] == [200] * 20
    assert held.runs == 1


async def test_a_client_that_leaves_takes_nobody_with_it():
    """The first probe started the run, but when its client goes away the second one still gets the answer."""
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


def test_a_router_outlives_its_event_loop():
    """A run that died with its loop, as in tests that start an app several times, does not block the next loop."""
    app = FastAPI()
    stubborn = []

    async def check():
        if not stubborn:
            stubborn.append(asyncio.current_task())
            await asyncio.Event().wait()

    app.include_router(health_router(HealthSettings(timeout=0.05, cache=0), checks={"database": check}))

    statuses = [TestClient(app).get("/ready").status_code for _ in range(3)]

    assert statuses == [503, 200, 200]


def test_a_run_of_a_dead_loop_is_not_waited_for():
    """A loop that was closed in the middle of a run leaves a task that never ends; the next loop starts its own."""
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


def test_a_cancellation_inside_a_check_is_a_failure():
    """A check that ends in CancelledError, because something it waited for was cancelled, has failed."""
    client = client_for(DETAILS, checks={"database": Probe(asyncio.CancelledError())})

    response = client.get("/ready")

    assert response.status_code == 503
    assert response.json()["checks"]["database"][0]["output"] == "CancelledError"


def test_a_keyboard_interrupt_passes():
    """Ctrl-C during a check stops the process; it is not the check's result."""
    app = FastAPI()
    app.include_router(health_router(checks={"database": Probe(KeyboardInterrupt())}))
    client = AsyncClient(transport=ASGITransport(app), base_url="http://test")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(client.get("/ready"))


def test_a_check_may_be_added_later():
    """The mapping is read at each run."""
    checks = {}
    client = client_for(UNCACHED, checks=checks)
    before = client.get("/ready")

    checks["database"] = Probe(OSError())
    after = client.get("/ready")

    assert (before.status_code, after.status_code) == (200, 503)


# The log


def test_a_change_of_state_is_logged_once(caplog):
    """An outage is one warning with the exception's type, and one line when it is over; no line for each probe."""
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


def test_the_traceback_is_there_for_who_asks(caplog):
    """At level DEBUG each failure comes with its traceback."""
    caplog.set_level(logging.DEBUG, "fastapi_prodkit.health")
    client = client_for(checks={"database": Probe(OSError("connection refused"))})

    client.get("/ready")

    assert "OSError: connection refused" in caplog.text


# Misconfiguration


def synchronous():
    """A check that somebody forgot to make async."""


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
def test_a_check_that_cannot_work_is_refused(checks, message):
    """The mistake is named when the router is made, not when the first probe comes."""
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
def test_an_option_that_cannot_be_is_refused(options, message):
    """The mistake is named where the check is made."""
    with pytest.raises(ConfigurationError, match=message):
        HealthCheck(Probe(), **options)


@pytest.mark.parametrize("check", [lambda: None, Clock()], ids=["lambda", "callable object"])
def test_a_synchronous_check_that_looked_async_fails(check):
    """What cannot be told from outside fails at the probe, and says why."""
    client = client_for(DETAILS, checks={"database": check})

    response = client.get("/ready")

    assert response.status_code == 503
    assert response.json()["checks"]["database"][0]["output"] == "not async: the check returned no awaitable"


def test_a_lambda_that_returns_an_awaitable_is_a_check():
    """`lambda: check(database)` is as good as a function."""
    seen = []

    async def check(name):
        seen.append(name)

    client = client_for(checks={"database": lambda: check("replica")})

    response = client.get("/ready")

    assert response.status_code == 200
    assert seen == ["replica"]


def test_a_decorated_check_is_a_check():
    """A decorator that hides `async def` behind a plain function that returns the coroutine is seen through."""

    async def check():
        raise CheckWarning("decorated")

    @functools.wraps(check)
    def retried():
        return check()

    client = client_for(checks={"database": retried})

    response = client.get("/ready")

    assert response.json() == {"status": "warn"}


# In the whole app


def test_aliases_are_probes_to_the_whole_edge(capsys):
    """Whatever its path, a probe is not logged, not limited, and answers to any host name."""
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


def test_a_check_of_ones_own_takes_the_place_of_a_pieces():
    """The database may be no reason to be taken out of traffic: its check is replaced by one of the same name."""
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
    """Return the status as a probe with a time-out of half a second sees it; None is no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=0.5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.system
def test_a_start_that_is_slower_than_the_probe(tmp_path):
    """No probe is answered before the lifespan has started; then liveness passes while `/startup` and `/ready` wait."""
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
