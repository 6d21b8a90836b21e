"""Run the documentation: every python block of a page, in order, in one process."""

import importlib.util
import inspect
import os
import re
import textwrap
from contextlib import closing
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from forks import Forks

from fastapi_prodkit import Settings
from fastapi_prodkit._config.variables import section_of
from fastapi_prodkit.sections import LimitsSettings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = {f"docs/pieces/{name}.md" for name in ("migrations", "secrets", "testing")}

# Runs with the page as its argument. Blocks keep the line numbers of their page, so a traceback points into it.
RUN_PAGE = """
import pathlib, re, sys, textwrap, types
page = sys.argv[1]
text = pathlib.Path(page).read_text(encoding="utf-8")
module = sys.modules["__page__"] = types.ModuleType("__page__")
for block in re.finditer(r"^( *)```python\\b[^\\n]*\\n(.*?)^\\1```", text, re.MULTILINE | re.DOTALL):
    lines_above = text.count("\\n", 0, block.start(2))
    try:
        exec(compile("\\n" * lines_above + textwrap.dedent(block.group(2)), page, "exec"), vars(module))
    except ImportError as error:
        if type(error).__name__ == "MissingExtraError":
            sys.exit(f"skip: {error}")
        if error.name == "opentelemetry.instrumentation":
            sys.exit("skip: the agents of this page are in the environment of make test-ecosystem")
        if error.name in {"aiosqlite", "alembic", "boto3", "moto", "sqlalchemy", "uvicorn"}:
            sys.exit(f"skip: {error.name} is not installed")
        raise
"""


@pytest.fixture(scope="module")
def forks():
    """Processes that have loaded the third-party modules that most pages import."""
    loaded = ("fastapi.testclient", "httpx2", "orjson", "prometheus_client", "pydantic_settings", "structlog")
    with closing(Forks("-W", "error", loaded=loaded)) as forks:
        yield forks


def parameter_of(page):
    """Return the parameter of a page; those that load Alembic, an emulator of AWS or pytest take seconds."""
    name = page.relative_to(ROOT).as_posix()
    return pytest.param(page, id=name, marks=[pytest.mark.system] if name in SLOW else [])


@pytest.mark.parametrize("page", [parameter_of(page) for page in PAGES])
def test_python_blocks_of_a_page_run(page, tmp_path, forks):
    """In an empty directory, without configuration."""
    kept = {key: value for key, value in os.environ.items() if key in {"PATH", "LANG", "SYSTEMROOT", "TMPDIR"}}
    environment = kept | {"ENVIRONMENT": "dev", "HOME": str(tmp_path)}

    run = forks.run(RUN_PAGE, str(page), directory=tmp_path, environment=environment)

    if run.stderr.startswith("skip: "):
        pytest.skip(run.stderr.removeprefix("skip: ").strip())
    assert run.code == 0, f"{page.relative_to(ROOT)}\n{run.stdout}{run.stderr}"


def files_of(page: Path) -> dict[str, str]:
    """Return the files of a page: the blocks with a title."""
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.system
@pytest.mark.parametrize("page", [page for page in PAGES if files_of(page)], ids=lambda page: page.stem)
def test_tests_of_a_page_pass(page, tmp_path, forks):
    """Its files are a project, whose tests are collected from the files themselves."""
    pytest.importorskip("jwt")
    for name, content in files_of(page).items():
        (tmp_path / name).write_text(content)
    run_tests = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider']))"

    run = forks.run(run_tests, directory=tmp_path, environment={"HOME": str(tmp_path)})

    assert run.code == 0, run.stdout + run.stderr


def documented_names() -> list[tuple[str, str]]:
    """Return every module and name of the reference."""
    rows = re.findall(
        r"^\| `(fastapi_prodkit[.\w]*)` \| (`.*) \|$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE
    )
    return [(module, name) for module, names in rows for name in re.findall(r"`(\w+)`", names)]


@pytest.mark.parametrize(("module", "name"), [each for each in documented_names() if each[1].endswith("Middleware")])
def test_docstring_example_of_every_middleware_runs(module, name):
    """The example in each middleware's docstring can be copied into an app, which then serves requests."""
    middleware, app = getattr(importlib.import_module(module), name), FastAPI()
    example = re.search(r"\n\n((?:    .*\n)+)\n", inspect.getdoc(middleware)).group(1)

    exec(textwrap.dedent(example), {"app": app, name: middleware})

    assert [each.cls for each in app.user_middleware] == [middleware]
    assert TestClient(app).get("/openapi.json").status_code in {200, 400}  # 400: the host is not testserver


def test_front_page_names_what_is_not_included():
    """A new piece would make this sentence false."""
    front_page = " ".join((ROOT / "docs/index.md").read_text().split())

    assert "Not included: tracing of its own." in front_page
    assert importlib.util.find_spec("fastapi_prodkit.tracing") is None


def test_table_of_sections_agrees_with_the_code():
    """Each section has a row, and each limit is in the row of its piece only."""
    pytest.importorskip("sqlalchemy")
    table = (ROOT / "docs/reference.md").read_text().partition("\n## Sections\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`.*? \| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    sections = {section_of(field): f"{name.upper()}_" for name, field in Settings.model_fields.items()}
    prefixes = {section.__name__: prefix for section, prefix in sections.items() if section is not None}
    limits = []

    for module, name, section, variables in rows:
        piece = getattr(importlib.import_module(f"fastapi_prodkit.{module}"), name)
        named = re.findall(r"[A-Z]+_[A-Z_]*", variables)
        assert named
        assert all(variable.startswith(prefixes[section]) for variable in named)
        if section == "LimitsSettings":
            limits += named
            assert section in str(inspect.signature(piece).parameters["settings"].annotation)

    assert {section for *_, section, _ in rows} == set(prefixes)
    assert sorted(limits) == sorted(f"LIMITS_{field.upper()}" for field in LimitsSettings.model_fields)


def test_names_of_the_reference_can_be_imported():
    """Every name in the reference can be imported from the module that the reference states."""
    assert len(documented_names()) > 30
    for module, name in documented_names():
        if module.startswith("fastapi_prodkit.database"):
            pytest.importorskip("sqlalchemy")
        if module == "fastapi_prodkit.cli":  # the last row
            pytest.importorskip("typer")
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_threat_model_names_tests_that_exist():
    """Each threat that is stopped has one."""
    page = (ROOT / "docs/threat-model.md").read_text()
    tables = page.partition("\n## Forged")[2].partition("\n## What is not stopped")[0]
    threats = [row for row in re.findall(r"^\| .* \|$", tables, re.MULTILINE) if not row.endswith("| Test |")]
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}

    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in sources.get(file, "")]

    assert len(threats) > 30
    assert all("::test_" in threat for threat in threats)
    assert not missing
