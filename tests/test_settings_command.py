"""`fastapi-prodkit settings`: every variable, its source, and the export formats."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from dotenv import dotenv_values

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from fastapi_prodkit import Settings
from fastapi_prodkit._config import variables
from fastapi_prodkit.cli import main, terminal

SECRET = "hunter2-7f3a"
ROOT = Path(__file__).parent.parent
SHOP = """
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

from pydantic import BaseModel, Field, SecretStr

from fastapi_prodkit import Settings
from fastapi_prodkit.sections import DatabaseSettings, Section


class Address(BaseModel):
    street: str = "Main Street"


class StripeSettings(Section):
    api_key: SecretStr = Field(description="Key of the account.")
    currencies: tuple[str, ...] = ("EUR", "USD")
    fallback: SecretStr = SecretStr("none # at all")
    greeting: str = 'say "it\\'s"\\n\\\\ now'


class Tier(IntEnum):
    FREE = 1
    PAID = 2


class ShopSettings(Settings):
    database: DatabaseSettings
    stripe: StripeSettings | None = None
    regions: list[str] = []
    address: Address = Address()
    cache_url: str = "redis://localhost"
    page: int
    port: int = Field(8000, validation_alias="SHOP_PORT")
    tier: Tier = Tier.FREE
    pause: timedelta = timedelta(minutes=5)
    folder: Path = Path("data")


PAGE = 1
"""
UNTIL_TOLD = """
import threading

for each in threading.enumerate():
    if isinstance(each, threading.Timer):
        each.join()
"""
BROKEN = """
settings = 1

def __dir__():
    return ["settings", "lazy"]

def __getattr__(name):
    raise AttributeError(name) if name == "Settings" else RuntimeError(name)
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty environment, and a module of settings in the current directory."""
    for name in list(os.environ):
        if name in variables.variables(Settings) or name.startswith(("DATABASE_", "STRIPE_")):
            monkeypatch.delenv(name)
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("ENVIRONMENT", "dev")
    monkeypatch.setattr(terminal, "_SHOW_AFTER", 60.0)  # no line about progress on a slow machine
    yield tmp_path
    for name in ("shop", "broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main(["settings", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def listed(run):
    """The variables of the shop, by name."""

    def listed(*arguments):
        _, out, _ = run("shop:ShopSettings", "--format", "json", *arguments)
        return {each["name"]: each for each in json.loads(out)}

    return listed


def test_every_variable_has_type_default_and_meaning(listed):
    """Variables of the service and switches of sections too."""
    found = listed()

    assert set(variables.variables(Settings)) - {"DATABASE_ENABLED"} < set(found)
    assert found["RATE_LIMIT_DEFAULT"] == {
        **found["RATE_LIMIT_DEFAULT"],
        "type": "str | none",
        "default": "100/minute",
        "required": False,
        "secret": False,
        "value": "10000/minute",
        "source": "the profile",
    }
    assert found["LIMITS_REQUEST_TIMEOUT"]["type"] == "float | none"
    assert found["LIMITS_REQUEST_TIMEOUT"]["default"] == "30"
    assert found["ENVIRONMENT"]["type"] == "dev | test | staging | prod"
    assert found["STRIPE_CURRENCIES"]["default"] == "EUR,USD"
    assert found["SHOP_PORT"]["default"] == "8000"
    assert (found["PAUSE"]["default"], found["TIER"]["default"], found["FOLDER"]["default"]) == ("PT5M", "1", "data")
    assert "PORT" not in found
    assert found["STRIPE_API_KEY"]["description"] == "Key of the account."
    assert [found[f"{name}_ENABLED"]["default"] for name in ("LIMITS", "DOCS", "STRIPE")] == ["true", "false", None]


def test_required_variables_are_marked(listed):
    """Also those with which an optional section begins."""
    found = listed()

    assert [name for name, each in found.items() if each["required"]] == ["DATABASE_URL", "PAGE"]
    assert [name for name, each in found.items() if each["begins"]] == ["STRIPE_API_KEY"]


def test_source_of_a_value_is_shown(listed, project, monkeypatch):
    """The command shows the highest-priority source of each value and masks secrets."""
    mounted = project / "mounted"
    mounted.mkdir()
    (mounted / "METRICS_TOKEN").write_text(SECRET)
    (project / ".env").write_text("SERVICE_NAME=a\nSERVICE_VERSION=b\nPAGE=3\n")
    (project / ".env.test").write_text("SERVICE_VERSION=c\nPAGE=4\n")
    monkeypatch.setenv("PAGE", "5")
    monkeypatch.setenv("SECRETS_DIR", str(mounted))

    found = listed("--environment", "test")

    assert {
        name: (found[name]["value"], found[name]["source"]) for name in ("SERVICE_NAME", "SERVICE_VERSION", "PAGE")
    } == {
        "SERVICE_NAME": ("a", ".env"),
        "SERVICE_VERSION": ("c", ".env.test"),
        "PAGE": ("5", "the environment"),
    }
    assert (found["METRICS_TOKEN"]["value"], found["METRICS_TOKEN"]["source"]) == ("********", "the mounted files")
    assert (found["METRICS_PUBLIC"]["value"], found["METRICS_PUBLIC"]["source"]) == ("true", "the profile")
    assert found["LOG_LEVEL"]["source"] == ""


FORMATS = ("table", "env", "markdown", "ecs", "json")


@pytest.mark.parametrize("form", FORMATS)
def test_secrets_are_never_shown(run, form, monkeypatch):
    """In no format; nor passwords in URLs."""
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:{SECRET}@db.example.com/shop")
    monkeypatch.setenv("STRIPE_API_KEY", SECRET)
    monkeypatch.setenv("CACHE_URL", f"redis://:{SECRET}@cache.example.com")

    _, out, err = run("shop:ShopSettings", "--format", form)

    assert "STRIPE_API_KEY" in out
    assert SECRET not in out + err


def test_invalid_settings_are_shown_and_exit_with_1(run):
    """The reasons are on standard error."""
    code, out, err = run("shop:ShopSettings", "--environment", "prod")

    assert code == 1
    assert "  RATE_LIMIT_DEFAULT  (str | none)  default 100/minute\n" in out
    assert "  DATABASE_URL  (secret)  required\n" in out
    assert "  STRIPE_API_KEY  (secret)  without it there is no stripe\n" in out
    assert "HOSTS_ALLOWED: is required" in err


def test_valid_settings_exit_with_0(run, monkeypatch):
    """Valid settings exit with code 0, and each set value is printed below its variable with its source."""
    monkeypatch.setenv("SERVICE_NAME", "orders")

    code, out, err = run()

    assert (code, err) == (0, "")
    assert "  SERVICE_NAME  (str)  default fastapi-service\n      = orders   from the environment\n" in out


def test_progress_is_shown_after_a_second(run, project, monkeypatch):
    """After one second of waiting the command prints on stderr which settings class it reads."""
    monkeypatch.setattr(terminal, "_SHOW_AFTER", 0.01)
    (project / "shop.py").write_text(f"{UNTIL_TOLD}\n{SHOP}")

    _, out, err = run("shop:ShopSettings", "--format", "env")

    assert err == "reading shop:ShopSettings ...\n"
    assert out.startswith("# Copy")


def test_env_format_sets_required_variables_only(run, project):
    """In the env format only required variables are assigned; all other variables are commented out."""
    code, out, _ = run("shop:ShopSettings", "--format", "env", "--output", ".env")

    assert code == 0
    assert out.startswith(".env has ")
    text = (project / ".env").read_text()
    assert [line for line in text.splitlines() if line and not line.startswith("#")] == ["DATABASE_URL=", "PAGE="]
    assert "\n# STRIPE_FALLBACK='none # at all'\n" in text


def test_env_format_is_valid_without_comment_signs(run, listed, caplog):
    """For any characters in a default."""
    _, text, _ = run("shop:ShopSettings", "--format", "env")
    uncommented = "\n".join(re.sub(r"^# (?=[A-Z0-9_]+=)", "", line) for line in text.splitlines())

    read = dotenv_values(stream=io.StringIO(uncommented))

    assert caplog.text == ""
    assert read == {name: each["default"] or "" for name, each in listed().items()}
    assert (read["HEADERS_CSP"][:18], read["STRIPE_GREETING"]) == ("default-src 'none'", 'say "it\'s"\n\\ now')


def test_existing_file_is_kept_without_force(run, project):
    """An existing output file is kept, and the error shows the command with --force, which overwrites the file."""
    (project / "table.md").write_text("mine")

    refused, _, err = run("--format", "markdown", "--output", "table.md")
    kept = (project / "table.md").read_text()
    code, _, _ = run("--format", "markdown", "--output", "table.md", "--force")

    assert (refused, kept, code) == (1, "mine", 0)
    assert err == (
        "fastapi-prodkit: table.md exists already; try: "
        "fastapi-prodkit settings fastapi_prodkit:Settings --format markdown --output table.md --force\n"
    )
    assert (
        "| `RATE_LIMIT_DEFAULT` | str \\| none | `100/minute` | Limit on every request of one client; or none. |"
        in (project / "table.md").read_text()
    )


def test_suggested_command_repeats_the_options(run, project):
    """Quoted for the shell."""
    (project / "my file").write_text("mine")
    options = ["--format", "ecs", "--environment", "test", "--secret", "arn:a b", "--output", "my file"]

    _, _, err = run("shop:ShopSettings", *options)
    typed = shlex.split(err.partition("; try: ")[2])
    run(*typed[2:])

    assert typed == ["fastapi-prodkit", "settings", "shop:ShopSettings", *options, "--force"]
    assert "arn:a b:DATABASE_URL::" in (project / "my file").read_text()


def test_ecs_format_has_environment_and_secrets(run, monkeypatch):
    """The ECS format puts set values into `environment` and secrets, as ARN references only, into `secrets`."""
    monkeypatch.setenv("SERVICE_NAME", "orders")
    monkeypatch.setenv("STRIPE_API_KEY", SECRET)
    monkeypatch.setenv("CACHE_URL", f"redis://:{SECRET}@cache.example.com")

    _, out, _ = run("shop:ShopSettings", "--format", "ecs", "--secret", "arn:orders")

    assert json.loads(out) == {
        "environment": [
            {"name": "ENVIRONMENT", "value": "dev"},
            {"name": "SERVICE_NAME", "value": "orders"},
            {"name": "PAGE", "value": ""},
        ],
        "secrets": [
            {"name": "STRIPE_API_KEY", "valueFrom": "arn:orders:STRIPE_API_KEY::"},
            {"name": "CACHE_URL", "valueFrom": "arn:orders:CACHE_URL::"},
            {"name": "DATABASE_URL", "valueFrom": "arn:orders:DATABASE_URL::"},
        ],
    }


@pytest.mark.parametrize(
    ("target", "instead"),
    [
        ("shop", "'shop' names no settings; try: fastapi-prodkit settings shop:Settings"),
        ("shop:ShopSetings", "there is no 'ShopSetings' in shop; try: fastapi-prodkit settings shop:ShopSettings"),
        ("shpo:ShopSettings", "there is no module 'shpo' here; try: fastapi-prodkit settings shop:ShopSettings"),
        (
            "fastapi_prodkit:Settingz",
            "there is no 'Settingz' in fastapi_prodkit; try: fastapi-prodkit settings fastapi_prodkit:Settings",
        ),
        ("broken:Settings", "there is no 'Settings' in broken; try: fastapi-prodkit settings --help"),
        (
            "shop:PAGE",
            "shop:PAGE is no settings class; name one that derives from fastapi_prodkit.Settings",
        ),
    ],
)
def test_unknown_class_is_an_error_with_a_suggestion(run, target, instead):
    """A settings class that cannot be found ends the command with one line that says what to type instead."""
    code, _, err = run(target)

    assert code in (1, 2)
    assert err == f"fastapi-prodkit: {instead}\n"


def test_unknown_environment_is_refused(run):
    """An unknown --environment exits with code 2 and an error that lists the valid environments."""
    code, out, err = run("--environment", "bogus")

    assert (code, out) == (2, "")
    assert err.endswith(
        ": 'bogus' is not one of 'dev', 'test', 'staging', 'prod'; try: fastapi-prodkit settings --help\n"
    )


@pytest.mark.parametrize("example", [".env.example", ".env.dev.example"])
def test_variables_of_the_example_are_settings(example, monkeypatch, capsys):
    """Every variable in the example's .env files is a variable of its settings class."""
    monkeypatch.chdir(ROOT / "examples" / "service")
    main(["settings", "service.config:ServiceSettings", "--format", "json"])
    known = {each["name"] for each in json.loads(capsys.readouterr().out)}

    lines = (ROOT / "examples" / "service" / example).read_text().splitlines()

    assert {line.partition("=")[0] for line in lines if line and not line.startswith("#")} <= known


@pytest.mark.system
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_lists_commands(shell):
    """The completion script asks the command itself, which offers `serve` and `settings` for `se`."""
    script = subprocess.run(
        [sys.executable, "-m", "fastapi_prodkit", "--show-completion", shell],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    asked = subprocess.run(
        [sys.executable, "-m", "fastapi_prodkit"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "_FASTAPI_PRODKIT_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": "fastapi-prodkit se",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "COMP_WORDS": "fastapi-prodkit se",
            "COMP_CWORD": "1",
        },
    )

    assert "_FASTAPI_PRODKIT_COMPLETE" in script.stdout
    assert "serve" in asked.stdout
    assert "settings" in asked.stdout
