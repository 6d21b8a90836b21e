"""`fastapi-prodkit routes`: the list, the file that it writes, and the checks of a pipeline."""

import itertools
import json
import re

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from fastapi_prodkit.cli import main, terminal

SERVICE = """
from fastapi import Depends
from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import CurrentUser, public, require_roles
from fastapi_prodkit.deadline import Timeout

app = create_app(Settings(auth={"secret": "not-a-good-secret-but-a-long-one"}, hosts=None))

@app.get("/me")
async def me(user: CurrentUser) -> str:
    return user.id

@app.post("/reports", dependencies=[Depends(require_roles("editor")), Depends(Timeout(120))])
async def write() -> None: ...

@app.get("/orders")
async def orders() -> None: ...

def make():
    return app
"""
EDITOR = 'Depends(require_roles("editor")), Depends(Timeout(120))'
FILE = [
    "GET /me  any user",
    "GET /orders  any user",
    "POST /reports  role editor  deadline 120 s",
]
_numbers = itertools.count()


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A function that writes a service into the current directory, and returns its module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENVIRONMENT", raising=False)
    monkeypatch.setattr(terminal, "_SHOW_AFTER", 60)

    def write(*replaced, source=SERVICE):
        name = f"routes_service_{next(_numbers)}"
        for old, new in replaced:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def run(capsys, *arguments):
    """Return the exit code, standard output and standard error."""
    code = main(["routes", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_list_is_a_table(capsys, service):
    """In aligned columns, with file and line of each route, and with what `default` stands for."""
    name = service()

    code, out, err = run(capsys, f"{name}:app", "--environment", "prod")

    head, *lines, _, last = out.splitlines()
    columns = [head.index(each) for each in ("RULE", "RATE LIMIT", "DEADLINE", "BODY", "SCHEMA", "DEFINED IN")]
    reports = next(line for line in lines if "/reports" in line)
    cells = [reports[start:end].strip() for start, end in zip(columns, [*columns[1:], None], strict=True)]
    assert (code, err) == (0, "")
    assert cells == ["role editor", "default", "120 s", "default", "no", f"{name}.py:13"]
    assert re.search(r"^GET +/health +probe +exempt +none ", out, re.MULTILINE)
    assert last == "7 routes; default: rate limit 100/minute, deadline 30 s, body 1 MiB"
    assert "\033" not in out


def test_head_of_the_table_is_bold_on_a_terminal(capsys, monkeypatch, service):
    """And nothing is where output is piped."""
    monkeypatch.setattr("fastapi_prodkit.cli.routes.coloured", lambda _: True)

    _, out, _ = run(capsys, f"{service()}:app")

    assert out.startswith("\033[1mMETHOD ")
    assert out.count("\033[1m") == 1


def test_environment_of_the_list_is_that_of_the_process(capsys, monkeypatch, service):
    """Or dev; --environment wins."""
    name = service()
    found = []
    for value, options in ((None, ()), ("staging", ()), ("staging", ("--environment", "test"))):
        if value is not None:
            monkeypatch.setenv("ENVIRONMENT", value)
        found.append(json.loads(run(capsys, f"{name}:app", "--json", *options)[1])["environment"])

    assert found == ["dev", "staging", "test"]


def test_json_has_every_field(capsys, service):
    """Of each row, and what `default` stands for."""
    name = service()

    _, out, _ = run(capsys, f"{name}:make", "--factory", "--json")

    report = json.loads(out)
    assert (report["schema"], report["app"]) == (1, f"{name}:make")
    assert report["default"].startswith("rate limit 10000/minute, ")
    assert next(each for each in report["routes"] if each["path"] == "/reports") == {
        "method": "POST",
        "path": "/reports",
        "rule": "role editor",
        "limit": "default",
        "deadline": "120 s",
        "body": "default",
        "in_schema": True,
        "hidden": False,
        "note": "",
        "explicit": True,
        "by_settings": False,
        "source": f"{name}.py:13",
    }


def test_file_has_what_a_review_has_to_see(capsys, service, tmp_path):
    """Its first line is the command that writes it, and the check finds no difference."""
    name = service()

    written = run(capsys, f"{name}:app", "--write")
    checked = run(capsys, f"{name}:app", "--check")

    assert written[:2] == (0, "routes.lock has 3 routes\n")
    assert (tmp_path / "routes.lock").read_text().splitlines() == [
        f"# Written by: fastapi-prodkit routes {name}:app --write",
        *FILE,
    ]
    assert checked[:2] == (0, "The routes are those of routes.lock.\n")


@pytest.mark.parametrize("environment", ["dev", "test", "prod"])
def test_file_is_the_same_in_every_environment(capsys, monkeypatch, service, tmp_path, environment):
    """ENVIRONMENT is not asked, and what the settings decide is not in the file."""
    monkeypatch.setenv("ENVIRONMENT", "staging")

    run(capsys, f"{service()}:app", "--write", "--environment", environment)

    assert (tmp_path / "routes.lock").read_text().splitlines()[1:] == FILE


def test_check_says_what_has_opened(capsys, service, tmp_path):
    """With 3, in words, openings first; --write accepts it, and says the same."""
    run(capsys, f"{service()}:app", "--write")
    name = service(("user: CurrentUser", ""), ("return user.id", "return 'me'"), (EDITOR, "Depends(Timeout(120))"))
    (tmp_path / "routes.lock").write_text((tmp_path / "routes.lock").read_text() + "GET /old  public\n")

    code, out, _ = run(capsys, f"{name}:app", "--check")
    written = run(capsys, f"{name}:app", "--write")[1]

    assert code == 3
    assert out.splitlines()[:-1] == [
        "The routes differ from routes.lock:",
        "  POST /reports  now any user (was role editor)",
        "  GET /old       removed",
    ]
    assert re.fullmatch(r"If all of this is intended: fastapi-prodkit routes \w+:app --write", out.splitlines()[-1])
    assert "POST /reports  now any user (was role editor)\n" in written
    assert run(capsys, f"{name}:app", "--check")[0] == 0


def test_check_without_a_file_fails(capsys, service):
    """A pipeline must not pass because the file was forgotten."""
    code, out, _ = run(capsys, f"{service()}:app", "--check", "--lock", "other.lock")

    assert code == 3
    assert out.startswith("other.lock does not exist.\nWrite it, and commit it: fastapi-prodkit routes ")


def test_strict_demands_an_explicit_rule(capsys, service):
    """A caller as a parameter is one; that every route needs a caller is none. It needs no file."""
    code, out, _ = run(capsys, f"{service()}:app", "--strict")
    explicit = service(("async def orders()", "async def orders(user: CurrentUser)"))

    assert code == 3
    assert out.splitlines() == [
        "These routes have no rule of their own:",
        "  GET /orders  any user",
        "Give each of them one: public, CurrentUser, require_roles or require_scopes.",
    ]
    assert run(capsys, f"{explicit}:app", "--strict")[:2] == (0, "Every route has an explicit rule.\n")


def test_both_checks_report_what_they_find(capsys, service):
    """In one run."""
    name = service()
    run(capsys, f"{name}:app", "--write")
    other = service(('"/orders"', '"/open"'))

    both = run(capsys, f"{other}:app", "--check", "--strict")
    strict_only = run(capsys, f"{name}:app", "--check", "--strict")

    assert both[0] == strict_only[0] == 3
    assert "GET /open    new route: any user\n" in both[1]
    assert "have no rule of their own:\n  GET /open  any user\n" in both[1]
    assert "differ" not in strict_only[1]


def test_file_without_authentication_is_written_with_a_warning(capsys, service):
    """It surprises whoever has the variables in `.env.dev`, which is not read in the environment test."""
    guarded = run(capsys, f"{service()}:app", "--write")[2]
    name = service(('auth={"secret": "not-a-good-secret-but-a-long-one"}, ', ""))

    err = run(capsys, f"{name}:app", "--write")[2]

    assert "unguarded" not in guarded
    assert "1 of them unguarded: the app has no authentication in test\n" in err


def test_annotations_name_the_place(capsys, service):
    """GitHub shows each of them at the endpoint, with the remedy at the end of the log."""
    run(capsys, f"{service()}:app", "--write")
    name = service((EDITOR, ""), ('@app.get("/me")', '@app.get("/you")'))

    code, out, _ = run(capsys, f"{name}:app", "--check", "--github")
    missing = run(capsys, f"{name}:app", "--check", "--github", "--lock", "other.lock")[1]

    deadline = "deadline now default (was 120 s)"
    title = "title=The routes differ from routes.lock"
    assert code == 3
    assert out.splitlines()[:-1] == [
        f"::error {title},file={name}.py,line=13::POST /reports: now any user (was role editor), {deadline}",
        f"::error {title},file={name}.py,line=9::GET /you: new route: any user",
        f"::error {title}::GET /me: removed",
    ]
    assert missing.startswith("::error title=other.lock does not exist::other.lock does not exist\n")


@pytest.mark.parametrize(
    "options",
    [("--write", "--check"), ("--write", "--strict"), ("--json", "--check"), ("--json", "--write"), ("--github",)],
)
def test_options_that_exclude_each_other_are_refused(capsys, service, options):
    """As wrong usage, before the app is loaded."""
    code, out, err = run(capsys, f"{service()}:app", *options)

    assert (code, out) == (2, "")
    assert "exclude" in err or "is for" in err


def test_command_in_the_file_has_the_options(capsys, service, tmp_path):
    """So that it can be copied."""
    name = service()

    run(capsys, f"{name}:make", "--factory", "--write", "--lock", "a b.lock", "--environment", "prod")

    first = (tmp_path / "a b.lock").read_text().partition("\n")[0]
    command = f"fastapi-prodkit routes {name}:make --write --lock 'a b.lock' --factory --environment prod"
    assert first == f"# Written by: {command}"


@pytest.mark.parametrize(
    ("source", "target", "error"),
    [
        ("raise RuntimeError('broken')", "app", "cannot be loaded: RuntimeError: broken"),
        ("import sys; sys.exit(0)", "app", "cannot be loaded: it ends the process: sys.exit(0)"),
        ("app = print", "app", "is a builtin_function_or_method, and neither FastAPI nor Starlette"),
        ("from fastapi import FastAPI; app = FastAPI()", "application", "try: fastapi-prodkit routes"),
        (
            "from fastapi_prodkit import Settings; Settings(limits={'max_body_size': -1})",
            "app",
            "LIMITS_MAX_BODY_SIZE",
        ),
    ],
)
def test_app_that_cannot_be_loaded_fails(capsys, service, source, target, error):
    """An app that ends the process with 0 must not pass the check."""
    name = service(source=source)

    code, out, err = run(capsys, f"{name}:{target}", "--check")

    assert code in {1, 2}
    assert (error in err, out) == (True, "")


def test_missing_setting_is_reported_with_the_files_that_were_read(capsys, service):
    """It may be in `.env.dev`, which the check does not read."""
    name = service(source="from fastapi_prodkit import Settings; Settings(limits={'max_body_size': -1})")

    errors = [run(capsys, f"{name}:app", *options)[2] for options in (["--check"], ["--check", "--environment", "dev"])]

    assert "ENVIRONMENT is test: .env and .env.test are read\n" in errors[0]
    assert "ENVIRONMENT is dev: .env and .env.dev are read\n" in errors[1]


def test_app_need_not_be_fastapi(capsys, service):
    """A Starlette app without any piece of the library is listed, too; what it prints is not in the list."""
    source = (
        "from starlette.applications import Starlette; print('hello'); app = Starlette(); app.mount('/a', app=print)"
    )

    code, out, err = run(capsys, f"{service(source=source)}:app")

    lines = out.splitlines()
    assert (code, err) == (0, "hello\n")
    assert lines[1].startswith("ANY     /a/*  unguarded (app builtin_function_or_method)  default ")
    assert lines[-1] == "1 routes; default: rate limit none, deadline none, body none"
