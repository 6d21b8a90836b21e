"""Build and run images without a Docker engine: `with engine(base) as it: it.build(context, "name")`.

buildah and podman do the work, as root and with a storage of their own, so that nothing of the machine's is touched.
There is no registry either: `python:3.13-slim` is a stand-in, Debian trixie with its own Python 3.13. What is tested is
the Dockerfile, not the official image's bytes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

BASE = "docker.io/library/python:3.13-slim"
HOST = "10.0.2.2"  # the address of this machine's loopback in a container with slirp4netns
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
TOOLS = ("buildah", "mmdebstrap", "podman", "runc", "slirp4netns")
PATIENCE = 300.0  # seconds for a step on a busy machine

# Without unnecessary files, and with python and pip at the paths of the official image.
TIDY = """
cd "$1" && rm -f usr/lib/python3*/EXTERNALLY-MANAGED etc/resolv.conf etc/apt/apt.conf.d/99*
rm -rf usr/share/doc/* usr/share/man/* var/cache/apt/* var/lib/apt/lists/*
for name in python python3 python3.13; do ln -sf /usr/bin/python3.13 usr/local/bin/$name; done
for name in pip pip3; do ln -sf /usr/bin/pip3 usr/local/bin/$name; done
find . -xdev -name __pycache__ -prune -exec rm -rf {} +
"""
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates,netbase,tzdata"

STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/graph"
runroot = "{folder}/run"
"""
CONTAINERS = """
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
# As an orchestrator would run it: a read-only file system, /tmp included, and no capabilities.
HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")


class ContainersMissingError(Exception):
    """This machine cannot build or run images."""


class Engine:
    """A separate storage for images and containers.

    Args:
        folder: Where everything lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "TMPDIR": str(folder),  # buildah keeps cache mounts there
        }
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
        (folder / "containers.conf").write_text(CONTAINERS)

    def call(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0 or not check, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done

    def provide(self, base: Path) -> None:
        """Import a root file system as the base image; pip inside uses the package index of this machine's pip."""
        variables = {
            "PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            **package_index(),
        }
        changes = [word for name, value in variables.items() for word in ("--change", f"ENV {name}={value}")]
        self.call("podman", "import", "--quiet", *changes, base, BASE)

    def build(self, context: Path, name: str, *, bundle: Path = BUNDLE, **arguments: str) -> "Image":
        """Build the Dockerfile of a folder.

        Args:
            context: The folder.
            name: What the image is called.
            bundle: Certificates that the machine trusts, of the package index for example; mounted, not copied.
            arguments: Build arguments.
        """
        given = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
        command = ["buildah", "build", "--layers", "--format", "docker", "--isolation", "chroot", "--network", "host"]
        trusted = ["--pull=never", "--volume", f"{bundle}:{BUNDLE}:ro"]
        self.call(*command, *trusted, *given, "--tag", f"localhost/{name}", context)
        return Image(self, f"localhost/{name}")

    def clear(self) -> None:
        """Stop the containers and unmount their file systems, so that the folder can be removed."""
        self.call("podman", "rm", "--all", "--force", "--time", "0", check=False)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([path for path in mounts if path.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", mount], check=False)


class Image:
    """An image that was built."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the image's configuration of its process."""
        described: dict[str, Any] = json.loads(
            self.engine.call("buildah", "inspect", "--type", "image", self.name).stdout
        )
        config: dict[str, Any] = described["Docker"]["config"]
        return config

    def layers(self) -> list[int]:
        """Return the size of each layer in bytes, the base's first."""
        history = json.loads(self.engine.call("podman", "history", "--format", "json", self.name).stdout)
        return [step["size"] for step in reversed(history) if step["size"]]

    def save(self) -> Path:
        """Write all layers, uncompressed, into one file."""
        archive = self.engine.folder / f"{uuid.uuid4().hex}.tar"
        self.engine.call("podman", "save", "--quiet", "--format", "docker-archive", "--output", archive, self.name)
        return archive

    def once(
        self, *command: str, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a new hardened container, and return how it ended."""
        given = [*variables(environment), *options]
        run = ("podman", "run", "--rm", "--network", "slirp4netns:allow_host_loopback=true", *HARDENED)
        return self.engine.call(*run, *given, self.name, *command, check=False)

    @contextmanager
    def run(
        self, port: int, *, environment: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> Iterator["Container"]:
        """Run the image's command, hardened, with its port 8000 as `port` of 127.0.0.1."""
        given = [*variables(environment), *options, "--publish", f"127.0.0.1:{port}:8000"]
        run = ("podman", "run", "--detach", "--network", "slirp4netns:allow_host_loopback=true", *HARDENED)
        container = Container(self.engine, self.engine.call(*run, *given, self.name).stdout.strip())
        try:
            yield container
        finally:
            self.engine.call("podman", "rm", "--force", "--time", "0", container.id, check=False)


class Container:
    """A running container."""

    def __init__(self, engine: Engine, id_: str) -> None:
        self.id = id_
        self._engine = engine

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return self._engine.call("podman", "exec", self.id, *command, check=False)

    def healthy(self) -> bool:
        """Run the image's HEALTHCHECK."""
        return self._engine.call("podman", "healthcheck", "run", self.id, check=False).returncode == 0

    def running(self) -> bool:
        return self._engine.call("podman", "inspect", "--format", "{{.State.Running}}", self.id).stdout == "true\n"

    def signal(self, name: str) -> None:
        self._engine.call("podman", "kill", "--signal", name, self.id)

    def wait(self) -> int:
        """Return the exit code."""
        return int(self._engine.call("podman", "wait", self.id).stdout)

    def log(self) -> str:
        done = self._engine.call("podman", "logs", self.id)
        return done.stdout + done.stderr


@contextmanager
def engine(base: Path) -> Iterator[Engine]:
    """Yield an engine that has the base image; its files are removed afterwards.

    Args:
        base: File with the base's root file system; it is made where it is missing, which takes 20 seconds.

    Raises:
        ContainersMissingError: Tools are missing, or the right to use them.
    """
    refuse_without_means()
    with tempfile.TemporaryDirectory(prefix="containers-", ignore_cleanup_errors=True) as name:
        made = Engine(Path(name))
        try:
            made.provide(stand_in(base, made))
            yield made
        finally:
            made.clear()


def refuse_without_means() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        raise ContainersMissingError(f"needs {', '.join(missing)}: .ci/run installs them")
    if os.geteuid() != 0:
        raise ContainersMissingError("needs root: containers without it take a set-up of the machine")
    probe = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        raise ContainersMissingError("needs namespaces, which this machine does not let root make")


def stand_in(base: Path, engine: Engine) -> Path:
    """Create the root file system of the base image, unless it exists."""
    if not base.exists():
        options = ["--quiet", "--variant=minbase", f"--include={PACKAGES}", f"--customize-hook={TIDY}"]
        fresh = base.with_name(f"{engine.folder.name}.tar")
        engine.call("mmdebstrap", *options, "trixie", fresh)
        fresh.replace(base)
    return base


def package_index() -> dict[str, str]:
    """Return the package index of this machine's pip as a variable for pip; empty if none is configured."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    told = os.environ.get("PIP_INDEX_URL") or subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return {"PIP_INDEX_URL": told.strip()} if told.strip() else {}


def variables(environment: Mapping[str, str] | None) -> list[str]:
    return [word for name, value in (environment or {}).items() for word in ("--env", f"{name}={value}")]
