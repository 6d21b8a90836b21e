"""The metrics of all worker processes of a service, for a scrape that reaches one of them.

Each worker writes what it has into a directory that they share: once a second, and before it answers a scrape, which
it does with its own numbers and what the others have written. So all that is ever shown has been written before, and
no sum falls when a worker is killed: what it had counted stays, and what it measured at the moment goes with it.

A worker holds a lock on a file of its own. The system gives it up with the process, however that ends, which is how
the others know; numbers of processes are used again, and say nothing.
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

INTERVAL = 1.0  # seconds between two writings
_LOCK, _DEAD_WORKERS = "lock", "ended.json"  # who writes now; and what those had counted that are gone

_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, for this user only
_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_logger = logging.getLogger("fastapi_prodkit.metrics")


def shared_directory() -> Path | None:
    """Return where the workers of this service meet; None if this process is the only one.

    That is PROMETHEUS_MULTIPROC_DIR, or else a folder that is named after the parent of the workers. It lies in
    /dev/shm, which can be written to where the root file system cannot, or where temporary files are.
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
    """Make the directory that PROMETHEUS_MULTIPROC_DIR names: with it, prometheus_client writes there from the start.

    Raises:
        ConfigurationError: It cannot be made.
    """
    named = os.environ.get(_VARIABLE)
    if named:
        try:
            Path(named).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"{_VARIABLE}={named} cannot be made ({error}); name one that can, or none"
            ) from None


class Workers:
    """Share the metrics of a registry with the other workers.

    Args:
        registry: Whose metrics.
        directory: Where the workers meet.
    """

    def __init__(self, registry: "CollectorRegistry", directory: Path) -> None:
        self._registry = registry
        self._collectors = Collectors(registry)
        self._logged: set[str] = set()  # problems that the log has told of
        self._directory = directory
        self._apps = 0  # of this process that show the registry
        self._writing = threading.Lock()
        self._lock_file: IO[bytes] | None = None

    @classmethod
    def of(cls, registry: "CollectorRegistry") -> "Workers | None":
        """Return the one for prometheus_client's default registry; None for others, and where there is one worker."""
        from prometheus_client import REGISTRY  # noqa: PLC0415 - whoever has a registry has loaded it

        directory = shared_directory()
        if directory is None or registry is not REGISTRY:
            return None
        made: Workers = vars(registry).setdefault(_scope.REGISTRY_WORKERS, cls(registry, directory))
        return made

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Take part; without a place to write this worker's metrics stay its own, and a log line says so."""
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
        """Yield the metrics of all workers: what a registry is asked for."""
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
                raise PermissionError(f"{self._directory} belongs to somebody else")
            with self._locked():
                if not any(map(_is_held, self._directory.glob("*.alive"))):
                    self._clear()  # what an earlier run has left
                alive = self._show_life()
        except OSError as error:
            _logger.warning("metrics are of one worker only, because there is no place to share them: %s", error)
            return
        self._lock_file = alive
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="fastapi_prodkit.metrics", daemon=True)
        self._thread.start()

    def _show_life(self) -> IO[bytes]:
        alive = (self._directory / f"{self._name}.alive").open("wb")
        try:
            _lock(alive, wait=True)
            self._write()
        except BaseException:  # a collector may end the process
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
                self._directory.rmdir()  # unless there is something else in it

    def _write_often(self) -> None:
        while not self._ending.wait(INTERVAL):
            try:
                self._write()
            except Exception as error:  # noqa: BLE001 - a full disk, a directory that is gone: later, perhaps
                self._log_once("metrics cannot be shared with other workers", error)

    def _write(self) -> Families:
        with self._writing:
            own = list(self._collectors.collect())
            self._replace(self._file, own)
            return own

    def _absorb_dead_workers(self) -> None:
        """Add what the dead have counted to what those had before them."""
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
        """Return what a worker has written, and nothing if that cannot be read."""
        try:
            return aggregation.load(path.read_bytes())
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001 - half of a file may be anything
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
    except OSError:  # it may not be opened, so nobody can tell
        return True


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    """Lock the file for as long as it is open, and say whether that worked."""
    import fcntl  # noqa: PLC0415 - there is none on Windows, where workers do not meet

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
