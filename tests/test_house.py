"""Rules for every module of the library."""

import ast
import functools
import gc
import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

import pytest
from forks import Forks

import fastapi_prodkit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fastapi_prodkit"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A piece is a module or a package directly in fastapi_prodkit. These are none: pieces use them, or they use pieces.
FOUNDATION = {"exceptions", "sections"}
TOP = {"": 3, "__main__": 4, "cli": 3, "testing": 3, "app": 2, "_assembly": 2, "_route_list": 2}
PIECES = sorted(
    {name.split(".")[1] for name in MODULES if "." in name}
    - FOUNDATION
    - set(TOP)
    - {name.split(".")[1] for name in MODULES if "._" in name}
)

# Pieces that import another piece: settings read secrets, and the access log uses the log handler.
MADE_FROM = {"settings": "secrets", "access_log": "logging"}

# Libraries that are imported on first use, except by modules that require them.
HEAVY = {
    "alembic",
    "asyncpg",
    "boto3",
    "fastapi_swagger",
    "jwt",
    "limits",
    "prometheus_client",
    "pydantic_settings",
    "redis",
    "slowapi",
    "sqlalchemy",
    "structlog",
}
OWN = {
    "fastapi_prodkit.rate_limit.slowapi": {"limits", "slowapi"},  # imported on first access
    "_assembly": {"pydantic_settings"},
    "app": {"pydantic_settings"},
    "database": {"sqlalchemy", "sqlalchemy.ext.asyncio", "asyncpg", "alembic"},
    "secrets": {"pydantic_settings"},
    "settings": {"pydantic_settings"},
}


def room(module: str) -> str:
    """Return the module or package directly in fastapi_prodkit that `module` belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def own(module: str) -> set[str]:
    """Return the libraries that a module requires."""
    return OWN.get(module, OWN.get(room(module), set()))


def rank(module: str) -> int:
    """Return the level of a module: it may import from lower levels only."""
    name = room(module)
    return TOP[name] if name in TOP else 0 if name.startswith("_") or name in FOUNDATION else 1


def imports(module: str) -> set[str]:
    """Return our modules that `module` imports anywhere in its source."""
    gc.disable()  # gh-106905: CPython before 3.11.8 and 3.12.1 cannot parse while a collection runs code that parses
    try:
        tree = ast.parse(MODULES[module].read_text())
    finally:
        gc.enable()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            found |= {
                name if (name := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names
            }
    return {name for name in found if name.split(".")[0] == "fastapi_prodkit"}


# Imports the modules that the arguments name, one after the other, and writes what that did and what each has loaded.
PROBE = """
import importlib, json, logging, os, signal, sys, threading
seen = []
def watch(event, args):
    if event in {"socket.__new__", "socket.bind", "socket.connect", "subprocess.Popen", "signal.signal"}:
        seen.append(event)
    if event == "open" and os.path.basename(str(args[0])).startswith(".env"):
        seen.append(f"open {args[0]}")
sys.addaudithook(watch)
environment = dict(os.environ)
loaded, missing = {}, ""
for name in sys.argv[1:]:
    before = set(sys.modules)
    try:
        importlib.import_module(name)
    except ImportError as error:
        if type(error).__name__ != "MissingExtraError":
            raise
        missing = str(error)
    else:
        loaded[name] = sorted(set(sys.modules) - before)
for logger in (logging.root, *logging.root.manager.loggerDict.values()):
    seen += [repr(each) for each in getattr(logger, "handlers", ()) if type(each) is not logging.NullHandler]
seen += [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
seen += ["os.environ"] * (dict(os.environ) != environment)
print(json.dumps({"effects": seen, "loaded": loaded, "missing": missing}))
"""
# Loaded before the fork: third-party modules that any module may import.
COMMON = {"fastapi", "fastapi.testclient", "httpx2", "starlette.middleware.cors", "typer", "uvicorn"}
ENTRY_POINTS = [
    "fastapi_prodkit",
    "fastapi_prodkit.app",
    "fastapi_prodkit.auth",
    "fastapi_prodkit.cli",
    "fastapi_prodkit.database",
    "fastapi_prodkit.errors",
    "fastapi_prodkit.health",
    "fastapi_prodkit.logging",
    "fastapi_prodkit.rate_limit",
    "fastapi_prodkit.request_id",
    "fastapi_prodkit.settings",
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Import a module in another process and return its effects; skip if an extra is not installed."""
    directory = tmp_path_factory.mktemp("import")
    (directory / ".env").write_text("DEBUG=true\n")
    processes = {}

    @functools.cache
    def imported(*modules, fresh=False):
        loaded = frozenset() if fresh else frozenset(COMMON | own(modules[0]))
        if loaded not in processes:
            processes[loaded] = Forks("-I", loaded=loaded)
        outcome = processes[loaded].run(PROBE, *modules, directory=directory)
        assert outcome.code == 0, outcome.stderr
        report = json.loads(outcome.stdout)
        if not report["loaded"]:
            pytest.skip(report["missing"])
        return report

    yield imported
    for forks in processes.values():
        forks.close()


def tracked_files() -> list[Path]:
    """Return the files that are in the repository, or would be after `git add .`."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in run.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_lower_levels_only(module):
    """A piece never imports another piece, unless it is made from it."""
    allowed = {other for other in MODULES if rank(other) < rank(module) or room(other) == room(module)}
    if rank(module) == 0 or room(module) in TOP:
        allowed |= {other for other in MODULES if rank(other) == rank(module)}
    allowed |= {other for other in MODULES if room(other) == MADE_FROM.get(room(module))}

    upwards = imports(module) - allowed

    assert not upwards


def test_private_modules_at_the_top_are_few():
    """A module that only one piece needs is in the package of that piece."""
    private = {
        name
        for name in MODULES
        if re.fullmatch(r"fastapi_prodkit\._[a-z]\w*", name) and MODULES[name].stem != "__init__"
    }

    assert len(private) <= 10


def test_imports_have_no_cycle():
    """Imports for a type checker included."""
    ahead = {module: imports(module) - {module} for module in MODULES}

    while leaves := {module for module in ahead if not ahead[module]}:
        ahead = {module: others - leaves for module, others in ahead.items() if module not in leaves}

    assert not ahead


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_has_a_test_file_and_a_page(piece):
    """Each piece of the package has a test file and a documentation page that carry its name."""
    test, page = ROOT / "tests" / f"test_{piece}.py", ROOT / "docs" / "pieces" / f"{piece}.md"

    missing = [str(path.relative_to(ROOT)) for path in (test, page) if not path.exists()]

    assert not missing


def test_every_page_is_in_the_navigation():
    """The navigation in mkdocs.yml lists every page of the documentation, so each one can be reached."""
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}

    listed = re.findall(r"[\w/-]+\.md\b", (ROOT / "mkdocs.yml").read_text())

    assert sorted(listed) == sorted(pages)


@pytest.fixture(scope="module", params=sorted({room(module) for module in MODULES}))
def modules(request):
    """The modules of each package, those with libraries of their own last, so that no library is loaded for others."""
    return sorted((name for name in MODULES if room(name) == request.param), key=lambda name: len(own(name)))


def test_import_has_no_effects(modules, imported):
    """It opens no socket, reads no .env, and changes no logger, signal, thread or variable."""
    assert imported(*modules)["effects"] == []


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_first_import_has_no_effects(module, imported):
    """In a process that has loaded nothing."""
    assert imported(module, fresh=True)["effects"] == []


def test_import_loads_no_other_piece_and_library(modules, imported):
    """Importing a piece loads neither another piece nor a heavy third-party library that only others need."""
    for module, loaded in imported(*modules)["loaded"].items():
        heavy = HEAVY & set(loaded) - own(module)
        pieces = {room(name) for name in loaded if name.startswith("fastapi_prodkit.")} & set(PIECES)

        assert not heavy, module
        assert room(module) in TOP or pieces <= {room(module), MADE_FROM.get(room(module))}, module


def test_import_of_create_app_loads_no_optional_dependency(imported):
    """`from fastapi_prodkit import create_app` works with the core dependencies alone."""
    optional = {"aiosqlite", "alembic", "asyncpg", "boto3", "httpx2", "jwt", "redis", "sqlalchemy", "uvicorn"}

    loaded = imported("fastapi_prodkit.app", fresh=True)["loaded"]["fastapi_prodkit.app"]

    assert not optional & set(loaded)


@pytest.mark.parametrize("module", MODULES)
def test_module_has_at_most_300_lines(module):
    """No module of the package has more than 300 lines; a longer one has to be split."""
    lines = MODULES[module].read_text().count("\n")

    assert lines <= 300


def test_files_name_no_package_registry_and_no_local_path():
    """No tracked file contains the URL of a package registry or a local path, so any mirror or directory works."""
    hosts = r"https?://[a-z.-]*(py[p]i|python[h]osted|npm[j]s|debi[a]n)\."
    places = rf"{re.escape(str(ROOT))}\b|/(root|home/[a-z]+)/\.|/Users/[a-z]"
    pattern = re.compile(f"{hosts}|{places}")

    named = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked_files()
        for match in pattern.finditer(path.read_text(errors="replace"))
    }

    assert not named


def test_locks_have_a_hash_for_every_requirement():
    """Each requirement in a lock file has a SHA-256 hash, so `pip --require-hashes` can install the file."""
    locks = sorted((ROOT / "requirements").glob("*.txt"))

    unhashed = {
        f"{lock.name}: {entry.splitlines()[0]}"
        for lock in locks
        for entry in re.split(r"\n(?=[a-z])", lock.read_text())
        if "==" in entry and "--hash=sha256:" not in entry
    }

    assert locks
    assert not unhashed


def test_version_agrees_with_metadata_and_changelog():
    """The installed metadata has the version in `__version__`, and the CHANGELOG has a section for it."""
    version = fastapi_prodkit.__version__

    assert importlib.metadata.version("fastapi-prodkit") == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
