"""The example's Dockerfile: built and run for real, on a real PostgreSQL and a real Redis.

Where that cannot be the tests are skipped; with FASTAPI_PRODKIT_IMAGE=required they fail.
"""

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

pytest.importorskip("trustme", reason="needs the tools of `make test`")
redis = pytest.importorskip("redis", reason="needs the extra: pip install 'fastapi-prodkit[redis]'")

import trustme
from containers import BASE, BUNDLE, HOST, Container, ContainersMissingError, Image, engine
from postgres import PostgresMissingError, Server, postgres
from processes import free_port
from programs import program_or_skip
from redis_servers import RedisMissingError, redis_server

pytestmark = [pytest.mark.system, pytest.mark.long]

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "examples" / "service"
PAGE = ROOT / "docs" / "deploy" / "docker.md"
MARKER = b"this-must-stay-outside-the-image"
SECRETS = (
    ".env",
    ".env.prod",
    ".git/config",
    "server.pem",
    "service/.env",
    "service/server.key",
    "service/dump.sql",
    "service/credentials.json",
    "service/routers/.netrc",
    "service/routers/backup.tar.gz",
    "alembic/dump.sqlite3",
    "alembic/versions/dump.sql",
    "wheels/id_ed25519",
)
RELEASE = {
    "VERSION": "1.2.3",
    "REVISION": "0f1e2d3c",
    "CREATED": "2026-01-02T03:04:05Z",
    "SOURCE": "https://git.example.com/airports",
}
UNCOMPILED = """
from importlib.util import cache_from_source
from pathlib import Path

sources = [path for folder in ("/app", "/opt/venv/lib") for path in Path(folder).rglob("*.py")]
assert len(sources) > 1000
print(sum(not Path(cache_from_source(path)).exists() for path in sources))
"""
PATIENCE = 60.0  # seconds that a container may take to answer on a busy machine


@dataclass
class Backends:
    """What the service needs beside itself, and how it is told."""

    redis: "redis.Redis"
    environment: dict[str, str]
    options: list[str]


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backends]:
    """PostgreSQL with TLS, and Redis, for a service in production."""
    authority = trustme.CA()
    leaf = authority.issue_cert(HOST)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    certificate = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(certificate)
    try:
        with postgres(certificate=chain, key=leaf.private_key_pem.bytes()) as database, redis_server() as store:
            client = redis.Redis(port=store.port)
            yield Backends(client, production(database, store.port), ["--volume", f"{certificate}:/run/ca.pem:ro"])
            client.close()
    except (PostgresMissingError, RedisMissingError) as error:
        cannot_run(error)


def cannot_run(reason: Exception) -> NoReturn:
    outcome = pytest.fail if os.environ.get("FASTAPI_PRODKIT_IMAGE") == "required" else pytest.skip
    outcome(str(reason))


def production(database: Server, store: int) -> dict[str, str]:
    return {
        "ENVIRONMENT": "prod",
        "DATABASE_URL": database.url(host=HOST),
        "DATABASE_SSL_ROOT_CERT": "/run/ca.pem",
        "DATABASE_MIGRATIONS_CONFIG": "alembic.ini",
        "RATE_LIMIT_STORAGE_URL": f"redis://{HOST}:{store}/0",
        "HOSTS_ALLOWED": "api.example.com",
        "SHUTDOWN_DRAIN": "0.5",
    }


@pytest.fixture(scope="module")
def image(
    request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Image]:
    """The image, built from a copy of the folder that has secrets lying about; `backends` skips before it is made."""
    folder = tmp_path_factory.mktemp("build")
    context = planted(folder / "service")
    bundle = folder / "bundle.crt"
    bundle.write_bytes(BUNDLE.read_bytes() + b"\n# " + MARKER + b"\n" if BUNDLE.exists() else MARKER)
    cache = getattr(request.config, "cache", None)
    try:
        with engine((cache.mkdir("image") if cache else folder) / "trixie.tar") as it:
            yield it.build(context, "airports", bundle=bundle, **RELEASE)
    except ContainersMissingError as error:
        cannot_run(error)


def planted(context: Path) -> Path:
    """Copy the example with a wheel of this package, and put what must not get into the image beside and into it."""
    shutil.copytree(SERVICE, context, ignore=shutil.ignore_patterns(".demo", "__pycache__", "wheels", ".env"))
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", context / "wheels"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    for name in SECRETS:
        (context / name).parent.mkdir(exist_ok=True)
        (context / name).write_bytes(MARKER)
    return context


@pytest.fixture(scope="module")
def migrated(image: Image, backends: Backends) -> Image:
    """The image, after its migrations have run on the database."""
    done = image.once("fastapi-prodkit", "db", "upgrade", environment=backends.environment, options=backends.options)
    assert done.returncode == 0, done.stdout + done.stderr
    return image


@dataclass
class Service:
    """The service as it runs."""

    container: Container
    port: int

    def get(self, path: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Host": "api.example.com"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()


@pytest.fixture(scope="module")
def service(migrated: Image, backends: Backends) -> Iterator[Service]:
    with started(migrated, backends) as running:
        yield running


@contextmanager
def started(image: Image, backends: Backends) -> Iterator[Service]:
    port = free_port()
    with image.run(port, environment=backends.environment, options=backends.options) as container:
        service = Service(container, port)
        until(lambda: service.get("/health")[0] == 200, container)
        yield service


def until(condition: Callable[[], bool], container: Container) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError):
            if condition():
                return
        assert container.running(), container.log()
        assert time.monotonic() < deadline, container.log()
        time.sleep(0.1)


@pytest.mark.parametrize(("said", "outcome"), [("required", pytest.fail), ("", pytest.skip)])
def test_what_is_required_is_not_skipped(monkeypatch, said, outcome):
    """A machine that is there to build the image says so, and then whatever it lacks is a failure."""
    monkeypatch.setenv("FASTAPI_PRODKIT_IMAGE", said)

    with pytest.raises(outcome.Exception, match="needs runc"):
        cannot_run(ContainersMissingError("needs runc"))


def test_the_dockerfile_is_clean():
    """hadolint has nothing to say, and needs no exception but the one that is explained."""
    command = [program_or_skip("hadolint"), "--no-color", SERVICE / "Dockerfile"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout + done.stderr == ""
    assert (SERVICE / "Dockerfile").read_text().count("hadolint ignore") == 1


def test_every_build_argument_is_explained():
    """Each stands in the page with its default."""
    declared = re.findall(r"^ARG (\w+)=(\S+)$", (SERVICE / "Dockerfile").read_text(), re.MULTILINE)

    assert {name for name, _ in declared} == {*RELEASE, "LICENSES"}
    assert [name for name, default in declared if f"\n| `{name}` | `{default}` | " not in PAGE.read_text()] == []


def test_the_lock_of_the_service_agrees_with_that_of_the_library():
    """The image has the versions that the library is tested with, each with its hashes."""
    tested, locked = (ROOT / "requirements" / "test.txt").read_text(), (SERVICE / "requirements.txt").read_text()

    entries = re.split(r"\n(?=[a-z])", locked)

    assert len(entries) > 40
    assert all("--hash=sha256:" in entry for entry in entries)
    assert {entry.split()[0] for entry in entries} <= set(tested.split())
    assert not re.search(r"^fastapi-prodkit\b", locked, re.MULTILINE)


def test_the_lock_of_the_service_has_nothing_below_the_floors():
    """The image has what pyproject.toml asks for, h11 included, which comes with uvicorn and has an advisory."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"fastapi-prodkit\[([\w,]+)\]", (SERVICE / "pyproject.toml").read_text())[1].split(",")
    lines = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]

    locked = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", (SERVICE / "requirements.txt").read_text(), re.MULTILINE))

    floors = {each.name: each.specifier for each in map(Requirement, lines)}
    assert "h11" in floors
    assert [name for name, floor in floors.items() if not floor.contains(locked[name])] == []


def test_migrations_are_a_step_of_the_same_image(migrated, backends):
    """`fastapi-prodkit db upgrade` in a container of its own migrates; again, it has nothing to do."""
    done = migrated.once("fastapi-prodkit", "db", "upgrade", environment=backends.environment, options=backends.options)

    assert done.returncode == 0
    assert "Nothing to do" in done.stderr


def test_the_service_answers(service, migrated, backends):
    """Health, readiness and data from PostgreSQL, over TLS; the requests are counted in Redis."""
    loaded = migrated.once("python", "-m", "service.load", environment=backends.environment, options=backends.options)

    health, ready, airport = service.get("/health"), service.get("/ready"), service.get("/v1/airports/fra")

    assert loaded.returncode == 0, loaded.stderr
    assert (health[0], json.loads(health[1])["status"]) == (200, "pass")
    assert (ready[0], json.loads(ready[1])["status"]) == (200, "pass")
    assert json.loads(airport[1])["iata"] == "FRA"
    assert backends.redis.dbsize() > 0


def test_the_health_check_needs_nothing_but_the_image(service):
    """HEALTHCHECK is an exec-form command of the image's own, and it passes where only api.example.com is a host."""
    check = service.container.healthy()

    assert check
    assert service.container.call("sh", "-c", "command -v curl wget").stdout == ""


def test_nobody_is_root(service):
    """The process has a fixed uid, no capabilities and no way to get any."""
    status = dict(
        line.split(":\t", 1)
        for line in service.container.call("cat", "/proc/1/status").stdout.splitlines()
        if "\t" in line
    )

    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_nothing_can_be_written(service, migrated):
    """The service runs on a read-only file system; on one that is not, its own code is still not its to change."""
    places = "for place in / /app /opt/venv /tmp /home; do touch $place/x 2>/dev/null && echo $place; done; true"
    owned = "find /app /opt/venv ! -user root -print; find /app /opt/venv ! -type l -perm /022 -print"

    assert service.container.call("sh", "-c", places).stdout == ""
    assert migrated.once("sh", "-c", owned).stdout == ""


def test_the_server_is_process_one_and_listens_on_port_8000_alone(service, migrated):
    """No shell stands between the platform's signals and the server."""
    command = service.container.call("cat", "/proc/1/cmdline").stdout.split("\0")
    sockets = service.container.call("cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()
    listening = {line.split()[1].rpartition(":")[2] for line in sockets if line.split()[3] == "0A"}

    assert command[1:4] == ["/opt/venv/bin/fastapi-prodkit", "serve", "service.main:app"]
    assert {int(port, 16) for port in listening} == {8000}
    assert list(migrated.config["ExposedPorts"]) == ["8000/tcp"]


def test_sigterm_ends_the_service_in_order(migrated, backends):
    """The exit code is 0, and all that was written is one JSON object a line."""
    with started(migrated, backends) as service:
        service.container.signal("TERM")
        code = service.container.wait()
        lines = service.container.log().splitlines()

    assert code == 0
    assert {json.loads(line)["version"] for line in lines} == {"1.2.3"}


def test_what_is_missing_is_said(image):
    """Without its settings the container ends at once, and names them."""
    done = image.once(environment={"ENVIRONMENT": "prod"})

    assert done.returncode == 1
    assert "DATABASE_URL" in done.stderr
    assert "HOSTS_ALLOWED" in done.stderr


def test_no_layer_has_what_lay_about(image):
    """Neither secrets in and beside the code, nor what the build machine trusts, in any layer, even a hidden one."""
    with image.save().open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as layers:
        code, secret, cache = layers.find(b"DESCRIPTION = "), layers.find(MARKER), layers.find(b".cache/pip")

    assert code > 0
    assert (secret, cache) == (-1, -1)


def test_the_image_has_what_it_runs_and_no_more(image):
    """No tests and no tools that build; every module is compiled."""
    tools = "for tool in cc gcc make git uv; do command -v $tool; done; ls -A /app; ls /opt/venv/bin/pip* 2>/dev/null"

    found = image.once("sh", "-c", tools).stdout.split()
    uncompiled = image.once("python", "-c", UNCOMPILED).stdout.split()

    assert found == ["alembic", "alembic.ini", "service"]
    assert uncompiled == ["0"]


def test_the_image_says_what_it_is(image):
    """OCI's labels say what, of which release, from where and on what; whoever builds it says the rest."""
    labels = {name: text for name, text in image.config["Labels"].items() if not name.startswith("io.buildah.")}

    assert labels == {
        f"org.opencontainers.image.{name}": text
        for name, text in {
            "title": "airports-service",
            "description": "Airports of the world, and what visitors report about them",
            "version": "1.2.3",
            "revision": "0f1e2d3c",
            "created": "2026-01-02T03:04:05Z",
            "source": "https://git.example.com/airports",
            "licenses": "NOASSERTION",  # nobody has said
            "base.name": BASE,
        }.items()
    }


def test_an_engine_knows_how_to_run_it(image):
    """Uid, command and health check are where it looks for them."""
    config = image.config

    assert config["User"] == "10001:10001"
    assert config["Cmd"][:3] == ["fastapi-prodkit", "serve", "service.main:app"]
    assert config["Healthcheck"]["Test"] == ["CMD", "fastapi-prodkit", "health", "http://127.0.0.1:8000/health"]


def test_what_a_layer_costs(image):
    """The page says it: packages are the weight, and a change of the service's code is one small layer."""
    rows = re.findall(r"^\| (base|user|packages|code|all).*? \| ([\d.]+) (MB|kB)", PAGE.read_text(), re.MULTILINE)
    said = [float(number) * {"MB": 1_000_000, "kB": 1_000}[unit] for _, number, unit in rows]

    base, user, packages, code = image.layers()

    assert [base, user, packages, code, base + user + packages + code] == pytest.approx(said, rel=0.1, abs=50_000)
