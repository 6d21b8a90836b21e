"""Build the example's Dockerfile and run the image with a real PostgreSQL and a real Redis.

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
SIGNING_KEY = "3fa9c1d27be0485c9d1e6f203b7a8c54"
PATIENCE = 60.0  # seconds that a container may take to answer on a busy machine


@dataclass
class Backends:
    """The servers that the service needs, and the variables that name them."""

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
        "AUTH_SECRET": SIGNING_KEY,
        "SHUTDOWN_DRAIN": "0.5",
    }


@pytest.fixture(scope="module")
def image(
    request: pytest.FixtureRequest, backends: Backends, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Image]:
    """The image, built from a copy of the folder with secrets in it; `backends` skips before the build."""
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
    """Copy the example with a wheel of this package, and add files that must not get into the image."""
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
    """The running service."""

    container: Container
    port: int

    def get(self, path: str) -> tuple[int, str]:
        return self.send(path, None, {})

    def post(self, path: str, body: object, token: str) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        return self.send(path, json.dumps(body).encode(), headers)

    def send(self, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
        headers["Host"] = "api.example.com"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
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
def test_required_build_fails_instead_of_skipping(monkeypatch, said, outcome):
    """With FASTAPI_PRODKIT_IMAGE=required, a machine that cannot build the image fails the test."""
    monkeypatch.setenv("FASTAPI_PRODKIT_IMAGE", said)

    with pytest.raises(outcome.Exception, match="needs runc"):
        cannot_run(ContainersMissingError("needs runc"))


def test_dockerfile_passes_hadolint():
    """With one exception, which is explained."""
    command = [program_or_skip("hadolint"), "--no-color", SERVICE / "Dockerfile"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout + done.stderr == ""
    assert (SERVICE / "Dockerfile").read_text().count("hadolint ignore") == 1


def test_build_arguments_are_explained_on_the_page():
    """With their defaults."""
    declared = re.findall(r"^ARG (\w+)=(\S+)$", (SERVICE / "Dockerfile").read_text(), re.MULTILINE)

    assert {name for name, _ in declared} == {*RELEASE, "LICENSES"}
    assert [name for name, default in declared if f"\n| `{name}` | `{default}` | " not in PAGE.read_text()] == []


def test_lock_of_the_service_agrees_with_the_lock_of_the_library():
    """Versions and hashes."""
    tested, locked = (ROOT / "requirements" / "test.txt").read_text(), (SERVICE / "requirements.txt").read_text()

    entries = re.split(r"\n(?=[a-z])", locked)

    assert len(entries) > 40
    assert all("--hash=sha256:" in entry for entry in entries)
    assert {entry.split()[0] for entry in entries} <= set(tested.split())
    assert not re.search(r"^fastapi-prodkit\b", locked, re.MULTILINE)


def test_lock_of_the_service_respects_the_lower_bounds():
    """That of h11, too, which comes with uvicorn."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"fastapi-prodkit\[([\w,]+)\]", (SERVICE / "pyproject.toml").read_text())[1].split(",")
    lines = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]

    locked = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", (SERVICE / "requirements.txt").read_text(), re.MULTILINE))

    floors = {each.name: each.specifier for each in map(Requirement, lines)}
    assert "h11" in floors
    assert [name for name, floor in floors.items() if not floor.contains(locked[name])] == []


def test_image_runs_migrations(migrated, backends):
    """A second run has nothing to do."""
    done = migrated.once("fastapi-prodkit", "db", "upgrade", environment=backends.environment, options=backends.options)

    assert done.returncode == 0
    assert "Nothing to do" in done.stderr


def test_service_answers(service, migrated, backends):
    """Health, readiness, and data over TLS, also for a user with a token; requests are counted in Redis."""
    loaded = migrated.once("python", "-m", "service.load", environment=backends.environment, options=backends.options)
    asked = ("fastapi-prodkit", "token", "alice", "--role", "reporter")
    token = migrated.once(*asked, environment={"AUTH_SECRET": SIGNING_KEY}).stdout.strip()
    report = {"airport": "FRA", "visited_on": "2025-05-04", "rating": 4, "comment": "Long walks."}

    health, ready, airport = service.get("/health"), service.get("/ready"), service.get("/v1/airports/fra")
    written = service.post("/v1/reports", report, token)

    assert loaded.returncode == 0, loaded.stderr
    assert (health[0], json.loads(health[1])["status"]) == (200, "pass")
    assert (ready[0], json.loads(ready[1])["status"]) == (200, "pass")
    assert json.loads(airport[1])["iata"] == "FRA"
    assert (written[0], json.loads(written[1])["author"]) == (201, "alice")
    assert backends.redis.dbsize() > 0


def test_health_check_passes_without_a_shell(service):
    """Although only api.example.com is an allowed host."""
    check = service.container.healthy()

    assert check
    assert service.container.call("sh", "-c", "command -v curl wget").stdout == ""


def test_process_is_not_root(service):
    """It has a fixed uid and no capabilities, and cannot get any."""
    status = dict(
        line.split(":\t", 1)
        for line in service.container.call("cat", "/proc/1/status").stdout.splitlines()
        if "\t" in line
    )

    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_service_runs_on_a_read_only_file_system(service, migrated):
    """On another one it cannot change its code, either."""
    places = "for place in / /app /opt/venv /tmp /home; do touch $place/x 2>/dev/null && echo $place; done; true"
    owned = "find /app /opt/venv ! -user root -print; find /app /opt/venv ! -type l -perm /022 -print"

    assert service.container.call("sh", "-c", places).stdout == ""
    assert migrated.once("sh", "-c", owned).stdout == ""


def test_server_is_process_1_and_listens_on_port_8000(service, migrated):
    """So that it receives the signals of the platform."""
    command = service.container.call("cat", "/proc/1/cmdline").stdout.split("\0")
    sockets = service.container.call("cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()
    listening = {line.split()[1].rpartition(":")[2] for line in sockets if line.split()[3] == "0A"}

    assert command[1:4] == ["/opt/venv/bin/fastapi-prodkit", "serve", "service.main:app"]
    assert {int(port, 16) for port in listening} == {8000}
    assert list(migrated.config["ExposedPorts"]) == ["8000/tcp"]


def test_sigterm_exits_with_0(migrated, backends):
    """Each line of output is a JSON object."""
    with started(migrated, backends) as service:
        service.container.signal("TERM")
        code = service.container.wait()
        lines = service.container.log().splitlines()

    assert code == 0
    assert {json.loads(line)["version"] for line in lines} == {"1.2.3"}


def test_container_without_settings_names_them(image):
    """It ends at once."""
    done = image.once(environment={"ENVIRONMENT": "prod"})

    assert done.returncode == 1
    assert "DATABASE_URL" in done.stderr
    assert "HOSTS_ALLOWED" in done.stderr


def test_no_layer_contains_secrets(image):
    """Nor the certificates of the build machine."""
    with image.save().open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as layers:
        code, secret, cache = layers.find(b"DESCRIPTION = "), layers.find(MARKER), layers.find(b".cache/pip")

    assert code > 0
    assert (secret, cache) == (-1, -1)


def test_image_has_no_tests_and_no_build_tools(image):
    """Every module is compiled."""
    tools = "for tool in cc gcc make git uv; do command -v $tool; done; ls -A /app; ls /opt/venv/bin/pip* 2>/dev/null"

    found = image.once("sh", "-c", tools).stdout.split()
    uncompiled = image.once("python", "-c", UNCOMPILED).stdout.split()

    assert found == ["alembic", "alembic.ini", "service"]
    assert uncompiled == ["0"]


def test_image_has_oci_labels(image):
    """Build arguments set others."""
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
            "licenses": "NOASSERTION",  # not set by a build argument
            "base.name": BASE,
        }.items()
    }


def test_image_configures_uid_command_and_health_check(image):
    """The image runs `serve` as uid 10001, and its health check requests `/health` on port 8000."""
    config = image.config

    assert config["User"] == "10001:10001"
    assert config["Cmd"][:3] == ["fastapi-prodkit", "serve", "service.main:app"]
    assert config["Healthcheck"]["Test"] == ["CMD", "fastapi-prodkit", "health", "http://127.0.0.1:8000/health"]


def test_change_of_the_code_is_one_small_layer(image):
    """The page has the sizes."""
    rows = re.findall(r"^\| (base|user|packages|code|all).*? \| ([\d.]+) (MB|kB)", PAGE.read_text(), re.MULTILINE)
    said = [float(number) * {"MB": 1_000_000, "kB": 1_000}[unit] for _, number, unit in rows]

    base, user, packages, code = image.layers()

    assert [base, user, packages, code, base + user + packages + code] == pytest.approx(said, rel=0.1, abs=50_000)
