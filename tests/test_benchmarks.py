"""The benchmarks: that they measure what they say, and that the documentation has their results."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("orjson")

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import asgi
import candidates
import charts
import fixed_rate
import hostile
import in_process
import ours
import report
import routing
from tables import Table, from_json, number

ROWS = {
    "request_id": {"GET": 1.1, "rate": 9.0},
    "create_app": {"GET": 1.5, "rate": 5.0},
    "theirs": {"GET": 1.2, "rate": 9.5},
    "alike": {"GET": 1.09, "rate": None},
}


@pytest.fixture
def table():
    return Table("t", "Title", "times", ROWS, {"theirs": "request_id", "alike": "request_id"}, higher=("rate",))


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_pages_have_the_figures_of_the_newest_results(page):
    """After a run of the benchmarks, `benchmarks/report.py` fills the blocks of each page."""
    text = page.read_text()

    assert "<!-- benchmark: " in text
    assert report.filled(text, report.newest()) == text


@pytest.mark.parametrize("name", report.DRAWN)
def test_charts_have_the_figures_of_the_newest_results(name):
    """Each chart that a page shows is drawn from the results."""
    drawn = (report.CHARTS / f"{name}.svg").read_text()

    assert report.chart(name, report.newest()) == drawn
    assert f"charts/{name}.svg" in (ROOT / "docs/performance.md").read_text()


def test_results_have_a_table_for_each_block():
    """The page of the figures leaves out no table that was measured."""
    page = (ROOT / "docs/performance.md").read_text()

    missing = [name for name in report.newest().tables if f"<!-- benchmark: {name} -->" not in page]

    assert missing == []


def test_charts_are_read_by_screen_readers_and_on_dark_pages():
    """The SVG is an image with a title and a text with all numbers, and has colours for both kinds of page."""
    drawn = charts.bars("A & B", {"ours": 1.0, "<theirs>": 2.5}, frozenset({"ours"}))
    root = ET.fromstring(drawn)

    texts = {element.tag.rpartition("}")[2]: element.text for element in root}

    assert root.get("role") == "img"
    assert texts["title"] == "A & B"
    assert texts["desc"] == "ours: 1.00; <theirs>: 2.50"
    assert "prefers-color-scheme: dark" in drawn


def test_tables_show_where_a_peer_is_better(table):
    """By more than the margin, in the direction of each column."""
    defeats = [(defeat.peer, defeat.column) for defeat in table.defeats()]

    assert defeats == [("theirs", "rate")]
    assert "| theirs | 1.20 | **9.50** |" in table.markdown()


def test_tables_have_each_peer_behind_the_piece_that_does_the_same(table):
    """Whatever the order in which they were measured."""
    assert [name for name, _ in table.ordered()] == ["request_id", "theirs", "alike", "create_app"]


def test_tables_are_the_same_after_json(table, tmp_path, capsys):
    """A part prints its tables, and hands them over as JSON."""
    import tables

    tables.show([table], tmp_path / "table.json")

    assert [from_json(entry) for entry in json.loads((tmp_path / "table.json").read_text())] == [table]
    assert "request_id" in capsys.readouterr().out


def test_numbers_have_about_three_digits():
    """A dash is what was not measured."""
    assert [number(each) for each in (None, 0.123, 12.34, 1234.5)] == ["-", "0.12", "12.3", "1 234"]


def test_in_process_measures_what_every_kind_of_request_costs():
    """A tiny round of the whole assembly, after it has shown that it does all of its jobs."""
    measured = in_process.measure_named(ours.WHOLE, ["GET", "404", "429"], 1)

    assert list(measured) == ["GET", "404", "429"]
    assert all(base > 0 and own > 0 for base, own in measured.values())


def test_in_process_leaves_out_what_an_app_does_not_do():
    """An app that limits nothing has no 429."""
    assert list(in_process.measure_named("request_id", ["GET", "429"], 1)) == ["GET"]


@pytest.mark.parametrize("job", sorted(candidates.PROOFS.keys() - {"spans"}))
def test_candidates_that_do_not_do_their_job_are_not_measured(job):
    """Bare `FastAPI()` does none of the jobs."""
    idle = candidates.Candidate(lambda _: ours.bare(), (job,))

    with asgi.output() as out, pytest.raises(SystemExit, match=job):
        asyncio.run(candidates.prove("bare", idle, idle.make(""), out))


def test_answer_is_not_whole_if_its_start_is_sent_twice():
    """As by slowapi's ASGI middleware for a stream."""

    async def app(scope, receive, send):
        for more in (True, False):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": more})

    assert not asyncio.run(asgi.answer(app, candidates.GET)).whole


def test_routing_measures_each_kind_of_request():
    """The last route, the first, and an unknown path, through the index and through FastAPI's own router."""
    measured = routing.measure_named("index_routes", 3, 1)

    assert list(measured) == ["last", "first", "unknown"]


def test_hostile_requests_of_the_whole_assembly_add_no_series():
    """Neither addresses nor unknown paths are in labels."""
    assert hostile.measure_named(ours.WHOLE, 40)["series more"] == 0


class Holding:
    """A server that answers nobody until `held` requests have arrived, and then at once."""

    def __init__(self, held):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.arrived = threading.Semaphore(0)
        self.answering = threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()
        threading.Thread(target=self.release, args=(held,), daemon=True).start()

    def accept(self):
        for _ in range(fixed_rate.CONNECTIONS):
            threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()

    def release(self, held):
        for _ in range(held):
            self.arrived.acquire()
        self.answering.set()

    def serve(self, connection):
        while connection.recv(1000):
            self.arrived.release()
            self.answering.wait()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        connection.close()


def test_fixed_rate_counts_the_time_that_requests_had_to_wait():
    """Requests have their times: who is due while the server pauses has waited since then."""
    rate, held = 200, 16
    server = Holding(held)

    times = fixed_rate.latencies(server.port, b"GET / HTTP/1.1\r\n\r\n", rate, 0.1)
    server.listener.close()

    assert len(times) == 20
    assert max(times) >= (held - 1) / rate
    assert fixed_rate.percentile([3.0, 1.0, 2.0], 0.5) == 2.0


@pytest.mark.system
def test_over_the_wire_measures_throughput_and_latency(monkeypatch):
    """Of servers in processes of their own, throughput where wrk is installed."""
    import over_the_wire

    monkeypatch.setattr(over_the_wire, "THROUGHPUT_SECONDS", 1)
    monkeypatch.setattr(over_the_wire, "LATENCY_SECONDS", 0.2)

    rows = over_the_wire.table((ours.BARE, ours.WHOLE), 1).rows

    assert list(rows) == [ours.BARE, ours.WHOLE]
    assert all(cells["p50, ms"] > 0 for cells in rows.values())


@pytest.mark.system
def test_start_up_ends_with_the_first_answer():
    """The CPU time of the server is part of it."""
    import start_up

    (cells,) = start_up.table((ours.WHOLE,), 1).rows.values()

    assert cells["seconds"] > 0
    assert cells["CPU seconds"] > 0


def test_parts_are_scripts_beside_the_runner():
    """`python benchmarks` runs each of them by its name."""
    runner = (ROOT / "benchmarks/__main__.py").read_text().partition("PARTS")[2].partition("}")[0]
    parts = [line.split('"')[1] for line in runner.splitlines() if '": (' in line]

    assert len(parts) > 8
    assert [part for part in parts if not (ROOT / "benchmarks" / f"{part}.py").exists()] == []


@pytest.mark.system
def test_database_reads_and_writes_without_failures(monkeypatch):
    """By our session, by hand-written ones, and by those peers that are installed."""
    pytest.importorskip("asyncpg")
    import database
    from postgres import postgres_or_skip

    monkeypatch.setattr(database, "ROUND", 0.05)
    with postgres_or_skip() as server:
        asyncio.run(database.fill(server.url()))
        results = asyncio.run(database.measure(server.url(), 0.1))

    assert database.OURS in results
    assert all(failed == 0 and left == 0 for _, _, failed, left in results.values())


@pytest.mark.system
def test_rate_limit_measures_ours_and_slowapi_on_redis(tmp_path):
    """One round of everything, in a process of its own, whose tables arrive as JSON."""
    pytest.importorskip("redis")
    from redis_servers import redis_or_skip

    written = tmp_path / "tables.json"
    with redis_or_skip():
        command = [sys.executable, ROOT / "benchmarks/rate_limit.py", "--rounds", "1", "--json", written]
        subprocess.run(command, check=True, capture_output=True)

    (table,) = map(from_json, json.loads(written.read_text()))
    assert {"RateLimitMiddleware", "SlowAPIASGIMiddleware"} < set(table.rows)
    assert all(cells["on Redis"] > 0 for cells in table.rows.values())


def test_auth_measures_each_kind_of_request():
    """Of an app whose issuer is asked for its configuration and its keys, and then no more."""
    pytest.importorskip("jwt")
    import auth

    measured = auth.measure_named(auth.DEPENDENCY, 1)

    assert list(measured) == [*(f"{kind}, us" for kind in auth.STATUSES), "requests"]
    assert measured["requests"] == 2


def test_auth_counts_the_tokens_that_are_known(monkeypatch):
    """After more were sent than the cache keeps, and the memory of those that it keeps."""
    pytest.importorskip("jwt")
    import auth

    monkeypatch.setattr(auth, "SENT", 30)
    monkeypatch.setattr("fastapi_prodkit.auth.cache.MOST_ENTRIES", 20)

    remembered = asyncio.run(auth.remember({}))

    assert (remembered["sent"], remembered["known"]) == (30, 20)
    assert remembered["MB"] > 0
