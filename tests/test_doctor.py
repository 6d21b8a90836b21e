"""`fastapi-prodkit doctor`: each rule with a fault and without, and what the page says of it."""

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
from fastapi_prodkit.cli.doctor.placeholders import is_placeholder
from fastapi_prodkit.cli.doctor.rules import RULES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pieces" / "doctor.md"
pytestmark = pytest.mark.usefixtures("in_order")

IN_A_CONTAINER = Container(root=False, first="fastapi-prodkit", cores=2.0, memory=2**30)


class TestRules:
    def test_each_has_an_id_of_its_own(self):
        """An id names one rule: dashboards and suppressions rely on it."""
        names = [rule.id for rule in RULES]

        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in names)

    def test_each_is_explained_on_the_page_and_nothing_else_is(self):
        """The link of a finding leads to its explanation, and the page has none of a rule that is gone."""
        anchors = re.findall(r"^### ([a-z-]+)$", PAGE.read_text(), re.MULTILINE)

        assert sorted(anchors) == sorted(rule.id for rule in RULES)

    def test_a_service_in_order_has_no_findings(self):
        """Silence means something: the settings that the documentation recommends pass."""
        assert ids(gathered()) == set()

    def test_nothing_at_all_has_no_findings(self):
        """No rule takes a fact for granted that could not be gathered."""
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
    def test_one_fault(self, monkeypatch, expected, fault):
        """A fault is found under its id, and nothing else is."""
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
            {"CORS_ORIGINS": "https://app.example.com", "CORS_ALLOW_CREDENTIALS": "true"},
            {"WEB_CONCURRENCY": "4", "RATE_LIMIT_STORAGE_URL": "redis://cache"},
            {"LIMITS_ENABLED": "true", "LIMITS_REQUEST_TIMEOUT": "25"},
        ],
    )
    def test_no_fault(self, monkeypatch, sound):
        """What is switched off knowingly, or done right, is not found."""
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
    def test_secrets_of_the_users_own(self, monkeypatch, name, value, weak):
        """`SecretStr` says what is one, also in a section; only a token has to be as long as ours."""
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

    def test_the_file_of_the_environment_is_read(self, monkeypatch):
        """What `.env.prod` says is judged, and what `.env.dev` says is not."""
        monkeypatch.delenv("HOSTS_ALLOWED")
        Path(".env.prod").write_text("HOSTS_ALLOWED=api.example.com\nSHUTDOWN_GRACE=50\n")
        Path(".env.dev").write_text("DEBUG=true\n")

        assert ids(gathered()) == {"shutdown-too-long"}

    @pytest.mark.parametrize("environment", ["dev", "staging"])
    def test_values_are_judged_as_for_production(self, monkeypatch, environment):
        """Settings of another environment are held to the same, and its own variable stays what it was."""
        monkeypatch.setenv("ENVIRONMENT", "test")
        monkeypatch.setenv("DEBUG", "true")

        found = gather(None, environment=environment, factory=False, timeout=None)

        assert "DEBUG" in " ".join(f.reason for f in examine(found).findings if f.id == "settings-unsafe")
        assert os.environ["ENVIRONMENT"] == "test"

    def test_all_that_is_wrong_is_told_at_once(self, monkeypatch):
        """What would stop the start does not stop the doctor: each refusal has its reason and its remedy."""
        monkeypatch.setenv("DEBUG", "true")
        monkeypatch.setenv("HOSTS_ALLOWED", "")

        found = examine(gathered()).findings

        assert [(each.reason, each.remedy) for each in found] == [
            ("DEBUG shows tracebacks and variables to every client.", "Set it to false."),
            ("HOSTS_ALLOWED is required.", "List the host names of the service, such as api.example.com."),
        ]

    def test_a_problem_without_a_remedy_gets_one(self):
        """Whatever is wrong, something can be done."""
        facts = Facts(unusable={"DEBUG": "must be true or false"})

        (found,) = examine(facts).findings

        assert (found.reason, found.remedy) == (
            "DEBUG must be true or false.",
            "Set DEBUG to a value of that form.",
        )

    def test_other_warnings_are_no_misspelt_names(self):
        """What else reading the settings warns about has rules of its own."""
        assert ids(Facts(warned=("SHUTDOWN_DRAIN and SHUTDOWN_GRACE are 45 s together",))) == set()

    def test_a_url_that_cannot_be_read_has_no_password(self, monkeypatch):
        """The rule about passwords leaves a broken URL to those about the database."""
        monkeypatch.setenv("DATABASE_URL", "postgresql://[broken")

        assert ids(gathered()) == set()


class TestFiles:
    @pytest.mark.parametrize("name", [".env", ".env.prod", "deploy/.env", "deploy/prod.env"])
    def test_a_file_of_variables(self, name):
        """What a service reads as its environment is found by its name, wherever it is; nothing of it is shown."""
        (found,) = self.examined(name, f"METRICS_TOKEN={SECRET}")

        assert (found.id, found.severity) == ("files-env-file", "error")
        assert found.reason.startswith(f"{name}: ")
        assert found.remedy.startswith(f"git rm --cached {name}, ")
        assert SECRET not in repr(found)

    @pytest.mark.parametrize("name", [".env.example", ".env.dev.example", ".env.sample", ".envrc", "env.py"])
    def test_no_file_of_variables(self, name):
        """What is there to be copied is under git on purpose; other files are a secret scanner's business."""
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
    def test_a_server_that_reads_heads_of_any_size(self, name, text):
        """It is named with the file that starts it."""
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
    def test_a_server_that_limits_heads(self, name, text):
        """Neither is what a developer starts, or a word about it."""
        assert self.examined(name, text) == ()

    @pytest.mark.parametrize("size", [None, 1_000_001])
    def test_a_file_that_is_not_read(self, size):
        """What is in the index only has nothing to read, and what is that large is no configuration."""
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
    def test_words_that_everybody_knows(self, value, known):
        """A placeholder is one in any spelling."""
        assert is_placeholder(value) is known


class TestSurroundings:
    def test_files_under_git(self, tmp_path):
        """Those below the directory are listed, relative to it."""
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
        (tmp_path / "service").mkdir()
        (tmp_path / "service" / ".env").touch()
        (tmp_path / "other").touch()
        subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)

        assert environment_facts.tracked(tmp_path / "service") == ((".env",), None)

    def test_no_repository(self, tmp_path, monkeypatch):
        """Why there are no files is told, in git's own words."""
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

        files, reason = environment_facts.tracked(tmp_path)

        assert files == ()
        assert "not a git repository" in reason

    def test_no_git(self, tmp_path, monkeypatch):
        """A container has none."""
        monkeypatch.setenv("PATH", str(tmp_path))

        assert environment_facts.tracked(tmp_path) == ((), "git is not installed")

    @pytest.mark.parametrize(
        ("script", "reason"), [("exec sleep 60", "git took longer than 0.2 s"), ("exit 1", "git failed")]
    )
    def test_a_git_that_does_not_work(self, tmp_path, monkeypatch, script, reason):
        """It holds nothing up."""
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(environment_facts, "_GIT_TIMEOUT", 0.2 if "sleep" in script else 20)

        assert environment_facts.tracked(tmp_path) == ((), reason)

    def test_installed_packages(self, monkeypatch):
        """Which parts of the server there are; nothing is imported for it."""
        monkeypatch.setattr(environment_facts, "_SERVER", ("typer", "no_such_server"))

        assert environment_facts.installed() == {"typer"}

    @pytest.mark.parametrize(("variable", "count"), [("4", 4), ("0", None), ("many", None)])
    def test_workers(self, monkeypatch, variable, count):
        """WEB_CONCURRENCY says how many there are, if it says anything."""
        monkeypatch.setenv("WEB_CONCURRENCY", variable)

        assert configured_workers() == count

    def test_outside_of_a_container(self, tmp_path):
        """There is nothing to say of a container that is not there."""
        assert environment_facts.container(tmp_path, {}) is None

    def test_inside_of_a_container(self, tmp_path):
        """Its limits are those of its control group."""
        for name, text in {"proc/1/comm": "sh\n", "cpu.max": "150000 100000\n", "memory.max": "268435456\n"}.items():
            path = tmp_path / (name if "/" in name else f"sys/fs/cgroup/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / ".dockerenv").touch()

        found = environment_facts.container(tmp_path, {})

        assert found == Container(root=os.geteuid() == 0, first="sh", cores=1.5, memory=2**28)

    def test_inside_of_a_container_without_limits(self, tmp_path):
        """ECS and Kubernetes say by a variable where we are; without a limit there is none."""
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
    def test_one_fault(self, expected, fault, workers):
        """A container with a fault is found out under its id, and nothing else is found."""
        facts = Facts(container=replace(IN_A_CONTAINER, **fault), workers=workers)

        assert ids(facts) == {expected}

    @pytest.mark.parametrize("workers", [None, 1, 2])
    def test_no_fault(self, workers):
        """A container with room for its workers has no findings, and none without limits."""
        unlimited = replace(IN_A_CONTAINER, cores=None, memory=None)

        assert ids(Facts(container=IN_A_CONTAINER, workers=workers)) == set()
        assert ids(Facts(container=unlimited, workers=workers)) == set()

    def test_a_file_with_secrets_in_the_image(self, tmp_path):
        """A .env file that was copied is found, an example is not, and neither is one outside."""
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
    def test_a_slow_server(self, installed, expected):
        """uvicorn without what makes it fast is found; another server is not."""
        assert ids(Facts(installed=frozenset(installed))) == expected
