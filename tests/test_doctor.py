"""`fastapi-prodkit doctor`: each rule with and without a problem, and the documentation of the rules."""

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from doctoring import REMOTE, SECRET, gathered, ids, in_order, module  # noqa: F401 - a fixture

from fastapi_prodkit._config.worker_count import configured_workers
from fastapi_prodkit.cli.doctor import environment_facts
from fastapi_prodkit.cli.doctor.examination import examine, gather
from fastapi_prodkit.cli.doctor.facts import Container, Facts
from fastapi_prodkit.cli.doctor.placeholders import is_guessable, is_placeholder
from fastapi_prodkit.cli.doctor.rules import RULES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pieces" / "doctor.md"
pytestmark = pytest.mark.usefixtures("in_order")

IN_A_CONTAINER = Container(root=False, first="fastapi-prodkit", cores=2.0, memory=2**30)


class TestRules:
    def test_rules_have_unique_ids(self):
        """Dashboards and suppressions rely on them."""
        names = [rule.id for rule in RULES]

        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in names)

    def test_page_explains_exactly_these_rules(self):
        """The link of a finding leads to its explanation."""
        anchors = re.findall(r"^### ([a-z-]+)$", PAGE.read_text(), re.MULTILINE)

        assert sorted(anchors) == sorted(rule.id for rule in RULES)

    def test_recommended_settings_have_no_findings(self):
        """The doctor reports no finding for the settings that the documentation recommends."""
        assert ids(gathered()) == set()

    def test_unknown_facts_have_no_findings(self):
        """The doctor's rules report no finding about facts that could not be gathered."""
        assert ids(Facts()) == set()


class TestSettings:
    @pytest.mark.parametrize(
        ("expected", "fault"),
        [
            ("settings-invalid", {"LOG_LEVEL": "LOUD"}),
            ("settings-invalid", {"LIMITS_MAX_BODY_SIZE": "much"}),
            ("settings-unsafe", {"HOSTS_ALLOWED": ""}),
            ("settings-unsafe", {"HOSTS_ALLOWED": "*"}),
            ("settings-unsafe", {"DEBUG": "true"}),
            ("settings-unsafe", {"PROXY_TRUSTED": "*"}),
            ("settings-unsafe", {"CORS_ORIGINS": "*", "CORS_ALLOW_CREDENTIALS": "true"}),
            ("settings-unsafe", {"WEB_CONCURRENCY": "4"}),
            ("settings-unsafe", {"DATABASE_URL": REMOTE, "DATABASE_SSL": "off"}),
            ("settings-near-miss", {"LOG_LEVLE": "INFO"}),
            ("settings-unsafe", {"METRICS_TOKEN": "change-me"}),
            ("settings-weak-secret", {"METRICS_TOKEN": "change-me-before-production"}),
            ("settings-weak-secret", {"DATABASE_URL": REMOTE.replace(SECRET, "secret")}),
            ("settings-unsafe", {"HEALTH_TOKEN": "k3v8sPq"}),
            ("settings-weak-secret", {"LOG_LEVEL_TOKEN": "your-secret-here"}),
            ("settings-weak-secret", {"RATE_LIMIT_STORAGE_URL": "redis://:changeme@cache.example.com"}),
            ("settings-weak-secret", {"AUTH_SECRET": "not-a-good-secret-but-a-long-one"}),
            ("settings-weak-secret", {"AUTH_SECRET": "0123456789abcdef" * 4}),
            ("settings-unsafe", {"AUTH_ISSUER": "http://localhost:9000", "AUTH_AUDIENCE": "orders"}),
            ("settings-limit-off", {"LIMITS_REQUEST_TIMEOUT": "none"}),
            ("settings-limit-off", {"LIMITS_ENABLED": "false"}),
            ("proxy-untrusted", {"PROXY_TRUSTED": ""}),
            ("shutdown-too-long", {"SHUTDOWN_GRACE": "40"}),
            ("shutdown-no-drain", {"SHUTDOWN_DRAIN": "0"}),
            ("shutdown-no-drain", {"SHUTDOWN_ENABLED": "false"}),
            ("shutdown-cuts-requests", {"LIMITS_REQUEST_TIMEOUT": "26"}),
            ("app-metrics-public", {"METRICS_PUBLIC": "true"}),
        ],
    )
    def test_problem_has_one_finding(self, monkeypatch, expected, fault):
        """Under its id."""
        for name, value in fault.items():
            monkeypatch.setenv(name, value)

        found = ids(gathered())

        assert found == {expected}

    @pytest.mark.parametrize(
        "sound",
        [
            {"RATE_LIMIT_ENABLED": "false", "PROXY_TRUSTED": ""},
            {"METRICS_ENABLED": "false"},
            {"HEALTH_TOKEN": "iK3v_8sPq-2mZx7L", "LOG_LEVEL_TOKEN": "iK3v_8sPq-2mZx7L"},
            {"RATE_LIMIT_STORAGE_URL": f"redis://:{SECRET}@cache.example.com"},
            {"AUTH_SECRET": "5f1f0a7d0cf24b2c8c3d8f8a1c8e0b7e9d6a4c2b1f3e5d7c9b8a7f6e5d4c3b2a"},
            {"CORS_ORIGINS": "https://app.example.com", "CORS_ALLOW_CREDENTIALS": "true"},
            {"WEB_CONCURRENCY": "4", "RATE_LIMIT_STORAGE_URL": "redis://cache"},
            {"LIMITS_ENABLED": "true", "LIMITS_REQUEST_TIMEOUT": "25"},
        ],
    )
    def test_safe_configuration_has_no_findings(self, monkeypatch, sound):
        """Settings that are safe or switched off on purpose cause no finding."""
        for name, value in sound.items():
            monkeypatch.setenv(name, value)

        assert ids(gathered()) == set()

    @pytest.mark.parametrize(
        ("name", "value", "weak"),
        [
            ("SHOP_KEY", "change-me", True),
            ("SHOP_KEY", "k3v8s", True),
            ("SHOP_KEY", SECRET, False),
            ("SHOP_KEY", "", False),
            ("SIGNING_TOKEN", SECRET, True),
            ("STRIPE_API_KEY", "your-secret-here", True),
            ("STRIPE_API_KEY", SECRET, False),
        ],
    )
    def test_secrets_of_user_settings_are_checked(self, monkeypatch, name, value, weak):
        """Every `SecretStr`, in sections too; only a token must be as long as ours."""
        monkeypatch.setenv(name, value)
        service = module(
            "from pydantic import Field, SecretStr\nfrom fastapi_prodkit import Settings, create_app\n"
            "from fastapi_prodkit.sections import Section\n"
            "class Stripe(Section):\n    api_key: SecretStr | None = None\n"
            "class Own(Settings):\n    shop_key: SecretStr | None = None\n"
            "    signing: SecretStr | None = Field(None, validation_alias='SIGNING_TOKEN')\n"
            "    stripe: Stripe = Stripe()\n"
            "app = create_app(Own())\n"
        )

        found = examine(gathered(f"{service}:app")).findings

        assert [each.reason.split()[0] for each in found] == [name] * weak
        assert not value or value not in repr(found)

    @pytest.mark.parametrize(
        ("secret", "weak"),
        [
            ("a-string-secret-at-least-256-bits-long", True),
            ("ChangeMe-7b1c9e5f3a2d4c6b8e0f1a3c5d7e", True),
            ("a" * 32, True),
            ("3fa9c1d2" * 4 + "3fa9", True),
            ("abcdefghijklmnopqrstuvwxyz0123456789", True),
            ("aabbccddeeabcdeeabcddeebcaabcaddceab", True),
            ("3fa9c1d27be0485c9d1e6f203b7a8c54", False),
            ("q3Xk0vJm1N8tZr5Yc2Hb7Ld9Gf4Ws6Pa", False),
        ],
    )
    def test_guessable_secrets_have_a_word_or_a_pattern(self, secret, weak):
        """Words of examples, repetition, counting, and few different characters."""
        assert is_guessable(secret) is weak

    def test_env_file_of_the_environment_is_read(self, monkeypatch):
        """`.env.prod`, not `.env.dev`."""
        monkeypatch.delenv("HOSTS_ALLOWED")
        Path(".env.prod").write_text("HOSTS_ALLOWED=api.example.com\nSHUTDOWN_GRACE=50\n")
        Path(".env.dev").write_text("DEBUG=true\n")

        assert ids(gathered()) == {"shutdown-too-long"}

    @pytest.mark.parametrize("environment", ["dev", "staging"])
    def test_values_of_another_environment_are_checked_as_for_prod(self, monkeypatch, environment):
        """The variable ENVIRONMENT is restored."""
        monkeypatch.setenv("ENVIRONMENT", "test")
        monkeypatch.setenv("DEBUG", "true")

        found = gather(None, environment=environment, factory=False, timeout=None)

        assert "DEBUG" in " ".join(f.reason for f in examine(found).findings if f.id == "settings-unsafe")
        assert os.environ["ENVIRONMENT"] == "test"

    def test_all_refused_settings_are_reported(self, monkeypatch):
        """Each with its reason and remedy."""
        monkeypatch.setenv("DEBUG", "true")
        monkeypatch.setenv("HOSTS_ALLOWED", "")

        found = examine(gathered()).findings

        assert [(each.reason, each.remedy) for each in found] == [
            ("DEBUG shows tracebacks and variables to every client.", "Set it to false."),
            ("HOSTS_ALLOWED is required.", "List the host names of the service, such as api.example.com."),
        ]

    def test_invalid_setting_without_a_remedy_gets_one(self):
        """The finding for an invalid setting without a known remedy suggests a value of the required form."""
        facts = Facts(unusable={"DEBUG": "must be true or false"})

        (found,) = examine(facts).findings

        assert (found.reason, found.remedy) == (
            "DEBUG must be true or false.",
            "Set DEBUG to a value of that form.",
        )

    def test_other_warnings_are_not_misspelt_variables(self):
        """A settings warning on another subject does not cause the finding for misspelt variables."""
        assert ids(Facts(warned=("SHUTDOWN_DRAIN and SHUTDOWN_GRACE are 45 s together",))) == set()

    def test_invalid_url_has_no_password_to_check(self, monkeypatch):
        """Rules about the database report it."""
        monkeypatch.setenv("DATABASE_URL", "postgresql://[broken")

        assert ids(gathered()) == set()


class TestFiles:
    @pytest.mark.parametrize("name", [".env", ".env.prod", "deploy/.env", "deploy/prod.env"])
    def test_tracked_env_file_is_found_without_its_content(self, name):
        """In any directory."""
        (found,) = self.examined(name, f"METRICS_TOKEN={SECRET}")

        assert (found.id, found.severity) == ("files-env-file", "error")
        assert found.reason.startswith(f"{name}: ")
        assert found.remedy.startswith(f"git rm --cached {name}, ")
        assert SECRET not in repr(found)

    @pytest.mark.parametrize("name", [".env.example", ".env.dev.example", ".env.sample", ".envrc", "env.py"])
    def test_tracked_file_without_secrets_is_not_found(self, name):
        """Example env files, .envrc and env.py may be tracked by git without a finding."""
        assert self.examined(name, f"METRICS_TOKEN={SECRET}") == ()

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("Dockerfile", 'CMD ["uvicorn", "service.main:app", "--host", "0.0.0.0"]'),
            ("Procfile", "web: uvicorn service:app --port $PORT"),
            ("deploy/shop.service", "ExecStart=/srv/shop/bin/uvicorn shop.main:app"),
            ("start.sh", "exec gunicorn -k uvicorn.workers.UvicornWorker shop:app"),
            ("compose.yaml", "    command: fastapi run shop/main.py"),
        ],
    )
    def test_uvicorn_without_a_head_limit_is_found(self, name, text):
        """The finding names the file."""
        (found,) = self.examined(name, text)

        assert (found.id, found.severity) == ("files-uvicorn", "warning")
        assert found.reason.startswith(f"{name} starts uvicorn")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("Dockerfile", 'CMD ["fastapi-prodkit", "serve", "service.main:app"]'),
            ("Dockerfile", 'CMD ["uvicorn", "service.main:app", "--http", "h11"]'),
            ("Makefile.sh", "uvicorn service:app --reload"),
            ("Dockerfile", "RUN pip install uvicorn\n# uvicorn service:app"),
            ("start.sh", "exec gunicorn -k uvicorn.workers.UvicornH11Worker shop:app"),
            ("README.md", "uvicorn service:app"),
        ],
    )
    def test_server_with_a_head_limit_is_not_found(self, name, text):
        """Nor a server for development, or the word in a text."""
        assert self.examined(name, text) == ()

    @pytest.mark.parametrize("size", [None, 1_000_001])
    def test_missing_or_large_file_is_not_read(self, size):
        """A tracked file that is missing on disk or larger than 1 MB causes no finding."""
        if size is not None:
            Path("start.sh").write_text("uvicorn service:app\n".ljust(size))

        assert examine(Facts(tracked=("start.sh",))).findings == ()

    @staticmethod
    def examined(name, text):
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return examine(Facts(tracked=(name,))).findings

    @pytest.mark.parametrize(
        ("value", "known"),
        [
            ("", True),
            ("Change_Me", True),
            ("your-token-here", True),
            ("secret123", True),
            ("your_key", True),
            (SECRET, False),
        ],
    )
    def test_placeholders_are_recognized_in_any_spelling(self, value, known):
        """is_placeholder detects empty and placeholder values in any spelling, and accepts a real secret."""
        assert is_placeholder(value) is known


class TestSurroundings:
    def test_tracked_lists_files_below_the_directory(self, tmp_path):
        """tracked lists only git files below the given directory, with paths relative to that directory."""
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
        (tmp_path / "service").mkdir()
        (tmp_path / "service" / ".env").touch()
        (tmp_path / "other").touch()
        subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)

        assert environment_facts.tracked(tmp_path / "service") == ((".env",), None)

    def test_tracked_returns_the_error_of_git(self, tmp_path, monkeypatch):
        """Outside of a git repository, tracked returns no files and git's error message as the reason."""
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

        files, reason = environment_facts.tracked(tmp_path)

        assert files == ()
        assert "not a git repository" in reason

    def test_tracked_works_without_git(self, tmp_path, monkeypatch):
        """Without a git executable, tracked returns no files and the reason, as is usual in a container."""
        monkeypatch.setenv("PATH", str(tmp_path))

        assert environment_facts.tracked(tmp_path) == ((), "git is not installed")

    @pytest.mark.parametrize(
        ("script", "reason"), [("exec sleep 60", "git took longer than 0.2 s"), ("exit 1", "git failed")]
    )
    def test_tracked_has_a_time_out(self, tmp_path, monkeypatch, script, reason):
        """tracked returns no files and the reason if git exceeds the time-out or fails."""
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(environment_facts, "_GIT_TIMEOUT", 0.2 if "sleep" in script else 20)

        assert environment_facts.tracked(tmp_path) == ((), reason)

    def test_installed_lists_packages_of_the_server(self, monkeypatch):
        """Without importing them."""
        monkeypatch.setattr(environment_facts, "_SERVER", ("typer", "no_such_server"))

        assert environment_facts.installed() == {"typer"}

    @pytest.mark.parametrize(("variable", "count"), [("4", 4), ("0", None), ("many", None)])
    def test_workers_are_read_from_web_concurrency(self, monkeypatch, variable, count):
        """The worker count is the value of WEB_CONCURRENCY, or None if the value is no positive number."""
        monkeypatch.setenv("WEB_CONCURRENCY", variable)

        assert configured_workers() == count

    def test_container_is_none_outside_of_a_container(self, tmp_path):
        """The container facts are None if neither files nor environment variables indicate a container."""
        assert environment_facts.container(tmp_path, {}) is None

    def test_container_limits_are_read_from_the_control_group(self, tmp_path):
        """A container's CPU and memory limits are read from cpu.max and memory.max of the control group."""
        for name, text in {"proc/1/comm": "sh\n", "cpu.max": "150000 100000\n", "memory.max": "268435456\n"}.items():
            path = tmp_path / (name if "/" in name else f"sys/fs/cgroup/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / ".dockerenv").touch()

        found = environment_facts.container(tmp_path, {})

        assert found == Container(root=os.geteuid() == 0, first="sh", cores=1.5, memory=2**28)

    def test_container_without_limits_has_none(self, tmp_path):
        """ECS and Kubernetes are detected by a variable."""
        found = environment_facts.container(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})

        assert found == Container(root=os.geteuid() == 0, first="", cores=None, memory=None)


class TestContainer:
    @pytest.mark.parametrize(
        ("expected", "fault", "workers"),
        [
            ("container-root", {"root": True}, None),
            ("container-shell", {"first": "sh"}, None),
            ("container-workers", {"cores": 2.0}, 3),
            ("container-workers", {"cores": 0.25}, 2),
            ("container-memory", {"memory": 2**26}, None),
            ("container-memory", {"memory": 2**27}, 2),
        ],
    )
    def test_problem_has_one_finding(self, expected, fault, workers):
        """Under its id."""
        facts = Facts(container=replace(IN_A_CONTAINER, **fault), workers=workers)

        assert ids(facts) == {expected}

    @pytest.mark.parametrize("workers", [None, 1, 2])
    def test_safe_configuration_has_no_findings(self, workers):
        """A container causes no finding if it has room for its workers or has no limits."""
        unlimited = replace(IN_A_CONTAINER, cores=None, memory=None)

        assert ids(Facts(container=IN_A_CONTAINER, workers=workers)) == set()
        assert ids(Facts(container=unlimited, workers=workers)) == set()

    def test_env_file_in_the_image_is_found(self, tmp_path):
        """An example file is not, nor one outside of a container."""
        (tmp_path / ".env.example").touch()
        before = ids(Facts(container=IN_A_CONTAINER, directory=tmp_path))
        (tmp_path / ".env.prod").touch()

        found = ids(Facts(container=IN_A_CONTAINER, directory=tmp_path))

        assert (before, found) == (set(), {"container-env-file"})
        assert ids(Facts(directory=tmp_path)) == set()


class TestDependencies:
    @pytest.mark.parametrize(
        ("installed", "expected"),
        [
            (["uvicorn"], {"dependency-slow-server"}),
            (["uvicorn", "uvloop"], {"dependency-slow-server"}),
            (["uvicorn", "uvloop", "httptools"], set()),
            (["granian"], set()),
        ],
    )
    def test_uvicorn_without_uvloop_or_httptools_is_found(self, installed, expected):
        """Another server is not."""
        assert ids(Facts(installed=frozenset(installed))) == expected
