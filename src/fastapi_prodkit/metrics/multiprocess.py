"""Share metrics between the worker processes of a service, because a scrape reaches only one of them.

Each worker writes its metrics to a shared directory, once a second and before it answers a scrape. It answers with its
own metrics and those that the others have written. All numbers in an answer have been written before, so no counter
decreases when a worker is killed. Counters of a dead worker are kept; its gauges are dropped.

Each worker locks a file. The operating system releases the lock when the process ends for any reason, so that the other
workers detect it. Process ids are not sufficient, because they are reused.
"""

import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fastapi_prodkit import _scope
from fastapi_prodkit._config.worker_count import is_one_of_several_workers
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.metrics import aggregation
from fastapi_prodkit.metrics.aggregation import Collectors, Families

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Workers", "make_directory", "shared_directory"]

INTERVAL = 1.0  # seconds between two writes
_LOCK, _DEAD_WORKERS = "lock", "ended.json"  # the lock file; the counters of dead workers

_MEMORY = Path("/dev/shm")  # noqa: S108 - a private directory is created in it
_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_logger = logging.getLogger("fastapi_prodkit.metrics")


def shared_directory() -> Path | None:
    """Return the directory that the workers of this service share; None if this process is the only worker.

    It is PROMETHEUS_MULTIPROC_DIR, or else a directory named after the workers' parent process. That directory is in
    /dev/shm, which is writable even if the root file system is not, or else where temporary files are.
    """
    named = os.environ.get(_VARIABLE)
    if named:
        return Path(named)
    if os.name != "posix" or not is_one_of_several_workers():
        return None
    return _place() / f"fastapi-prodkit-{os.getuid()}-{os.getppid()}"


def _place() -> Path:
    if not os.access(_MEMORY, os.W_OK):
        with suppress(FileNotFoundError):  # there is none, either
            return Path(tempfile.gettempdir())
    return _MEMORY


def make_directory() -> None:
    """Create the directory PROMETHEUS_MULTIPROC_DIR, if it is set: prometheus_client writes to it when it is imported.

    Raises:
        ConfigurationError: The directory cannot be created.
    """
    named = os.environ.get(_VARIABLE)
    if named:
        try:
            Path(named).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"{_VARIABLE}={named} cannot be created ({error}): set it to another directory, or unset it"
            ) from None


class Workers:
    """Share the metrics of a registry with the other workers.

    Args:
        registry: The registry whose metrics are shared.
        directory: The shared directory.
    """

    def __init__(self, registry: "CollectorRegistry", directory: Path) -> None:
        self._registry = registry
        self._collectors = Collectors(registry)
        self._logged: set[str] = set()  # problems that were logged
        self._directory = directory
        self._apps = 0  # number of apps in this process that use the registry
        self._writing = threading.Lock()
        self._lock_file: IO[bytes] | None = None

    @classmethod
    def of(cls, registry: "CollectorRegistry") -> "Workers | None":
        """Return the instance for prometheus_client's default registry; None for others, or with a single worker."""
        from prometheus_client import REGISTRY  # noqa: PLC0415 - loaded already where there is a registry

        directory = shared_directory()
        if directory is None or registry is not REGISTRY:
            return None
        made: Workers = vars(registry).setdefault(_scope.REGISTRY_WORKERS, cls(registry, directory))
        return made

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Share the metrics in this context; if the directory is not writable, log it and share nothing."""
        self._apps += 1
        try:
            if self._apps == 1:
                self._join()
            yield
        finally:
            self._apps -= 1
            if self._apps == 0 and self._lock_file is not None:
                self._leave(self._lock_file)

    def collect(self) -> "Iterator[Metric]":
        """Yield the metrics of all workers; the interface of a registry."""
        if self._lock_file is not None:
            try:
                return aggregation.merge(self._gather(), self._registry)
            except OSError as error:
                self._log_once("these metrics are of one worker only", error)
        return self._collectors.collect()

    def _gather(self) -> list[Families]:
        with self._locked():
            own = self._write()
            self._absorb_dead_workers()
            others = [path for path in self._directory.glob("*.json") if path.name != self._file]
            return [own, *map(self._read, others)]

    def _join(self) -> None:
        self._name = secrets.token_hex(8)
        self._file = f"{self._name}.json"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._directory.stat().st_uid != os.geteuid():
                raise PermissionError(f"{self._directory} belongs to another user")
            with self._locked():
                if not any(map(_is_held, self._directory.glob("*.alive"))):
                    self._clear()  # files of an earlier run
                alive = self._hold_alive_file()
        except OSError as error:
            _logger.warning("metrics are of one worker only, because there is no place to share them: %s", error)
            return
        self._lock_file = alive
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write_periodically, name="fastapi_prodkit.metrics", daemon=True)
        self._thread.start()

    def _hold_alive_file(self) -> IO[bytes]:
        alive = (self._directory / f"{self._name}.alive").open("wb")
        try:
            _lock(alive, wait=True)
            self._write()
        except BaseException:  # a collector may raise SystemExit
            alive.close()
            raise
        return alive

    def _leave(self, alive: IO[bytes]) -> None:
        self._ending.set()
        self._thread.join()
        self._lock_file = None
        with suppress(OSError), alive, self._locked():
            self._write()
            alive.close()
            self._absorb_dead_workers()
            if not any(self._directory.glob("*.alive")):
                self._clear()
                (self._directory / _LOCK).unlink()
                self._directory.rmdir()  # fails if it has other files

    def _write_periodically(self) -> None:
        while not self._ending.wait(INTERVAL):
            try:
                self._write()
            except Exception as error:  # noqa: BLE001 - a full disk or a deleted directory; the next write may succeed
                self._log_once("metrics cannot be shared with other workers", error)

    def _write(self) -> Families:
        with self._writing:
            own = list(self._collectors.collect())
            self._replace(self._file, own)
            return own

    def _absorb_dead_workers(self) -> None:
        """Add the counters of newly dead workers to those of earlier ones."""
        for path in self._directory.glob("*.alive"):
            if not _is_held(path):
                left, ended = path.with_suffix(".json"), self._directory / _DEAD_WORKERS
                self._replace(_DEAD_WORKERS, aggregation.counters_only([self._read(ended), self._read(left)]))
                left.unlink(missing_ok=True)
                path.unlink()

    def _clear(self) -> None:
        for pattern in ("*.alive", "*.json", "*.new", "*.db"):  # .db: prometheus_client's own
            for path in self._directory.glob(pattern):
                path.unlink(missing_ok=True)

    def _replace(self, name: str, content: Families) -> None:
        new = self._directory / f"{name}.{self._name}.new"
        new.write_bytes(aggregation.dump(content))
        new.replace(self._directory / name)

    def _read(self, path: Path) -> Families:
        """Return the metrics in a worker's file; none if the file cannot be read."""
        try:
            return aggregation.load(path.read_bytes())
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001 - a truncated file may have any content
            self._log_once(f"the metrics of a worker are left out, because {path.name} cannot be read", error)
            return []

    def _log_once(self, problem: str, error: Exception) -> None:
        if problem not in self._logged:
            self._logged.add(problem)
            _logger.warning("%s: %s", problem, error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._directory / _LOCK).open("ab") as file:
            _lock(file, wait=True)
            yield


def _is_held(path: Path) -> bool:
    try:
        with path.open("ab") as file:
            return not _lock(file, wait=False)
    except OSError:  # it cannot be opened, so assume that it is held
        return True


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    """Lock the file as long as it is open; return whether the lock was acquired."""
    import fcntl  # noqa: PLC0415 - missing on Windows, where workers do not share metrics

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
