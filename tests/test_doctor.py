"""`fastapi-prodkit doctor`: each rule with a fault and without, and what the page says of it."""

import os
import re
import subprocess
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from doctoring import REMOTE, SECRET, gathered, ids, in_order, module  # noqa: F401 - a fixture

from fastapi_prodkit._config.worker_count import configured_workers
from fastapi_prodkit.cli.doctor import environment_facts
from fastapi_prodkit.cli.doctor.advisories import ADVISORIES, AS_OF, UNFIXED, is_older
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
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (".env", f"DATABASE_URL={REMOTE}"),
            (".env.prod", f'export DATABASE_URL="{REMOTE}"'),
            ("deploy/.env.example", f"METRICS_TOKEN={SECRET}"),
            ("compose.yaml", f"    environment:\n      METRICS_TOKEN: {SECRET}\n"),
            ("task.json", f'{{"METRICS_TOKEN": "{SECRET}"}}'),
            ("Dockerfile", f"ENV rate_limit_storage_url=rediss://:{SECRET}@cache.example.com"),
        ],
    )
    def test_a_secret(self, name, text):
        """A value that could be real is found wherever configuration is written, and is not shown."""
        (found,) = self.examined(name, text)

        assert found.id == "files-secret"
        assert found.reason.startswith(f"{name} has a value of ")
        assert SECRET not in repr(found)

    @pytest.mark.parametrize("kind", ["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "])
    @pytest.mark.parametrize("name", ["tls/server.pem", "tls/id_ed25519", "tls/key.txt"])
    def test_a_private_key(self, name, kind):
        """A key that is under git is everybody's who ever had the repository, whatever its name."""
        (found,) = self.examined(name, f"\n-----BEGIN {kind}PRIVATE KEY-----\n...")

        assert found.reason == f"{name} is a private key."

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("account.json", '{"private_key": "-----BEGIN PRIVATE KEY-----\\n%s\\n-----END PRIVATE KEY-----"}'),
            ("chain.pem", "-----BEGIN CERTIFICATE-----\n...\n-----BEGIN EC PRIVATE KEY-----\n%s\n"),
            ("sign.py", 'KEY = """-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\n%s"""'),
        ],
    )
    def test_a_private_key_in_something_else(self, name, text):
        """Its content betrays it."""
        (found,) = self.examined(name, text % ("MIIEvQIBADANBgkqhkiG9w0BAQEFAASC" * 2))

        assert found.reason == f"{name} holds a private key."

    @pytest.mark.parametrize(
        ("name", "text", "variable"),
        [
            (".env", "AWS_SECRET_ACCESS_KEY=b7Rk/29xLm+4fQz", "AWS_SECRET_ACCESS_KEY"),
            (".env.prod", "export STRIPE_API_KEY='sk_live_51H29xLm4fQz'", "STRIPE_API_KEY"),
            ("deploy/prod.env", f"DB_PASSWORD={SECRET}", "DB_PASSWORD"),
            (".env.example", f"django_secret_key = {SECRET}", "DJANGO_SECRET_KEY"),
            (".env", f"JWT_SECRET={SECRET}", "JWT_SECRET"),
            (".env", f"GITHUB_TOKEN={SECRET}", "GITHUB_TOKEN"),
            (".env", f"APP_PRIVATE_KEY={SECRET}", "APP_PRIVATE_KEY"),
        ],
    )
    def test_a_secret_of_anybody(self, name, text, variable):
        """In a file of variables the end of a name says that it is one."""
        (found,) = self.examined(name, text)

        assert found.reason == f"{name} has a value of {variable}."

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (".env.example", "METRICS_TOKEN=change-me\nDATABASE_URL=postgresql://user:password@db.example.com/x"),
            (".env", f"# METRICS_TOKEN={SECRET}\nMETRICS_TOKEN=\n"),
            ("compose.yaml", f"DATABASE_URL: postgresql://app:{SECRET}@db/app"),
            ("compose.yaml", f"DATABASE_URL: postgresql://app:{SECRET}@127.0.0.1/app"),
            ("compose.yaml", "DATABASE_URL: postgresql://app:${PASSWORD}@db.example.com/app"),
            ("ci.yml", "METRICS_TOKEN: ${{ secrets.METRICS_TOKEN }}"),
            ("stack.yaml", "METRICS_TOKEN: !Ref MetricsToken"),
            ("task.json", '"METRICS_TOKEN": "arn:aws:secretsmanager:eu-central-1:1:secret:orders"'),
            ("main.tf", "METRICS_TOKEN = var.metrics_token"),
            ("notes.yaml", "METRICS_TOKEN: opens"),
            (".env", "RATE_LIMIT_STORAGE_URL=redis://cache.example.com"),
            (".env", "DATABASE_URL=postgresql://[broken"),
            (".env.example", "STRIPE_API_KEY=your_stripe_key\nJWT_SECRET=please-change-this\nDB_PASSWORD=${PASSWORD}"),
            (".env", f"DATABASE_PASSWORD_SECRET=prod/orders/db\nTOKEN_URL={SECRET}\nDB_PASSWORD=short"),
            ("values.yaml", f"STRIPE_API_KEY: {SECRET}"),
            ("settings.py", f"METRICS_TOKEN = '{SECRET}'"),
            ("test_tls.py", 'KEY = "-----BEGIN PRIVATE KEY-----\\n..."'),
            ("dump.bin", "-----BEGIN PRIVATE KEY-----" + "x" * 65_536),
            ("tls/ca.pem", "-----BEGIN CERTIFICATE-----"),
            (".env", "x" * 1_000_001),
        ],
    )
    def test_no_secret(self, name, text):
        """Examples, references, passwords of containers beside this one, and other files are passed over."""
        assert self.examined(name, text) == ()

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

    def test_a_field_of_the_users_own_is_a_secret_too(self):
        """`SecretStr` says so."""
        name = module(
            "from pydantic import SecretStr\nfrom fastapi_prodkit import Settings, create_app\n"
            "class Own(Settings):\n    shop_key: SecretStr = 'x'\n"
            "app = create_app(Own())\n"
        )
        Path(".env.prod").write_text(f"SHOP_KEY={SECRET}\n")

        facts = replace(gathered(f"{name}:app"), tracked=(".env.prod",))

        assert ids(facts) == {"files-secret"}

    def test_a_file_that_is_gone(self):
        """What is in the index only has nothing to read."""
        assert examine(Facts(tracked=(".env",))).findings == ()

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
        monkeypatch.setattr(environment_facts, "_PATIENCE", 0.2 if "sleep" in script else 20)

        assert environment_facts.tracked(tmp_path) == ((), reason)

    def test_installed_packages(self):
        """Names are normalized, as advisories write them."""
        assert {"fastapi-prodkit", "pydantic-settings"} <= environment_facts.installed().keys()

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
    @pytest.mark.parametrize("advisory", ADVISORIES, ids=lambda each: f"{each.package}-{each.fixed}")
    def test_an_advisory(self, advisory):
        """The version before the fix is found with the ids of what is wrong, and the fixed one is not."""
        newest = max((each for each in ADVISORIES if each.package == advisory.package), key=lambda each: each.fixed)
        old = Facts(installed={advisory.package: "0.0.1"})
        new = Facts(installed={advisory.package: newest.fixed})

        reasons = [found.reason for found in examine(old).findings if found.id == "dependency-advisory"]

        assert any(advisory.ids[0] in reason for reason in reasons)
        assert ids(new) == set()

    @pytest.mark.parametrize("package", UNFIXED)
    def test_what_no_version_fixes(self, package):
        """It is found in any version, with what to take instead."""
        assert ids(Facts(installed={package: "99"})) == {"dependency-unfixed"}

    def test_no_version_that_we_admit_has_one(self):
        """Who installs the lowest versions that pyproject.toml admits gets none that is complained of."""
        lock = (ROOT / "requirements" / "lowest.txt").read_text()
        lowest = dict(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", lock, re.MULTILINE))

        assert ids(Facts(installed=lowest, today=AS_OF)) == set()
        assert {each.package for each in ADVISORIES} & lowest.keys() >= {"starlette", "orjson", "python-multipart"}

    @pytest.mark.parametrize(("days", "expected"), [(180, set()), (181, {"dependency-table-old"})])
    def test_an_old_table(self, days, expected):
        """After half a year the report says that it may miss something."""
        assert ids(Facts(installed={"fastapi": "1"}, today=AS_OF + timedelta(days=days))) == expected

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
        facts = Facts(installed=dict.fromkeys(installed, "1"), today=AS_OF)

        assert ids(facts) == expected

    @pytest.mark.parametrize(
        ("version", "than", "older"),
        [
            ("0.9", "0.10.0", True),
            ("23", "23.0.0", False),
            ("1.3.1rc1", "1.3.1", False),
            ("1!2.0", "1.9", False),
            ("unknown", "0.1", True),
        ],
    )
    def test_versions_are_compared_by_number(self, version, than, older):
        """Not by letter; and a missing zero changes nothing."""
        assert is_older(version, than) is older

    def test_the_table_states_when_it_was_made(self):
        """Its date is not in the future of this release."""
        assert isinstance(AS_OF, date)
        assert date.today() >= AS_OF  # noqa: DTZ011 - a day more or less
