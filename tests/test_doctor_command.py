"""The command `fastapi-prodkit doctor`: its output formats and exit codes."""

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

# All problems whose findings could show a secret.
SECRETS = {
    "DATABASE_URL": REMOTE.replace("db.example.com", "127.0.0.1:1"),
    "METRICS_TOKEN": "example-token-k3v8sPq",
    "RATE_LIMIT_STORAGE_URL": f"nonsense://:{SECRET}@cache.example.com",
}


def doctor(*arguments, **variables):
    """Run the command in another process, in the current directory, and outside of any git repository."""
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
    def test_service_without_findings_exits_with_0(self):
        """What was not examined is named."""
        name = service()

        run = doctor(f"{name}:app")

        assert run.returncode == 0, run.stdout
        assert "0 errors" in run.stdout
        assert "Not examined: database (DATABASE_URL is not set)." in run.stdout
        assert "hello" not in run.stdout

    def test_error_of_loading_the_app_is_a_finding(self):
        """Without a traceback."""
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

    def test_text_lists_findings_by_severity_in_80_columns(self, monkeypatch, capsys):
        """Each with id, reason and remedy."""
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
    def test_finding_that_reaches_fail_on_exits_with_1(self, monkeypatch, fail_on, variables, code):
        """The doctor exits with 1 if a finding is at least as severe as --fail-on, and otherwise with 0."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        assert main(["doctor", "--fail-on", fail_on]) == code

    @pytest.mark.parametrize("option", [[], ["--json"], ["--github"]])
    def test_report_without_findings_says_so(self, capsys, option):
        """A report without findings is not empty in any output format, and the exit code is 0."""
        code = main(["doctor", *option])

        assert code == 0
        assert capsys.readouterr().out

    def test_json_has_the_fields_of_the_page(self, monkeypatch, capsys):
        """The --json report has exactly the fields of the example on the doctor's documentation page."""
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
    def test_report_contains_no_secret(self, monkeypatch, capsys, option):
        """In no format."""
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

    def test_github_annotations_have_the_ids(self, monkeypatch, capsys):
        """A GitHub annotation has the rule id in its title, and a finding of level note becomes a notice."""
        monkeypatch.setenv("LIMITS_REQUEST_TIMEOUT", "60")

        code = main(["doctor", "--github"])

        first = capsys.readouterr().out.splitlines()[0]
        assert code == 0
        assert first.startswith(
            "::notice title=shutdown-cuts-requests%3A A shutdown aborts the longest requests::A request may take 60 s"
        )
        assert first.endswith("/pieces/doctor/#shutdown-cuts-requests")

    def test_github_annotations_are_escaped(self):
        """So that a message cannot begin another command."""
        finding = Finding("a-b", "error", "One, two: 100 %", "First\r\n::error::second", "50 %.")

        line = report.as_github(Examination(Facts(), (finding,))).splitlines()[0]

        assert line == (
            "::error title=a-b%3A One%2C two%3A 100 %25::First%0D%0A::error::second 50 %25. " + finding.docs
        )

    @pytest.mark.parametrize(
        ("variables", "coloured"),
        [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    )
    def test_colours_require_a_terminal_without_no_color(self, monkeypatch, capsys, variables, coloured):
        """An empty NO_COLOR counts as not set."""
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
    def test_usage_error_suggests_an_option_and_exits_with_2(self, tmp_path, monkeypatch, capsys, typed, instead):
        """A usage error prints one line that suggests what to type instead, and the exit code is 2."""
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop" / "__init__.py").write_text("length = 1\ndef make(): ...\n")
        (tmp_path / "shop" / "main.py").write_text("from fastapi import FastAPI\napplication = FastAPI()\n")
        for name in ("shop", "shop.main"):
            monkeypatch.delitem(sys.modules, name, raising=False)

        code = main(["doctor", *typed.split()])

        assert (code, capsys.readouterr().err) == (2, f"fastapi-prodkit: {instead}\n")
        for name in ("shop", "shop.main"):
            sys.modules.pop(name, None)

    def test_invalid_settings_leave_the_database_unexamined(self, monkeypatch, capsys):
        """The report says so."""
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

    def test_missing_import_of_the_app_is_a_finding(self, capsys):
        """Not a usage error."""
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
    def test_settings_of_prod_or_staging_are_checked(self, monkeypatch, capsys, variable, option, checked_as):
        """`.env.dev` is not read."""
        monkeypatch.setenv("ENVIRONMENT", variable)
        Path(f".env.{checked_as}").write_text("SHUTDOWN_DRAIN=0\n")

        main(["doctor", *option])

        out = capsys.readouterr().out
        assert f"checked as {checked_as}.\n" in out
        assert "shutdown-no-drain" in out

    def test_ignored_rule_has_no_findings(self, monkeypatch, capsys):
        """A rule passed to --ignore reports nothing and does not make the exit code 1."""
        monkeypatch.setenv("PROXY_TRUSTED", "")

        code = main(["doctor", "--fail-on", "warning", "--ignore", "proxy-untrusted"])

        assert code == 0
        assert "proxy-untrusted" not in capsys.readouterr().out

    def test_offline_does_not_connect_to_the_database(self, monkeypatch, capsys):
        """With --offline the doctor skips the database and reports that it was not examined."""
        monkeypatch.setenv("DATABASE_URL", REMOTE)

        main(["doctor", "--offline"])

        assert "Not examined: database (--offline)." in capsys.readouterr().out

    def test_progress_is_shown_after_a_second(self, monkeypatch, capsys):
        """The doctor prints a progress line to standard error if loading the app takes longer than a second."""
        monkeypatch.setattr(terminal, "_SHOW_AFTER", 0.01)
        until_told = "[each.join() for each in threading.enumerate() if isinstance(each, threading.Timer)]"
        name = module(f"import threading\n{until_told}\nfrom fastapi import FastAPI\napp = FastAPI()\n")

        main(["doctor", f"{name}:app"])

        assert capsys.readouterr().err == f"loading {name}:app ...\n"

    def test_help_lists_options_and_exit_codes(self, capsys):
        """doctor --help describes the command, its options, and the exit codes 0, 1 and 2."""
        code = main(["doctor", "--help"])

        out = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert code == 0
        assert "Check a service for unsafe, slow or wrong configuration" in out
        assert "Exit codes: 0 no finding reaches --fail-on, 1 a finding does, 2 usage error." in out
        assert all(option in out for option in ("--environment", "--json", "--github", "--offline", "--factory"))
