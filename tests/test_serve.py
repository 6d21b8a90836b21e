"""`fastapi-prodkit serve` and `fastapi-prodkit health`: real processes, as in a container."""

import json
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import wire
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
pytest.importorskip("httptools", reason="needs the extra: pip install 'fastapi-prodkit[standard]'")

from processes import free_port, listens, running
from wire import connection, read_response, request

from fastapi_prodkit import create_app
from fastapi_prodkit.cli import main
from fastapi_prodkit.cli.serve import _default_workers, _load, _protocol, _run
from fastapi_prodkit.cli.supervisor import ServeConfig, Supervisor, bound_exit
from fastapi_prodkit.settings import Settings

SERVICE = """
from fastapi_prodkit import create_app

def create():
    app = create_app()

    @app.get("/")
    async def read():
        return "ok"

    return app

app = create()
"""

PLAIN = """
from fastapi import FastAPI
app = FastAPI()

@app.get("/health")
async def health():
    return "ok"
"""


@pytest.fixture(autouse=True)
def _do_not_exit(monkeypatch):
    """Let the command return, because it runs in the process of the tests."""
    monkeypatch.setattr("fastapi_prodkit.cli.supervisor.bound_exit", lambda code: None)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "served_app.py").write_text(SERVICE)
    (tmp_path / "plain.py").write_text(PLAIN)
    return tmp_path


def serving(directory, application, *arguments, **environment):
    port = free_port()
    environment = {"ENVIRONMENT": "test", "PORT": str(port), **environment}
    return running("fastapi_prodkit", "serve", application, *arguments, directory=directory, port=port, **environment)


def ask(port, *lines, wait=0.0):
    with socket.create_connection(("127.0.0.1", port), timeout=15) as client:
        client.sendall(request("GET", "/", *lines))
        return read_response(client)


def events(server):
    return [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_service_logs_json_and_exits_with_0(directory):
    """One line has the options; there is no Server header."""
    with serving(directory, "served_app:app") as server:
        response = ask(server.port)
        server.terminate()
        code = server.wait()
        lines = server.output().splitlines()

    assert b"200 OK" in response
    assert b"\r\nserver:" not in response.lower()
    assert code == 0
    announced = [event["event"] for event in map(json.loads, lines) if event["logger"] == "fastapi_prodkit.serve"]
    assert len(announced) == 1
    assert announced[0].endswith(": 1 worker, keep-alive 75 s, header timeout 10 s, shutdown grace 20 s")


@pytest.mark.system
def test_factory_is_called(directory):
    """`serve --factory` calls the factory and serves the app that the factory returns."""
    with serving(directory, "served_app:create", "--factory") as server:
        assert b"200 OK" in ask(server.port)


@pytest.mark.system
def test_web_concurrency_sets_the_workers(directory):
    """Their parent logs in the same format, and all exit with 0."""
    with serving(directory, "served_app:app", WEB_CONCURRENCY="2", RATE_LIMIT_ENABLED="false") as server:
        wait_for(lambda: server.output().count("Application startup complete") == 2)
        response = ask(server.port)
        server.terminate()

        assert server.wait() == 0
        assert b"200 OK" in response
        assert {event["environment"] for event in events(server)} == {"test"}
        assert any("Started parent process" in event["event"] for event in events(server))


@pytest.mark.system
def test_plain_fastapi_app_is_served_with_defaults(directory):
    """The limits of heads included."""
    with serving(directory, "plain:app", "--workers", "1") as server:
        assert main(["health", f"http://127.0.0.1:{server.port}/health"]) == 0
        assert b" 431 " in ask(server.port, *["a: b"] * 100)


def test_refused_heads_are_logged_and_counted(directory):
    """By the limits of the settings."""
    with serving(directory, "served_app:app", LIMITS_MAX_HEAD_SIZE="2000", LIMITS_MAX_HEADERS="10") as server:
        heads = [["a: b"], ["a: " + "b" * 2000], ["a: b"] * 10, ["a b: c"]]
        responses = [ask(server.port, *head) for head in heads]
        with connection(server.port) as client:
            client.sendall(request("GET", "/metrics"))
            shown = read_response(client).decode().splitlines()
        server.terminate()
        server.wait()
        lines = [event for event in events(server) if event["level"] in {"warning", "error"}]

    assert [response.split(b" ")[1] for response in responses] == [b"200", b"431", b"431", b"400"]
    assert [(line["event"], line["http_method"], line["client_ip"], line["reason"]) for line in lines] == [
        ("request", "GET", "127.0.0.1", "head larger than LIMITS_MAX_HEAD_SIZE=2000"),
        ("request", "GET", "127.0.0.1", "more header lines than LIMITS_MAX_HEADERS=10"),
        ("request", "GET", "127.0.0.1", "not valid HTTP: Invalid header token"),
    ]
    assert 'http_server_refusals_total{reason="head_too_large"} 2.0' in shown
    assert 'http_server_refusals_total{reason="malformed_request"} 1.0' in shown


@pytest.mark.system
def test_limits_enabled_false_sets_no_limits(directory):
    """With LIMITS_ENABLED=false the server accepts 200 headers and a header of 100,000 bytes."""
    with serving(directory, "served_app:app", LIMITS_ENABLED="false") as server:
        assert b"200 OK" in ask(server.port, *["a: b"] * 200, "c: " + "d" * 100_000)


class Worker:
    """A worker that ends at the second signal."""

    def __init__(self, signals):
        self.signals = signals

    def is_alive(self):
        return self.signals.count("terminate") < 1

    def join(self, timeout):
        self.signals.append(timeout)

    def terminate(self):
        self.signals.append("terminate")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_is_forwarded_to_the_workers(monkeypatch, number):
    """In a container only their parent gets it; no worker is replaced."""
    signals = []
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.__init__", lambda self: None)
    supervisor = Supervisor()
    supervisor.should_exit = threading.Event()
    supervisor.processes = [SimpleNamespace(process=Worker(signals))]
    supervisor.signal_queue = [number]
    supervisor.handle_signals()
    first = list(signals)
    supervisor.signal_queue = [signal.SIGTTIN, number]

    supervisor.join_all()

    assert first == []
    assert signals[1:] == ["terminate"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("starts", [True, False])
def test_uvicorn_gets_our_defaults(directory, monkeypatch, processes, starts):
    """For any number of processes; a failed start exits with 3."""
    told = []
    monkeypatch.setenv("WEB_CONCURRENCY", "1")

    def run(server):
        server.started = starts
        told.append(server.config)

    monkeypatch.chdir(directory)
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.__init__", lambda self, config, sockets: told.append(config))
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.run", lambda self: None)
    monkeypatch.setattr("uvicorn.Config.bind_socket", lambda self: None)

    code = main(["serve", "served_app:app", "--workers", str(processes)])

    [config] = told
    assert code == (0 if starts or processes > 1 else 3)
    assert (config.timeout_keep_alive, config.timeout_graceful_shutdown, config.header_timeout) == (75, 20, 10)
    assert (config.limits.max_head_size, config.limits.max_headers) == (65_536, 100)
    assert [config.access_log, config.server_header, config.proxy_headers] == [False] * 3
    assert (config.log_config is None) == (processes == 1)
    assert os.environ["WEB_CONCURRENCY"] == str(processes)  # which tells each worker the number of workers


@pytest.mark.parametrize(
    ("settings", "refused"),
    [({}, True), ({"RATE_LIMIT_ENABLED": "false"}, False), ({"ENVIRONMENT": "dev"}, False)],
)
def test_workers_that_count_separately_are_refused(directory, monkeypatch, capsys, settings, refused):
    """By the first process, because uvicorn would restart failing workers for ever."""
    started = []
    safe = {"ENVIRONMENT": "prod", "HOSTS_ALLOWED": "example.com", "WEB_CONCURRENCY": "1"}
    for name, value in {**safe, **settings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(directory)
    monkeypatch.delitem(sys.modules, "served_app", raising=False)
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.__init__", lambda self, config, sockets: started.append(1))
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.run", lambda self: None)
    monkeypatch.setattr("uvicorn.Config.bind_socket", lambda self: None)

    code = main(["serve", "served_app:app", "--workers", "2"])

    assert (code != 0, started == []) == (refused, refused)
    assert ("each of 2 worker processes would count separately" in capsys.readouterr().err) == refused


def test_settings_of_a_factory_are_used(directory, monkeypatch):
    """`serve` loads the app from a factory with the settings that the factory has built."""
    monkeypatch.chdir(directory)
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.syspath_prepend(directory)

    assert _load("served_app:create", factory=True).state.settings.environment == "test"


@pytest.mark.parametrize(
    ("application", "said"),
    [
        ("servd_app:app", "there is no module 'servd_app' here; try: fastapi-prodkit serve served_app:app"),
        ("nowhere:app", "there is no module 'nowhere' here; try: fastapi-prodkit serve --help"),
        ("served_app:nothing", "there is no 'nothing' in served_app; try: fastapi-prodkit serve served_app:app"),
        ("served_app", "'served_app' names no app; try: fastapi-prodkit serve served_app:app"),
    ],
)
def test_missing_app_is_one_line_with_a_suggestion(directory, monkeypatch, capsys, application, said):
    """An app that cannot be found exits with code 2 and one line that suggests a command."""
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("ENVIRONMENT", "test")

    code = main(["serve", application])

    error = capsys.readouterr().err
    assert (code, error) == (2, f"fastapi-prodkit: {said}\n")


@pytest.mark.system
@pytest.mark.parametrize("workers", ["1", "2"])
def test_failed_start_exits_with_3(directory, workers):
    """The log has the error, even without configured logging."""
    (directory / "broken.py").write_text(
        "from fastapi import FastAPI\nfrom contextlib import asynccontextmanager\n"
        "@asynccontextmanager\nasync def lifespan(app):\n    raise RuntimeError('no')\n    yield\n"
        "app = FastAPI(lifespan=lifespan)\n"
    )
    port = free_port()
    command = ("fastapi_prodkit", "serve", "broken:app", "--workers", workers, "--port", str(port))
    with running(*command, directory=directory, port=port, listening=False) as server:
        assert server.wait() == 3
        assert any("RuntimeError: no" in event["event"] for event in events(server))


@pytest.mark.system
def test_app_that_workers_cannot_load_stops_the_parent(directory):
    """With exit code 3."""
    (directory / "alone.py").write_text(
        "import multiprocessing\nfrom fastapi import FastAPI\napp = FastAPI()\n"
        "if multiprocessing.parent_process() is not None:\n    raise RuntimeError('not in a worker')\n"
    )
    port = free_port()
    command = ("fastapi_prodkit", "serve", "alone:app", "--workers", "2", "--port", str(port))
    with running(*command, directory=directory, port=port, listening=False) as server:
        assert server.wait() == 3
        failed = [event for event in events(server) if event["event"] == "the app cannot be loaded"]
        assert "RuntimeError: not in a worker" in failed[0]["exception"]


BROKEN = """
import sys
from pydantic import BaseModel, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from fastapi_prodkit import create_app

class StripeSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="STRIPE_")
    api_key: SecretStr
    retries: int = 3

class Price(BaseModel):
    amount: int
    currency: str

class Stripe(BaseModel):
    api: str
    retries: int = 3

    @field_validator("api")
    @classmethod
    def check(cls, value):
        raise ValueError(f"{value} is no key, {value!r}")

class Account(BaseModel):
    stripe: Stripe

class NestedSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="APP_", env_nested_delimiter="__")
    account: Account

class JsonSettings(BaseSettings):
    stripe: Stripe

def start():
    try:
        NestedSettings()
    except ValueError as error:
        raise RuntimeError("no settings") from error
"""

WITHHELD = "cannot be used; the reason is not shown because it repeats the value"


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        (
            "StripeSettings()",
            (
                "settings cannot be used: STRIPE_API_KEY (is required: set it); "
                "STRIPE_RETRIES (must be a valid integer, unable to parse string as an integer)"
            ),
            1,
        ),
        (
            "Price(amount='much')",
            (
                "Price: amount: Input should be a valid integer, unable to parse string as an integer; "
                "currency: Field required"
            ),
            1,
        ),
        (
            "NestedSettings()",
            f"settings cannot be used: APP_ACCOUNT__STRIPE__API ({WITHHELD}); APP_ACCOUNT__STRIPE__R",
            1,
        ),
        ("JsonSettings()", f"settings cannot be used: STRIPE.api ({WITHHELD}); STRIPE.retries (must be a valid int", 1),
        ("start()", "RuntimeError: no settings", 1),
        ("create_app(HOSTS_ALLOWED=1)", "TypeError", 1),
        ("create_app(); raise RuntimeError('no stock')", "RuntimeError: no stock", 1),
        ("sys.exit(0)", "the process was ended while the app was loaded", 1),
        ("sys.exit('no key')", "the process was ended while the app was loaded", 1),
        ("sys.exit(7)", "the process was ended while the app was loaded", 7),
        ("sys.exit(256)", "the process was ended while the app was loaded", 1),
    ],
)
def test_failed_start_logs_one_record(directory, monkeypatch, capsys, code, reason, exit_code):
    """With all invalid settings, or the exception and its traceback."""
    (directory / "broken.py").write_text(f"{BROKEN}\n{code}\n")
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setenv("ENVIRONMENT", "test")
    monkeypatch.setenv("STRIPE_RETRIES", "s3cret")
    monkeypatch.setenv("APP_ACCOUNT__STRIPE__API", "s3cret'key")
    monkeypatch.setenv("APP_ACCOUNT__STRIPE__RETRIES", "s3cret")
    monkeypatch.setenv("STRIPE", '{"api": "s3cret-key", "retries": "s3cret"}')
    monkeypatch.setenv("LOG_REDACT", "stock")

    assert main(["serve", "broken:app"]) == exit_code

    captured = capsys.readouterr()
    [record] = [json.loads(line) for line in captured.out.splitlines() if '"critical"' in line]
    assert record["event"].startswith(f"the service cannot start: {reason}")
    assert "broken.py" in record["exception"]
    assert (record["logger"], record["environment"]) == ("fastapi_prodkit.serve", "test")
    assert "s3cret" not in captured.out + captured.err


def test_invalid_settings_are_listed_on_the_terminal(directory, monkeypatch, capsys):
    """Invalid settings are logged as a JSON event and listed on stderr, one per line, with exit code 1."""
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "served_app", raising=False)
    monkeypatch.setenv("ENVIRONMENT", "prod")

    assert main(["serve", "served_app:app"]) == 1

    captured = capsys.readouterr()
    assert '"event":"the service cannot start: settings cannot be used: HOSTS_ALLOWED (is required' in captured.out
    assert "\n  HOSTS_ALLOWED: is required" in captured.err


def test_worker_that_cannot_start_is_a_failed_start(monkeypatch):
    """uvicorn's parent returns as after a signal."""
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.__init__", lambda self, config, sockets: None)
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.keep_subprocess_alive", lambda self: self.should_exit.set())
    monkeypatch.setattr("uvicorn.supervisors.Multiprocess.run", lambda self: self.keep_subprocess_alive())
    monkeypatch.setattr(Supervisor, "should_exit", threading.Event(), raising=False)

    assert _run(SimpleNamespace(bind_socket=lambda: None), 2) == 3
    assert _run(SimpleNamespace(bind_socket=lambda: None), 2) == 0  # it was stopping already


@pytest.mark.system
def test_workers_end_when_their_parent_is_killed(directory):
    """They end as after SIGTERM, so that the port is free; nothing else would end or replace them."""
    with serving(directory, "served_app:app", "--workers", "2", RATE_LIMIT_ENABLED="false") as server:
        wait_for(lambda: server.output().count("Application startup complete") == 2)
        server.process.kill()
        wait_for(lambda: not listens(server.port))
        wait_for(lambda: server.output().count("Finished server process") == 2)
        said = [event["event"] for event in events(server) if event["level"] == "error"]

    assert said == ["the parent process has ended without its workers: this worker shuts down"] * 2


def test_worker_without_a_parent_gets_a_signal(monkeypatch, caplog):
    """The signal is SIGTERM, once the parent has ended."""
    parent, signals = SimpleNamespace(join=lambda: None), []
    ended = threading.Event()
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    monkeypatch.setattr("os.kill", lambda pid, number: (signals.append((pid, number)), ended.set()))

    ServeConfig(FastAPI(), log_config=None).load()

    assert ended.wait(10)
    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert "this worker shuts down" in caplog.text


def test_only_process_waits_for_no_parent():
    """A process that serves alone has no parent to wait for, and starts no thread for it."""
    ServeConfig(FastAPI(), log_config=None).load()

    assert "fastapi_prodkit.parent" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.system
@pytest.mark.parametrize(
    "left", ["atexit.register(time.sleep, 60)", "threading.Thread(target=time.sleep, args=(60,)).start()"]
)
def test_parent_of_workers_exits_within_two_seconds(tmp_path, left):
    """It has loaded the app, too."""
    (tmp_path / "service.py").write_text(
        f"import atexit, threading, time\n{left}\nfrom fastapi import FastAPI\napp = FastAPI()"
    )
    command = ("fastapi_prodkit", "serve", "service:app", "--workers", "2", "--port", str(port := free_port()))

    with running(*command, directory=tmp_path, port=port) as server:
        server.terminate()
        code = server.wait(30)

    assert code == 0


def test_bound_exit_logs_and_exits(monkeypatch, caplog):
    """`bound_exit` logs a warning and exits with the given code when EXIT_TIME has passed."""
    ended, codes = threading.Event(), []
    monkeypatch.setattr("fastapi_prodkit.cli.supervisor.EXIT_TIME", 0.01)
    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), ended.set()))

    bound_exit(3)
    ended.wait(10)

    assert codes == [3]
    assert caplog.messages == ["exiting before all threads and atexit hooks have ended"]


def test_app_that_a_process_cannot_load_exits_with_3(caplog):
    """A process that cannot load the app exits with code 3, which makes uvicorn's parent process stop."""
    config = ServeConfig("nowhere_at_all:app", log_config=None)

    with pytest.raises(SystemExit) as ended:
        config.load()

    assert ended.value.code == 3
    assert caplog.records[-1].getMessage() == "the app cannot be loaded"


def test_default_is_several_workers_with_a_shared_store_only(monkeypatch):
    """The default is one worker per CPU, but a single worker if each would count rate limits separately."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    shared = {"storage_url": "redis://localhost"}

    assert _default_workers(Settings(environment="test")) == 1
    assert _default_workers(Settings(environment="test", rate_limit=shared)) == 3
    assert _default_workers(Settings(environment="test", rate_limit=None)) == 3
    assert _default_workers(None) == 3


def test_default_workers_without_affinity_are_all_cores(monkeypatch):
    """On macOS and Windows."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    assert _default_workers(None) == 8


def test_missing_httptools_uses_the_protocol_of_uvicorn(monkeypatch):
    """Without httptools, `serve` lets uvicorn choose its HTTP protocol with `auto`."""
    monkeypatch.setitem(__import__("sys").modules, "fastapi_prodkit.cli.protocol", None)

    assert _protocol() == "auto"


def test_health_exits_with_0_for_2xx_and_else_with_1(monkeypatch, capsys):
    """The default address has the port of the container."""
    with wire.serving(create_app()) as port:
        monkeypatch.setenv("PORT", str(port))
        well, missing = main(["health"]), main(["health", f"http://127.0.0.1:{port}/nowhere"])
    gone = main(["health"])

    captured = capsys.readouterr()
    assert (well, missing, gone) == (0, 1, 1)
    assert '200 {"status":"pass"}\n' in captured.out
    assert "404" in captured.err
    assert "no answer" in captured.err


def test_health_uses_the_first_liveness_path(monkeypatch):
    """`health` without an address requests the first path of HEALTH_LIVE_PATHS on PORT."""
    codes = []
    with wire.serving(create_app()) as port:
        monkeypatch.setenv("PORT", str(port))
        for paths in ("/health, /livez", "/livez,/health"):
            monkeypatch.setenv("HEALTH_LIVE_PATHS", paths)
            codes.append(main(["health"]))

    assert codes == [0, 1]


def test_health_follows_no_redirect():
    """`health` treats a redirect as a failure, because the target may belong to another service."""
    app = FastAPI()
    app.add_api_route("/health", lambda: RedirectResponse("/well"))
    app.add_api_route("/well", lambda: "ok")

    with wire.serving(app) as port:
        assert main(["health", f"http://127.0.0.1:{port}/health"]) == 1


def test_health_refuses_other_urls(capsys):
    """An address without `http://` exits with code 2 and an error that shows the expected form."""
    assert main(["health", "localhost:8000"]) == 2
    assert "http://" in capsys.readouterr().err
