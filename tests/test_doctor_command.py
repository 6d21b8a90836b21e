"""`fastapi-prodkit doctor` as it is typed: what it prints, for whom, and its exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from doctoring import REMOTE, SECRET, SOUND, in_order, module  # noqa: F401 - a fixture

from fastapi_prodkit.cli import main, terminal
from fastapi_prodkit.cli.doctor import examination as examinations
from fastapi_prodkit.cli.doctor import report
from fastapi_prodkit.cli.doctor.examination import Examination
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Finding

pytestmark = pytest.mark.usefixtures("in_order")

# Everything at once that would show a secret if anything did.
SECRETS = {
    "DATABASE_URL": REMOTE.replace("db.example.com", "127.0.0.1:1"),
    "METRICS_TOKEN": "example-token-k3v8sPq",
    "RATE_LIMIT_STORAGE_URL": f"nonsense://:{SECRET}@cache.example.com",
}


def doctor(*arguments, **variables):
    """Run the command in a process of its own, in the current directory; without a git that this one belongs to."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(Path.cwd()),
        "GIT_CEILING_DIRECTORIES": str(Path.cwd().parent),
        **SOUND,
        **variables,
    }
    command = [sys.executable, "-m", "fastapi_prodkit", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def service(code=""):
    return module(f"from fastapi_prodkit import create_app\nprint('hello')\napp = create_app()\n{code}\n")


class TestProcess:
    def test_a_service_in_order(self):
        """The exit code is 0, what the app prints is not in the report, and what was not examined is named."""
        name = service()

        run = doctor(f"{name}:app")

        assert run.returncode == 0, run.stdout
        assert "0 errors" in run.stdout
        assert "Not examined: database (DATABASE_URL is not set)." in run.stdout
        assert "hello" not in run.stdout

    def test_an_app_that_cannot_be_loaded(self):
        """What it raises is a finding, without a traceback."""
        name = module("raise RuntimeError('no configuration: password=hunter2-7f3a')\n")

        run = doctor(f"{name}:app")

        assert run.returncode == 1
        assert "app-not-loaded" in run.stdout
        assert "hunter2" not in run.stdout + run.stderr
        assert "Traceback" not in run.stdout + run.stderr


class TestCommand:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.setattr(examinations.environment_facts, "container", lambda: None)
        monkeypatch.setattr(examinations.environment_facts, "installed", frozenset)

    def test_text_reads_well_in_80_columns(self, monkeypatch, capsys):
        """The worst comes first, each with its id, its reason and its remedy; no line is longer."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        monkeypatch.setenv("PROXY_TRUSTED", "")
        monkeypatch.setenv("LIMITS_REQUEST_TIMEOUT", "60")

        code = main(["doctor"])

        out = capsys.readouterr().out
        assert code == 1
        assert re.findall(r"^(\w+) +.*\[(.*)\]$", out, re.MULTILINE) == [
            ("ERROR", "settings-unsafe"),
            ("WARNING", "proxy-untrusted"),
            ("INFO", "shutdown-cuts-requests"),
        ]
        assert "         -> List the host names of the service, such as api.example.com.\n" in out
        assert re.findall(r"^ +https://\S+/pieces/doctor/#(\S+)$", out, re.MULTILINE) == [
            "settings-unsafe",
            "proxy-untrusted",
            "shutdown-cuts-requests",
        ]
        assert "\n1 error, 1 warning, 1 info; checked as prod.\n" in out
        assert max(len(line) for line in out.splitlines() if "https://" not in line) <= 80

    @pytest.mark.parametrize(
        ("fail_on", "variables", "code"),
        [
            ("error", {"PROXY_TRUSTED": ""}, 0),
            ("warning", {"PROXY_TRUSTED": ""}, 1),
            ("error", {"HOSTS_ALLOWED": ""}, 1),
        ],
    )
    def test_the_exit_code_is_for_ci(self, monkeypatch, fail_on, variables, code):
        """A finding as bad as `--fail-on` makes it 1."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        assert main(["doctor", "--fail-on", fail_on]) == code

    @pytest.mark.parametrize("option", [[], ["--json"], ["--github"]])
    def test_nothing_found(self, capsys, option):
        """That is said, too."""
        code = main(["doctor", *option])

        assert code == 0
        assert capsys.readouterr().out

    def test_json_is_what_the_page_says(self, monkeypatch, capsys):
        """Programs find the fields of the example on the page, and no others."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        page = (Path(__file__).parent.parent / "docs" / "pieces" / "doctor.md").read_text()
        example = json.loads(page.partition("```json\n")[2].partition("```")[0])

        main(["doctor", "--json"])

        said = json.loads(capsys.readouterr().out)
        assert said.keys() == example.keys()
        assert said["findings"] == example["findings"]
        assert said["summary"] == example["summary"]
        assert (said["schema"], said["environment"], said["app"]) == (1, "prod", None)
        assert {"what": "database", "reason": "DATABASE_URL is not set"} in said["skipped"]

    @pytest.mark.parametrize("option", [[], ["--json"], ["--github"]])
    def test_no_secret_is_shown(self, monkeypatch, capsys, option):
        """Not in the text, not in JSON, not in annotations, whatever is wrong."""
        monkeypatch.delenv("METRICS_TOKEN")
        Path(".env.prod").write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "."], check=True)

        code = main(["doctor", f"{service()}:app", *option])

        shown = "".join(capsys.readouterr())
        assert code == 1
        assert {"files-env-file", "app-not-loaded", "database-unreachable", "settings-weak-secret"} <= set(
            re.findall("[a-z]+-[a-z-]+", shown)
        )
        assert not re.search(f"{SECRET}|k3v8sPq", shown)

    def test_annotations(self, monkeypatch, capsys):
        """GitHub Actions shows each finding with its id; a note is its `notice`."""
        monkeypatch.setenv("LIMITS_REQUEST_TIMEOUT", "60")

        code = main(["doctor", "--github"])

        first = capsys.readouterr().out.splitlines()[0]
        assert code == 0
        assert first.startswith(
            "::notice title=shutdown-cuts-requests%3A A shutdown aborts the longest requests::A request may take 60 s"
        )
        assert first.endswith("/pieces/doctor/#shutdown-cuts-requests")

    def test_annotations_are_escaped(self):
        """Nothing that a message holds ends it early, or begins another command."""
        finding = Finding("a-b", "error", "One, two: 100 %", "First\r\n::error::second", "50 %.")

        line = report.as_github(Examination(Facts(), (finding,))).splitlines()[0]

        assert line == (
            "::error title=a-b%3A One%2C two%3A 100 %25::First%0D%0A::error::second 50 %25. " + finding.docs
        )

    @pytest.mark.parametrize(
        ("variables", "coloured"),
        [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    )
    def test_colour_is_for_terminals_that_want_it(self, monkeypatch, capsys, variables, coloured):
        """NO_COLOR is honoured unless it is empty, and so is a terminal that knows none; a pipe gets none anyway."""
        monkeypatch.setenv("HOSTS_ALLOWED", "")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        main(["doctor"])

        assert ("\033[31mERROR" in capsys.readouterr().out) is coloured

    @pytest.mark.parametrize(
        ("typed", "instead"),
        [
            ("shop", "'shop' names no app; try: fastapi-prodkit doctor shop:app"),
            (":app", "':app' names no app; try: fastapi-prodkit doctor main:app"),
            ("shpo.main:app", "there is no module 'shpo.main' here; try: fastapi-prodkit doctor shop.main:app"),
            ("nowhere:app", "there is no module 'nowhere' here; try: fastapi-prodkit doctor --help"),
            ("shop.main:ap", "there is no 'ap' in shop.main; try: fastapi-prodkit doctor shop.main:application"),
            ("shop:lenght", "there is no 'lenght' in shop; try: fastapi-prodkit doctor --help"),
            ("shop:mkae", "there is no 'mkae' in shop; try: fastapi-prodkit doctor shop:make"),
            ("shop:app", "there is no 'app' in shop; try: fastapi-prodkit doctor --help"),
            (
                "--ignore app-doc-public",
                "there is no rule 'app-doc-public'; try: fastapi-prodkit doctor --ignore app-docs-public",
            ),
            ("--ignore xyzzy", "there is no rule 'xyzzy'; try: fastapi-prodkit doctor --help"),
            ("--jsn", "there is no option --jsn; try: fastapi-prodkit doctor --json"),
            (
                "--json --github",
                "Invalid value: --json and --github exclude each other: choose one; try: fastapi-prodkit doctor --help",
            ),
        ],
    )
    def test_what_is_not_understood(self, tmp_path, monkeypatch, capsys, typed, instead):
        """One line says what to type instead, and the exit code is 2."""
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop" / "__init__.py").write_text("length = 1\ndef make(): ...\n")
        (tmp_path / "shop" / "main.py").write_text("from fastapi import FastAPI\napplication = FastAPI()\n")
        for name in ("shop", "shop.main"):
            monkeypatch.delitem(sys.modules, name, raising=False)

        code = main(["doctor", *typed.split()])

        assert (code, capsys.readouterr().err) == (2, f"fastapi-prodkit: {instead}\n")
        for name in ("shop", "shop.main"):
            sys.modules.pop(name, None)

    def test_settings_that_cannot_be_used(self, monkeypatch, capsys):
        """What hangs on them is named as not examined, too: the database."""
        monkeypatch.setenv("LOG_LEVEL", "LOUD")

        code = main(["doctor"])

        assert code == 1
        assert re.findall(r"^Not examined: (\w+)", capsys.readouterr().out, re.MULTILINE) == [
            "settings",
            "database",
            "files",
            "container",
            "app",
        ]

    def test_a_module_that_the_app_lacks(self, capsys):
        """Something that is not installed is the app's fault, and not a slip of the keyboard."""
        name = module("import xyzzy_is_not_installed\n")

        code = main(["doctor", f"{name}:app"])

        assert code == 1
        assert "No module named 'xyzzy_is_not_installed'" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("variable", "option", "checked_as"),
        [
            ("dev", [], "prod"),
            ("prod", [], "prod"),
            ("staging", [], "staging"),
            ("staging", ["--environment", "prod"], "prod"),
        ],
    )
    def test_whose_settings_are_judged(self, monkeypatch, capsys, variable, option, checked_as):
        """Those of production, unless this is staging; `.env.dev` has nothing to say about either."""
        monkeypatch.setenv("ENVIRONMENT", variable)
        Path(f".env.{checked_as}").write_text("SHUTDOWN_DRAIN=0\n")

        main(["doctor", *option])

        out = capsys.readouterr().out
        assert f"checked as {checked_as}.\n" in out
        assert "shutdown-no-drain" in out

    def test_a_rule_can_be_ignored(self, monkeypatch, capsys):
        """A team that has decided keeps its CI strict about the rest."""
        monkeypatch.setenv("PROXY_TRUSTED", "")

        code = main(["doctor", "--fail-on", "warning", "--ignore", "proxy-untrusted"])

        assert code == 0
        assert "proxy-untrusted" not in capsys.readouterr().out

    def test_offline_leaves_the_database_alone(self, monkeypatch, capsys):
        """CI can examine the rest without it."""
        monkeypatch.setenv("DATABASE_URL", REMOTE)

        main(["doctor", "--offline"])

        assert "Not examined: database (--offline)." in capsys.readouterr().out

    def test_progress_is_told_after_a_second(self, monkeypatch, capsys):
        """Whoever waits knows what for."""
        monkeypatch.setattr(terminal, "_SHOW_AFTER", 0.01)
        until_told = "[each.join() for each in threading.enumerate() if isinstance(each, threading.Timer)]"
        name = module(f"import threading\n{until_told}\nfrom fastapi import FastAPI\napp = FastAPI()\n")

        main(["doctor", f"{name}:app"])

        assert capsys.readouterr().err == f"loading {name}:app ...\n"

    def test_help_says_what_it_does(self, capsys):
        """Every option has its line, and the exit codes are there."""
        code = main(["doctor", "--help"])

        out = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert code == 0
        assert "Check a service for unsafe, slow or wrong configuration" in out
        assert "Exit codes: 0 no finding reaches --fail-on, 1 a finding does, 2 usage error." in out
        assert all(option in out for option in ("--environment", "--json", "--github", "--offline", "--factory"))
