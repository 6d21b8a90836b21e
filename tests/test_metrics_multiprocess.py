"""Metrics of several worker processes: each shows the numbers of all."""

import http.client
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path

import pytest
from processes import free_port, running
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, Metric, Sample
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fastapi_prodkit import Settings, _scope, create_app
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.metrics import aggregation, multiprocess
from fastapi_prodkit.metrics.aggregation import Collectors
from fastapi_prodkit.metrics.multiprocess import Workers, shared_directory

pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers meet under POSIX only")

SERVED = """
import os

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily

from fastapi_prodkit import Settings, create_app


class Unshowable:
    def describe(self):
        return []

    def collect(self):
        yield "no metric"
        yield GaugeMetricFamily("huge", "Beyond floats.", value=10**400)


REGISTRY.register(Unshowable())
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

from fastapi_prodkit import _scope
from fastapi_prodkit.metrics import multiprocess

tempfile.tempdir = {!r}
multiprocess._MEMORY = Path("/proc/nowhere")
"""


class Process:
    """A worker process, represented by its registry."""

    def __init__(self, directory: Path) -> None:
        self.registry = CollectorRegistry()
        self.orders = Counter("orders", "Orders.", registry=self.registry)
        self.open = Gauge("open_orders", "Open orders.", registry=self.registry)
        self.workers = Workers(self.registry, directory)

    def shown(self) -> dict[str, float]:
        return values(generate_latest(self.workers).decode())

    def die(self) -> None:
        """Release the lock, as the operating system does for a killed process."""
        self.workers._ending.set()
        self.workers._thread.join()
        self.workers._lock_file.close()
        self.workers._lock_file = None  # nothing is left to do for its end


def values(text: str) -> dict[str, float]:
    """Return the samples; those with labels by the sum of their values."""
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
    """Two workers that have counted and measured; the first has written its numbers."""
    one, two = pair
    one.orders.inc(3)
    two.orders.inc(4)
    one.open.set(1)
    two.open.set(2)
    one.shown()
    return pair


def test_each_worker_shows_the_sums(busy):
    """With the numbers that the others have written last."""
    _, two = busy

    shown = two.shown()

    assert (shown["orders_total"], shown["open_orders"]) == (7, 3)


def test_workers_write_every_second(pair):
    """A worker writes its numbers on a timer, so other workers show them although the worker is not scraped."""
    one, two = pair
    one.orders.inc(3)

    deadline = time.monotonic() + 20
    while two.shown()["orders_total"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_counters_of_a_dead_worker_stay_and_gauges_go(busy):
    """The counter of a dead worker stays in the sum, so that it never decreases, and its gauge is removed."""
    one, two = busy
    one.die()

    for _ in range(2):
        shown = two.shown()
        assert (shown["orders_total"], shown["open_orders"]) == (7, 2)


def test_dead_workers_leave_one_file(tmp_path):
    """The files of all dead workers are merged into one, so the directory does not grow with restarts."""
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
            assert len(list(tmp_path.glob("*.json"))) == 3  # one for each living worker, and one for all others


def test_ending_worker_writes_its_counters(pair, tmp_path):
    """The last worker removes the directory."""
    one, _ = pair
    third = Process(tmp_path / "metrics")
    with third.workers.joined():
        third.orders.inc(5)
        third.open.set(5)

    shown = one.shown()

    assert (shown["orders_total"], shown["open_orders"]) == (5, 0)


def test_directory_is_removed_unless_it_has_other_files(tmp_path):
    """The directory of the workers is removed at the end if it contains no other files."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    for name in ("metrics", "other"):
        with Process(tmp_path / name).workers.joined():
            pass

    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["other", "mine"]


def test_files_of_an_earlier_run_are_removed(tmp_path):
    """Its workers were killed."""
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
    """A process that joins twice through two apps counts as one worker, so its metrics are not added twice."""
    process = Process(tmp_path)
    with process.workers.joined():
        with process.workers.joined():
            process.orders.inc()
            assert process.shown()["orders_total"] == 1
        assert process.shown()["orders_total"] == 1
        assert len(list(tmp_path.glob("*.alive"))) == 1


@pytest.mark.parametrize("place", ["a file", "another's"])
def test_worker_without_a_directory_shows_its_own_metrics(tmp_path, caplog, monkeypatch, place):
    """And logs it once."""
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


def test_removed_directory_does_not_fail_scrapes(tmp_path, caplog):
    """A scrape shows the worker's own metrics if the shared directory is gone, and the writer keeps running."""
    process = Process(tmp_path / "metrics")
    with process.workers.joined():
        for path in (tmp_path / "metrics").iterdir():
            path.unlink()
        (tmp_path / "metrics").rmdir()
        process.orders.inc()
        time.sleep(multiprocess.INTERVAL * 1.2)
        shown = process.shown()
        assert process.workers._thread.is_alive()

    assert shown["orders_total"] == 1
    assert "one worker only" in caplog.text


def joined(*registries: CollectorRegistry) -> dict[str, float]:
    several = [aggregation.load(aggregation.dump(list(Collectors(registry).collect()))) for registry in registries]
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in aggregation.merge(several, registries[0])
        for sample in family.samples
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_infinite_values_are_shared(busy, value):
    """JSON has no such numbers."""
    one, two = busy
    one.open.set(value)
    two.open.set(2)
    two.shown()

    shown = [one.shown(), two.shown()]

    assert [str(each["open_orders"]) for each in shown] == [str(value + 2)] * 2
    assert [each["orders_total"] for each in shown] == [7, 7]


class Yields:
    """A collector of the given metrics."""

    def __init__(self, *metrics):
        self.metrics = metrics

    def collect(self):
        return iter(self.metrics)


def family(name, *samples, documentation="A gauge."):
    made = Metric(name, documentation, "gauge")
    made.samples.extend(samples or [Sample(name, {}, 1)])
    return made


def counter(name, exemplar):
    made = CounterMetricFamily(name, "A counter.")
    made.add_metric([], 1, exemplar=exemplar)
    return made


UNSHOWABLE = {
    "a text as value": family("bad", Sample("bad", {}, "much")),
    "no value": family("bad", Sample("bad", {}, None)),
    "a value beyond floats": family("bad", Sample("bad", {}, 10**400)),
    "a label that is no text": family("bad", Sample("bad", {"key": 5}, 1)),
    "a label name that is no text": family("bad", Sample("bad", {5: "x"}, 1)),
    "a label without a name": family("bad", Sample("bad", {"": "x"}, 1)),
    "half a pair in a label name": family("bad", Sample("bad", {"\ud800": "x"}, 1)),
    "a sample without a name": family("bad", Sample("", {}, 1)),
    "no sample": family("bad", ("bad", {}, 1)),
    "no documentation": family("bad", documentation=None),
    "half a pair in the documentation": family("bad", documentation="\udcff"),
    "a time that is not finite": family("bad", Sample("bad", {}, 1, float("nan"))),
    "a time that is no number": family("bad", Sample("bad", {}, 1, "now")),
    "an exemplar of a gauge": family("bad", Sample("bad", {}, 1, None, Exemplar({"trace": "1"}, 1))),
    "an exemplar that OpenMetrics cannot write": counter("bad", Exemplar({"trace id": "1"}, 1)),
    "an exemplar with half a pair": counter("bad", Exemplar({"trace": "\ud800"}, 1)),
    "one bad sample of two": family("bad", Sample("bad", {}, 1), Sample("bad", {"key": "x"}, "much")),
}


@pytest.fixture(params=[False, True], ids=["one process", "two workers"])
def scrape(request, tmp_path):
    """Scrape a registry twice in both formats, in the only process or in one of two."""

    def scrape(registry):
        with ExitStack() as workers:
            shown = Workers(registry, tmp_path) if request.param else Collectors(registry)
            if request.param:
                workers.enter_context(Process(tmp_path).workers.joined())
                workers.enter_context(shown.joined())
            return [encode(shown).decode() for encode in (generate_latest, openmetrics) * 2]

    return scrape


@pytest.mark.parametrize("kind", UNSHOWABLE)
def test_invalid_metric_is_left_out_and_logged_once(scrape, caplog, kind):
    """In both formats."""
    registry = CollectorRegistry()
    registry.register(Yields(family("before"), UNSHOWABLE[kind], family("after")))
    Gauge("other", "Of another collector.", registry=registry).set(1)

    texts = scrape(registry)

    for text in texts:
        assert {"before 1.0", "after 1.0", "other 1.0"} <= {*text.splitlines()}
        assert "bad" not in text
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("WARNING", "the metrics of bad are left out, and all others shown")
    ]
    assert "before" not in caplog.text


@pytest.mark.parametrize("junk", ["junk", None, 5, object()])
def test_object_that_is_no_metric_is_logged_by_its_collector(scrape, caplog, junk):
    """An object without a metric's name is skipped, and the warning names the collector that yielded it."""
    registry = CollectorRegistry()
    registry.register(Yields(junk, family("after")))

    texts = scrape(registry)

    assert all("after 1.0" in text for text in texts)
    assert [each.getMessage().split()[3] for each in caplog.records] == ["Yields"]


class Unwilling:
    """A collector that raises, or returns nothing that can be iterated."""

    def __init__(self, collect):
        self.collect = collect


def raise_later():
    yield family("before")
    raise RuntimeError("the queue is gone")


def raise_at_once():
    raise RuntimeError("the queue is gone")


@pytest.mark.parametrize("collect", [raise_later, raise_at_once, lambda: None, None])
def test_failing_collector_is_logged_once(scrape, caplog, collect):
    """The metrics that it has yielded are shown."""
    registry = CollectorRegistry()
    registry.register(Unwilling(collect))
    Gauge("other", "Of another collector.", registry=registry).set(1)

    texts = scrape(registry)

    assert all("other 1.0" in text for text in texts)
    assert all(("before 1.0" in text) is (collect is raise_later) for text in texts)
    assert [(each.levelname, each.getMessage().split()[3]) for each in caplog.records] == [("WARNING", "Unwilling")]
    assert caplog.records[0].exc_info is not None


def test_failing_function_of_a_metric_is_logged_by_name(scrape, caplog):
    """The warning about a gauge whose function raises has the name of the gauge, not of its class."""
    registry = CollectorRegistry()
    Gauge("queue_size", "Messages.", registry=registry).set_function(lambda: 1 / 0)

    scrape(registry)

    assert [each.getMessage().split()[3] for each in caplog.records] == ["queue_size"]


def test_base_exception_of_a_collector_passes(scrape):
    """A SystemExit raised in a collector propagates to the caller of the scrape and is not caught."""
    registry = CollectorRegistry()
    registry.register(Unwilling(lambda: sys.exit(3)))

    with pytest.raises(SystemExit):
        scrape(registry)


def test_unusual_metrics_are_shown(scrape, caplog):
    """Infinite numbers, lone surrogates, odd names, and repeated names."""
    registry = CollectorRegistry()
    halves = [Sample("half", {"key": "\ud800"}, 1), Sample("half", {"key": 'a"\n'}, Decimal(2))]
    registry.register(Yields(family("half", *halves), family("odd.name-1", Sample("odd.name-1", {"a-b": "c"}, True))))
    registry.register(
        Yields(family("nan", Sample("nan", {}, float("nan"), 123)), family("inf", Sample("inf", {}, "inf")))
    )
    registry.register(Yields(family("nan", Sample("nan", {"key": "x"}, 1))))
    Histogram("size", "Size.", registry=registry).observe(1, exemplar={"trace": "1"})

    texts = scrape(registry)

    for text in texts:
        assert 'half{key="\\\\ud800"} 1.0\n' in text
        assert 'half{key="a\\"\\n"} 2.0\n' in text
        assert 'odd_name_1{a_b="c"} 1.0\n' in text
        assert "\nnan NaN" in text
        assert 'nan{key="x"} 1.0' in text
        assert "\ninf +Inf\n" in text
        assert "size_sum 1.0" in text
    assert not caplog.records


def test_failed_write_is_logged_once_and_repeated(tmp_path, monkeypatch, caplog):
    """Repeated failures of the writer are logged once, and the writer tries again at the next interval."""
    monkeypatch.setattr(multiprocess, "INTERVAL", 0.01)
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


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[1]",
        '[["", "", "gauge", []]]',
        '[["a", "", "what", []]]',
        '[["a", null, "gauge", []]]',
        '[["a", "", "gauge", [["a", null, "1"]]]]',
        '[["a", "", "gauge", [["a", {"b": 1}, "1"]]]]',
        '[["a", "", "gauge", [["a", {}, "much"]]]]',
        '[["a", "", "gauge", [[5, {}, 1]]]]',
    ],
)
def test_unreadable_file_is_left_out_and_logged_once(busy, tmp_path, caplog, content):
    """Such as one that a killed worker has written partially."""
    one, _ = busy
    (tmp_path / "metrics" / "half.json").write_text(content)

    shown = [one.shown(), one.shown()]

    assert [each["orders_total"] for each in shown] == [3, 3]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the metrics of a worker are left out, because half.json cannot be read"
    ]


def test_unreadable_file_of_a_dead_worker_is_removed(busy, tmp_path, caplog):
    """The unreadable file of a dead worker is deleted and omitted from the sums of later scrapes."""
    one, two = busy
    two.die()
    (tmp_path / "metrics" / two.workers._file).write_text("{")

    shown = [one.shown(), one.shown()]

    assert [each["orders_total"] for each in shown] == [3, 3]
    assert not (tmp_path / "metrics" / two.workers._file).exists()


def test_worker_whose_lock_cannot_be_opened_counts_as_alive(busy, tmp_path, monkeypatch):
    """A scrape does not fail if a worker's lock file cannot be opened; that worker is taken as alive."""
    one, _ = busy
    (tmp_path / "metrics" / "foreign.alive").mkdir()

    assert one.shown()["orders_total"] == 3


def test_target_info_and_registry_subclasses_are_collected():
    """The `target_info` metric and the metrics of a registry subclass with its own `collect` are collected."""

    class Own(CollectorRegistry):
        def collect(self):
            yield GaugeMetricFamily("own", "Own.", value=1)

    assert joined(CollectorRegistry(target_info={"version": "1"})) == {"target_info1": 1}
    assert joined(Own()) == {"own": 1}


@pytest.mark.parametrize(
    ("mode", "value"), [("all", 5), ("livesum", 5), ("min", 2), ("livemin", 2), ("max", 3), ("livemax", 3)]
)
def test_gauges_are_merged_by_their_mode(mode, value):
    """Without one they are summed."""
    registries = [CollectorRegistry(), CollectorRegistry()]
    for registry, each in zip(registries, (2, 3), strict=True):
        Gauge("level", "Level.", registry=registry, multiprocess_mode=mode).set(each)

    assert joined(*registries) == {"level": value}


def test_histograms_and_times_are_merged():
    """Bucket by bucket; the earliest time."""
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


def test_shared_directory_of_variable_or_parent(monkeypatch, tmp_path):
    """None without several workers."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    assert shared_directory() is None
    assert Workers.of(REGISTRY) is None
    monkeypatch.setattr(multiprocess, "is_one_of_several_workers", lambda: True)
    assert shared_directory().name == f"fastapi-prodkit-{os.getuid()}-{os.getppid()}"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert shared_directory() == tmp_path
    assert Workers.of(CollectorRegistry()) is None
    try:
        assert Workers.of(REGISTRY) is Workers.of(REGISTRY)
    finally:
        vars(REGISTRY).pop(_scope.REGISTRY_WORKERS)


def test_shared_directory_is_in_memory_if_possible(monkeypatch, tmp_path):
    """The shared directory is in memory, or in the temporary directory if no memory file system exists."""
    monkeypatch.setattr(multiprocess, "_MEMORY", tmp_path)
    assert multiprocess._place() == tmp_path
    monkeypatch.setattr(multiprocess, "_MEMORY", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", "/var/tmp")
    assert multiprocess._place() == Path("/var/tmp")

    def none():
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert multiprocess._place() == tmp_path / "none"


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
    """Scrape over new connections until so many workers have answered; return how often each has."""
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
def test_sums_never_decrease_when_a_worker_is_killed(server, directory):
    """The sum of requests includes those of a killed worker and continues with the worker that replaces it."""
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
        assert process.output().count("the metrics of huge are left out") == 2

        if server in {"hypercorn", "granian"}:
            return  # their handling of a killed worker is not tested here
        os.kill(int(next(iter(answered))), signal.SIGKILL)
        shown = shown_in_time(port, "open_orders", 1)
        assert shown["orders_total"] >= sum(answered.values())
        again = ask_until_all(port, 2)
        shown = shown_in_time(port, "orders_total", sum(answered.values()) + sum(again.values()))
        assert shown["open_orders"] == 2

        process.terminate()
        process.wait()
        assert not (multiprocess._place() / f"fastapi-prodkit-{os.getuid()}-{process.pid}").exists()


PRODUCTION = {"ENVIRONMENT": "prod", "HOSTS_ALLOWED": "127.0.0.1", "METRICS_PUBLIC": "true"}
REFUSING = """
from fastapi_prodkit import create_app

app = create_app()
"""


@pytest.mark.system
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("workers", ["2", "1"])
def test_production_refuses_workers_that_count_separately(server, workers, directory):
    """One worker is served."""
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
            while "would count separately" not in process.output():
                assert time.monotonic() < deadline, process.output()
                time.sleep(0.05)


@pytest.mark.system
def test_prometheus_multiproc_dir_is_created_and_cleared(directory):
    """Files of prometheus_client too."""
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


def test_prometheus_multiproc_dir_that_cannot_be_created_is_an_error(monkeypatch):
    """A PROMETHEUS_MULTIPROC_DIR that cannot be created fails `create_app` with an error naming the variable."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/proc/nowhere")

    with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
        create_app(Settings(environment="test"))


@pytest.mark.system
def test_service_without_a_writable_directory_serves(directory):
    """Each worker shows its own metrics, and logs it once."""
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
