"""Metrics of several worker processes: any of them answers for all, whatever becomes of the others."""

import http.client
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import free_port, running
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from fastapi_prodkit import Settings, _samples, _scope, _workers, create_app
from fastapi_prodkit._samples import Collectors
from fastapi_prodkit._servers import several_workers
from fastapi_prodkit._workers import Workers, shared_directory
from fastapi_prodkit.exceptions import ConfigurationError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers meet under POSIX only")

SERVED = """
import os

from prometheus_client import Counter, Gauge

from fastapi_prodkit import Settings, create_app

limit = {"default": "100000/minute"}
app = create_app(Settings(environment="test", rate_limit=limit, shutdown={"drain": 0.1, "grace": 2}))
orders = Counter("orders", "Orders.")
open_orders = Gauge("open_orders", "Open orders.")


@app.get("/worker")
async def worker():
    orders.inc()
    open_orders.set(1)
    return os.getpid()
"""


NO_PLACE = """
import tempfile
from pathlib import Path

from fastapi_prodkit import _scope, _workers

tempfile.tempdir = {!r}
_workers._MEMORY = Path("/proc/nowhere")
"""


class Process:
    """What a worker process has of its own: a registry, here."""

    def __init__(self, directory: Path) -> None:
        self.registry = CollectorRegistry()
        self.orders = Counter("orders", "Orders.", registry=self.registry)
        self.open = Gauge("open_orders", "Open orders.", registry=self.registry)
        self.workers = Workers(self.registry, directory)

    def shown(self) -> dict[str, float]:
        return values(generate_latest(self.workers).decode())

    def die(self) -> None:
        """Give up the lock as the system does for a process that is killed: without another word."""
        self.workers._ending.set()
        self.workers._thread.join()
        self.workers._alive.close()
        self.workers._alive = None  # nothing is left to do for its end


def values(text: str) -> dict[str, float]:
    """Return the samples; those with labels under the sum of all their values."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


@pytest.fixture
def pair(tmp_path):
    one, two = Process(tmp_path / "metrics"), Process(tmp_path / "metrics")
    with one.workers.joined(), two.workers.joined():
        yield one, two


@pytest.fixture
def busy(pair):
    """A pair of which each has counted and measured, and the first has told."""
    one, two = pair
    one.orders.inc(3)
    two.orders.inc(4)
    one.open.set(1)
    two.open.set(2)
    one.shown()
    return pair


def test_any_worker_answers_for_all(busy):
    """Counters and gauges are sums, whoever is asked; those of the others as they last wrote them."""
    _, two = busy

    shown = two.shown()

    assert (shown["orders_total"], shown["open_orders"]) == (7, 3)


def test_others_write_by_themselves(pair):
    """What a worker has counted reaches the others within a second or so, although nobody asks it."""
    one, two = pair
    one.orders.inc(3)

    deadline = time.monotonic() + 20
    while two.shown()["orders_total"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_counts_of_the_dead_stay_and_their_gauges_go(busy):
    """A sum that falls would look like a restart of everything; a gauge of the dead measures nothing."""
    one, two = busy
    one.die()

    for _ in range(2):
        shown = two.shown()
        assert (shown["orders_total"], shown["open_orders"]) == (7, 2)


def test_many_deaths_leave_one_file(tmp_path):
    """What is kept does not grow with the workers that have come and gone."""
    with Process(tmp_path).workers.joined(), ExitStack() as dead:
        for _ in range(5):
            process = Process(tmp_path)
            dead.enter_context(process.workers.joined())
            process.orders.inc()
            process.workers._write()
            process.die()
        last = Process(tmp_path)
        with last.workers.joined():
            assert last.shown()["orders_total"] == 5
            assert len(list(tmp_path.glob("*.json"))) == 3  # two that live, and one for all others


def test_a_worker_that_ends_leaves_its_counts(pair, tmp_path):
    """It writes a last time; the directory goes with the last of them."""
    one, _ = pair
    third = Process(tmp_path / "metrics")
    with third.workers.joined():
        third.orders.inc(5)
        third.open.set(5)

    shown = one.shown()

    assert (shown["orders_total"], shown["open_orders"]) == (5, 0)


def test_nothing_is_left_in_the_end(tmp_path):
    """The directory is removed, unless there is something else in it."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    for name in ("metrics", "other"):
        with Process(tmp_path / name).workers.joined():
            pass

    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["other", "mine"]


def test_an_earlier_run_does_not_count(tmp_path):
    """All were killed, and their files are left: the counters begin anew, as they do after any restart."""
    old = Process(tmp_path)
    with ExitStack() as stack:
        stack.enter_context(old.workers.joined())
        old.orders.inc(9)
        old.workers._write()
        old.die()
        new = Process(tmp_path)
        with new.workers.joined():
            assert new.shown()["orders_total"] == 0


def test_two_apps_of_one_process_are_one_worker(tmp_path):
    """Otherwise their registry would be counted twice."""
    process = Process(tmp_path)
    with process.workers.joined():
        with process.workers.joined():
            process.orders.inc()
            assert process.shown()["orders_total"] == 1
        assert process.shown()["orders_total"] == 1
        assert len(list(tmp_path.glob("*.alive"))) == 1


@pytest.mark.parametrize("place", ["a file", "another's"])
def test_without_a_place_a_worker_shows_its_own(tmp_path, caplog, monkeypatch, place):
    """It says so once, and serves."""
    if place == "a file":
        (tmp_path / "metrics").touch()
    else:
        monkeypatch.setattr("os.geteuid", lambda: 12_345)
    process = Process(tmp_path / "metrics")

    with process.workers.joined():
        process.orders.inc()
        shown = process.shown()

    assert shown["orders_total"] == 1
    assert "no place to share" in caplog.text


def test_a_place_that_vanishes(tmp_path, caplog):
    """Somebody has removed the directory: the scrape shows what there is, and the writer goes on trying."""
    process = Process(tmp_path / "metrics")
    with process.workers.joined():
        for path in (tmp_path / "metrics").iterdir():
            path.unlink()
        (tmp_path / "metrics").rmdir()
        process.orders.inc()
        time.sleep(_workers.INTERVAL * 1.2)
        shown = process.shown()
        assert process.workers._thread.is_alive()

    assert shown["orders_total"] == 1
    assert "one worker only" in caplog.text


def joined(*registries: CollectorRegistry) -> dict[str, float]:
    several = [_samples.load(_samples.dump(_samples.families(Collectors(registry)))) for registry in registries]
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in _samples.merged(several, registries[0])
        for sample in family.samples
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(busy, value):
    """JSON has no such number, Prometheus has."""
    one, two = busy
    one.open.set(value)
    two.open.set(2)
    two.shown()

    shown = [one.shown(), two.shown()]

    assert [str(each["open_orders"]) for each in shown] == [str(value + 2)] * 2
    assert [each["orders_total"] for each in shown] == [7, 7]


class Broken:
    """A collector that yields a metric, and then raises."""

    def collect(self):
        yield GaugeMetricFamily("before", "Shown.", value=1)
        raise RuntimeError("the queue is gone")


class Nonsense:
    """A collector of what cannot be written: no number, and half of a surrogate pair, as a client may send it."""

    def collect(self):
        yield GaugeMetricFamily("nonsense", "No number.", value="much")
        half = GaugeMetricFamily("half", "Half of a pair.", labels=["key"])
        half.add_metric(["\ud800"], 1)
        yield half


def test_a_collector_that_raises(pair, monkeypatch, caplog):
    """It is logged once, the rest is shown, and the other worker goes on hearing of it."""
    one, two = pair
    monkeypatch.setattr(_workers, "INTERVAL", 0.01)
    one.registry.register(Broken())
    one.registry.register(Nonsense())
    one.orders.inc(3)

    shown = [each.shown() for each in (one, two, one)]

    assert [each["orders_total"] for each in shown] == [3, 3, 3]
    assert [each["before"] for each in shown] == [1, 1, 1]
    assert [each["half"] for each in shown] == [1, 1, 1]
    assert one.workers._thread.is_alive()
    assert [record.getMessage().split()[3] for record in caplog.records] == ["Broken", "nonsense"]


def test_a_writer_that_fails_goes_on(tmp_path, monkeypatch, caplog):
    """Whatever it was, it is logged once, and the next second may be better."""
    monkeypatch.setattr(_workers, "INTERVAL", 0.01)
    process = Process(tmp_path)
    with process.workers.joined():
        written = threading.Event()
        write, failures = process.workers._write, [RuntimeError("first"), RuntimeError("second")]

        def fail():
            if failures:
                raise failures.pop(0)
            written.set()
            return write()

        monkeypatch.setattr(process.workers, "_write", fail)
        assert written.wait(10)

    assert [record.getMessage() for record in caplog.records] == ["metrics cannot be shared with other workers: first"]


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '[["", "", "gauge", []]]', '[["a", "", "what", []]]'])
def test_a_file_that_cannot_be_read(busy, tmp_path, caplog, content):
    """A worker that was killed, or a disk that was full, leaves half a file: it is left out, which is logged once."""
    one, _ = busy
    (tmp_path / "metrics" / "half.json").write_text(content)

    shown = [one.shown(), one.shown()]

    assert [each["orders_total"] for each in shown] == [3, 3]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the metrics of a worker are left out, because half.json cannot be read"
    ]


def test_a_dead_worker_whose_file_cannot_be_read(busy, tmp_path, caplog):
    """It is dropped, and does not stay in the way of those that die later."""
    one, two = busy
    two.die()
    (tmp_path / "metrics" / two.workers._file).write_text("{")

    shown = [one.shown(), one.shown()]

    assert [each["orders_total"] for each in shown] == [3, 3]
    assert not (tmp_path / "metrics" / two.workers._file).exists()


def test_a_worker_that_nobody_can_ask(busy, tmp_path, monkeypatch):
    """Whether it lives cannot be told where its file may not be opened, so it does."""
    one, _ = busy
    (tmp_path / "metrics" / "foreign.alive").mkdir()

    assert one.shown()["orders_total"] == 3


def test_a_registry_shows_its_target_and_may_collect_as_it_likes():
    """`target_info` is no collector; a subclass may have its own idea of what it has."""

    class Own(CollectorRegistry):
        def collect(self):
            yield GaugeMetricFamily("own", "Own.", value=1)

    assert joined(CollectorRegistry(target_info={"version": "1"})) == {"target_info1": 1}
    assert joined(Own()) == {"own": 1}


@pytest.mark.parametrize(
    ("mode", "value"), [("all", 5), ("livesum", 5), ("min", 2), ("livemin", 2), ("max", 3), ("livemax", 3)]
)
def test_how_gauges_are_joined(mode, value):
    """As the gauge itself says; a sum where it says nothing of the kind."""
    registries = [CollectorRegistry(), CollectorRegistry()]
    for registry, each in zip(registries, (2, 3), strict=True):
        Gauge("level", "Level.", registry=registry, multiprocess_mode=mode).set(each)

    assert joined(*registries) == {"level": value}


def test_how_others_are_joined():
    """Histograms bucket by bucket, times by the earliest, descriptions once."""
    registries = [CollectorRegistry(), CollectorRegistry()]
    for number, registry in enumerate(registries, 1):
        Histogram("size", "Size.", ["kind"], buckets=(1, 2), registry=registry).labels("a").observe(number)
        Gauge("process_start_time_seconds", "Start.", registry=registry).set(number)
        Gauge("build_info", "Build.", registry=registry).set(1)

    shown = joined(*registries)

    assert shown["size_counta"] == 2
    assert shown["size_suma"] == 3
    assert (shown["size_bucketa1.0"], shown["size_bucketa2.0"], shown["size_bucketa+Inf"]) == (1, 2, 2)
    assert shown["process_start_time_seconds"] == 1
    assert shown["build_info"] == 1


def test_where_workers_meet(monkeypatch, tmp_path):
    """In the directory of the variable; under gunicorn in one that is named after the parent; otherwise nowhere."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    assert shared_directory() is None
    assert Workers.of(REGISTRY) is None
    monkeypatch.setattr(_workers, "several_workers", lambda: True)
    assert shared_directory().name == f"fastapi-prodkit-{os.getuid()}-{os.getppid()}"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert shared_directory() == tmp_path
    assert Workers.of(CollectorRegistry()) is None
    try:
        assert Workers.of(REGISTRY) is Workers.of(REGISTRY)
    finally:
        vars(REGISTRY).pop(_scope.REGISTRY_WORKERS)


def test_places_to_write(monkeypatch, tmp_path):
    """Memory, then where temporary files are; if there is none at all, that is for later to say."""
    monkeypatch.setattr(_workers, "_MEMORY", tmp_path)
    assert _workers._place() == tmp_path
    monkeypatch.setattr(_workers, "_MEMORY", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", "/var/tmp")
    assert _workers._place() == Path("/var/tmp")

    def none():
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert _workers._place() == tmp_path / "none"


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "tmp").mkdir()
    return tmp_path


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def ask_until_all(port: int, count: int) -> dict[str, int]:
    """Ask over new connections until so many workers have answered; return how often each has."""
    answered: dict[str, int] = {}
    deadline = time.monotonic() + 30
    while len(answered) < count:
        assert time.monotonic() < deadline, answered
        pid = get(port, "/worker")
        answered[pid] = answered.get(pid, 0) + 1
        time.sleep(0.01)
    return answered


def shown_in_time(port: int, name: str, value: float) -> dict[str, float]:
    deadline = time.monotonic() + 20
    while (shown := values(get(port, "/metrics"))).get(name) != value:
        assert time.monotonic() < deadline, f"{name} is {shown.get(name)} and not {value}"
        time.sleep(0.05)
    return shown


SERVERS = {
    "uvicorn": ("uvicorn", "served:app", "--workers", "2", "--port"),
    "fastapi-prodkit": ("fastapi_prodkit", "serve", "served:app", "--workers", "2", "--port"),
    "gunicorn": ("gunicorn", "served:app", "-w", "2", "-k", "uvicorn_worker.UvicornWorker", "-b"),
    "hypercorn": ("hypercorn", "served:app", "--workers", "2", "-b"),
    "granian": ("granian", "served:app", "--workers", "2", "--interface", "asgi", "--port"),
}
NEEDED = {"fastapi-prodkit": ("typer", "uvicorn"), "gunicorn": ("gunicorn", "uvicorn_worker")}  # else the server's own


@pytest.mark.system
@pytest.mark.parametrize("server", SERVERS)
def test_two_workers_one_killed(server, directory):
    """Every scrape has the sum of all requests; it never falls, not even when a worker is killed in mid-service."""
    for module in NEEDED.get(server, (server,)):
        pytest.importorskip(module, reason=f"needs {module}")
    port = free_port()
    where = f"127.0.0.1:{port}" if server in {"gunicorn", "hypercorn"} else str(port)
    with running(*SERVERS[server], where, directory=directory, port=port) as process:
        answered = ask_until_all(port, 2)
        shown = shown_in_time(port, "orders_total", sum(answered.values()))
        assert shown["open_orders"] == 2
        assert shown["http_server_request_duration_seconds_count"] == sum(answered.values())
        assert shown["process_resident_memory_bytes"] > 2 * 20e6 or sys.platform != "linux"
        assert "this is a worker process" in process.output()

        if server in {"hypercorn", "granian"}:
            return  # what they do about a worker that is killed is their own affair
        os.kill(int(next(iter(answered))), signal.SIGKILL)
        shown = shown_in_time(port, "open_orders", 1)
        assert shown["orders_total"] >= sum(answered.values())
        again = ask_until_all(port, 2)
        shown = shown_in_time(port, "orders_total", sum(answered.values()) + sum(again.values()))
        assert shown["open_orders"] == 2

        process.terminate()
        process.wait()
        assert not (_workers._place() / f"fastapi-prodkit-{os.getuid()}-{process.pid}").exists()


def test_the_call_that_began_a_worker_says_how_many_there_are():
    """No variable does; a call of a server's module that has no such number is passed over."""
    module = {"__name__": "uvicorn._subprocess", "several_workers": several_workers}
    exec("def begin(config): return several_workers()", module)

    assert module["begin"](SimpleNamespace(workers=2)) is True
    assert module["begin"](SimpleNamespace(workers=1)) is False
    assert module["begin"](None) is False


PRODUCTION = {"ENVIRONMENT": "prod", "HOSTS_ALLOWED": "127.0.0.1", "METRICS_PUBLIC": "true"}
REFUSING = """
from fastapi_prodkit import create_app

app = create_app()
"""


@pytest.mark.system
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("workers", ["2", "1"])
def test_production_refuses_workers_that_count_alone(server, workers, directory):
    """Each of several would give clients the limit once more; one worker is served, whatever starts it."""
    for module in NEEDED.get(server, (server,)):
        pytest.importorskip(module, reason=f"needs {module}")
    (directory / "served.py").write_text(REFUSING)
    port = free_port()
    where = f"127.0.0.1:{port}" if server in {"gunicorn", "hypercorn"} else str(port)
    command = (*(workers if argument == "2" else argument for argument in SERVERS[server]), where)

    with running(*command, directory=directory, port=port, listening=workers == "1", **PRODUCTION) as process:
        if workers == "1":
            assert get(port, "/metrics").startswith("#")
        else:
            deadline = time.monotonic() + 30
            while "would count for itself" not in process.output():
                assert time.monotonic() < deadline, process.output()
                time.sleep(0.05)


@pytest.mark.system
def test_a_directory_of_ones_own(directory):
    """That of prometheus_client is made, used, and left empty; its own files go as well."""
    pytest.importorskip("uvicorn", reason="needs uvicorn")
    port, place = free_port(), directory / "tmp" / "metrics"
    command = ("uvicorn", "served:app", "--workers", "2", "--port", str(port))
    with running(*command, directory=directory, port=port, PROMETHEUS_MULTIPROC_DIR=str(place)) as process:
        answered = ask_until_all(port, 2)
        shown_in_time(port, "orders_total", sum(answered.values()))
        assert list(place.glob("*.alive"))
        process.terminate()
        process.wait()

    assert not place.exists()


def test_a_directory_that_cannot_be_made(monkeypatch):
    """prometheus_client would fail over it somewhere in the middle of the first metric."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/proc/nowhere")

    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        create_app(Settings(environment="test"))


@pytest.mark.system
def test_a_service_that_cannot_write(directory):
    """Without a place for files each worker shows its own, and says so once."""
    pytest.importorskip("uvicorn", reason="needs uvicorn")
    port = free_port()
    (directory / "tmp").rmdir()
    (directory / "tmp").touch()
    command = ("uvicorn", "served:app", "--workers", "2", "--port", str(port))
    (directory / "sitecustomize.py").write_text(NO_PLACE.format(str(directory / "tmp")))
    with running(*command, directory=directory, port=port) as process:
        ask_until_all(port, 2)
        shown = values(get(port, "/metrics"))

        assert shown["orders_total"] >= 1
        assert process.output().count("no place to share") == 2
