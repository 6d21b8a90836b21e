"""Find new revisions, and render the SQL of each, offline, for PostgreSQL."""

import subprocess
from pathlib import Path

import pytest
from migrating import INDEX, configured, environment, migration, project

from fastapi_prodkit.exceptions import ConfigurationError

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from fastapi_prodkit.database.migration_sql import new_revisions, render

NOWHERE = "postgresql://user:password@127.0.0.1:1/name"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return project(tmp_path / "project")


@pytest.fixture
def git(directory):
    """Return a function that runs git in the project, which has a first commit on main."""

    def run(*arguments):
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=directory, check=True, capture_output=True, env=environment(""))

    run("init", "--initial-branch=main")
    run("add", ".")
    run("commit", "--message", "first")
    return run


@pytest.fixture
def found(directory):
    """Return a function that returns the new revisions."""

    def run(url=NOWHERE, **options):
        config = configured(directory, url)
        which, scripts = new_revisions(config, ScriptDirectory.from_config(config), **options)
        return which, [script.revision for script in scripts]

    return run


@pytest.fixture
def rendered(directory):
    """Return a function that renders a revision."""

    def run(revision):
        config = configured(directory, "sqlite://")
        scripts = ScriptDirectory.from_config(config)
        return render(config, scripts, scripts.get_revision(revision)).sql

    return run


class TestNew:
    @pytest.mark.parametrize(
        ("start", "expected"), [("base", ["0001", "0002", "0003"]), ("0001", ["0002", "0003"]), ("head", [])]
    )
    def test_new_are_revisions_above_the_given_one(self, directory, found, start, expected):
        """In the order in which they run."""
        migration(directory, "0003", "pass")

        assert found(start=start) == (f"above {start}", expected)

    def test_unknown_revision_is_an_error_of_alembic(self, found):
        """An unknown start revision raises Alembic's CommandError with the name of the revision."""
        with pytest.raises(CommandError, match="nope"):
            found(start="nope")

    @pytest.mark.parametrize(
        ("revision", "which", "expected"),
        [
            (None, "above base, where the database is", ["0001", "0002"]),
            ("0001", "above 0001, where the database is", ["0002"]),
        ],
    )
    def test_new_are_revisions_that_the_database_lacks(self, directory, found, tmp_path, revision, which, expected):
        """It is only read."""
        url = f"sqlite:///{tmp_path}/test.db"
        if revision:
            command.upgrade(configured(directory, url), revision)

        assert found(url) == (which, expected)

    def test_new_are_revisions_not_on_main(self, directory, found, git):
        """Files that are not under git too."""
        migration(directory, "0003", "pass")

        assert found() == ("not on main", ["0003"])

    def test_new_are_revisions_not_on_the_given_branch(self, directory, found, git, tmp_path):
        """It may be any commit, and wins over the database."""
        migration(directory, "0003", "pass")
        git("add", ".")
        git("commit", "--message", "second")
        migration(directory, "0004", "pass")

        assert found(f"sqlite:///{tmp_path}/test.db", base="main") == ("not on main", ["0004"])
        assert found(base="HEAD^") == ("not on HEAD^", ["0003", "0004"])

    def test_all_revisions_are_new_on_a_branch_without_migrations(self, directory, found, git):
        """All revisions count as new if the base branch contains no migrations."""
        empty = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's name for a tree without files

        assert found(base=empty)[1] == ["0001", "0002"]

    def test_unknown_branch_is_an_error_with_other_options(self, found, git):
        """An unknown base branch raises an error that contains git's message and suggests `--base`."""
        with pytest.raises(ConfigurationError, match=r"on nope: fatal: .*nope; name another one with --base, or"):
            found(base="nope")

    def test_missing_git_is_an_error(self, found, monkeypatch):
        """A missing git executable, as in a container image, raises an error that suggests naming another branch."""
        monkeypatch.setenv("PATH", "")

        with pytest.raises(ConfigurationError, match="on main: git is not installed; name another one"):
            found()


class TestRendering:
    def test_revision_is_rendered_with_time_outs_and_transaction(self, rendered):
        """Whatever database the settings name."""
        assert rendered("0002") == (
            "SET lock_timeout = 2000;\n\n"
            "SET statement_timeout = 0;\n\n"
            "BEGIN;\n\n"
            "-- Running upgrade 0001 -> 0002\n\n"
            "ALTER TABLE items ADD COLUMN name VARCHAR(50);\n\n"
            "UPDATE alembic_version SET version_num='0002' WHERE alembic_version.version_num = '0001';\n\n"
            "COMMIT;\n\n"
        )

    def test_autocommit_block_is_outside_the_transaction(self, directory, rendered):
        """Statements of an autocommit block are rendered after a COMMIT and before the next BEGIN."""
        migration(directory, "0003", INDEX)

        sql = rendered("0003")

        assert sql.index("COMMIT;") < sql.index("CREATE INDEX CONCURRENTLY") < sql.rindex("BEGIN;")

    def test_branches_merges_and_dependent_revisions_are_rendered_alone(self, directory, rendered):
        """Rendering a branch, a merge or a dependent revision yields only the SQL of that revision."""
        versions = directory / "migrations" / "versions"
        body = "from alembic import op\nrevision = {!r}\ndown_revision = {!r}\ndepends_on = {!r}\n"
        body += "def upgrade(): op.execute('SELECT {}')\n"
        (versions / "left.py").write_text(body.format("left", "0002", None, "left"))
        (versions / "right.py").write_text(body.format("right", "0001", "left", "right"))
        (versions / "merge.py").write_text(body.format("merge", ("left", "right"), None, "merge"))

        for each in ("left", "right", "merge"):
            assert [line for line in rendered(each).splitlines() if line.startswith("SELECT")] == [f"SELECT {each};"]

    def test_revision_that_reads_rows_cannot_be_rendered(self, directory, rendered):
        """A revision that reads rows raises an error when it is rendered offline, because no database is connected."""
        migration(directory, "0003", 'op.get_bind().execute(sa.text("SELECT 1")).scalar_one()')

        with pytest.raises(AttributeError, match="scalar_one"):
            rendered("0003")


def test_settings_of_env_py_are_not_created(tmp_path):
    """The settings factory in env.py is not called for rendering, so CI needs no variables of the service."""
    directory = project(tmp_path / "own", arguments=", lambda: 1 / 0")
    config = configured(directory, "sqlite://")
    del config.attributes["settings"]
    scripts = ScriptDirectory.from_config(config)

    assert "ADD COLUMN name" in render(config, scripts, scripts.get_revision("0002")).sql


def test_branch_decides_without_database_url(directory, git):
    """Without DATABASE_URL, the revisions that are not on the branch main are the new ones."""
    config = configured(directory, "sqlite://")
    del config.attributes["settings"]

    assert new_revisions(config, ScriptDirectory.from_config(config))[0] == "not on main"
