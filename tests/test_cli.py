"""The command line: its output, streams and exit codes."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from migrating import environment, migration, project

import fastapi_prodkit
from fastapi_prodkit import __main__ as door

SECRET = "hunter2-7f3a"
NO_DATABASE = "Invalid value for '--database': '%s' is not one of 'postgresql', 'sqlite'"
NOWHERE = f"postgresql://user:{SECRET}@127.0.0.1:1/name"


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    """Start each test without any of our variables."""
    for name in list(os.environ):
        if name.startswith(("DATABASE_", "ALEMBIC_", "FASTAPI_PRODKIT_TRACEBACK")) or name == "ENVIRONMENT":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Run a command in this process and return exit code, standard output and standard error."""
    pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
    from fastapi_prodkit.cli import main

    def run(*arguments):
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A project with two migrations, and an empty SQLite file as its database."""
    pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
    directory = project(tmp_path / "shop")
    monkeypatch.chdir(directory)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/shop.db")
    return directory


class TestProgram:
    def test_command_without_its_extra_names_the_extra(self, monkeypatch, capsys):
        """Without typer installed, the command exits with 1 and one line that names the extra to install."""
        for name in [name for name in sys.modules if name.startswith("fastapi_prodkit.cli")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(fastapi_prodkit, "cli", raising=False)
        monkeypatch.setitem(sys.modules, "typer", None)

        code = door.main()

        assert code == 1
        assert (
            capsys.readouterr().err == "fastapi-prodkit: typer is not installed: pip install 'fastapi-prodkit[cli]'\n"
        )

    def test_command_takes_the_arguments_of_the_process(self, run, monkeypatch, capsys):
        """Both `fastapi-prodkit` and `python -m fastapi_prodkit`."""
        monkeypatch.setattr(sys, "argv", ["fastapi-prodkit", "--version"])

        code = door.main()

        assert (code, capsys.readouterr().out) == (0, f"fastapi-prodkit {fastapi_prodkit.__version__}\n")

    def test_module_returns_the_exit_code(self, run, monkeypatch, capsys):
        """Running `python -m fastapi_prodkit` exits with the exit code of the command."""
        monkeypatch.setattr(sys, "argv", ["fastapi-prodkit", "xyzzy"])
        monkeypatch.delitem(sys.modules, "fastapi_prodkit.__main__")

        with pytest.raises(SystemExit) as ended:
            runpy.run_module("fastapi_prodkit", run_name="__main__")

        assert ended.value.code == 2

    @pytest.mark.parametrize("arguments", [["--help"], []])
    def test_help_lists_the_commands(self, run, arguments):
        """`fastapi-prodkit` alone does, too."""
        code, out, err = run(*arguments)

        assert code == (0 if arguments else 2)
        assert re.search(r"db +Migrate the database\.", out + err)
        assert "Exit codes: 0 done, 1 failed" in out + err
        assert "\033" not in out + err

    @pytest.mark.parametrize(
        "command",
        [
            "serve",
            "doctor",
            "health",
            "routes",
            "settings",
            "key",
            "token",
            "issuer",
            "new",
            "db",
            *(f"db {each}" for each in ("upgrade", "revision")),
        ],
    )
    def test_help_names_the_values_of_options(self, run, command):
        """In capitals, or as a list of choices; never by a Python type."""
        _, out, _ = run(*command.split(), "--help")

        taken = re.findall(r"^  (?:-\w, )?--[\w-]+ (\S[^\n]*?)(?:  |\n)", out, re.MULTILINE)
        usage = re.findall(r"[\[{]([\w:]+)[\]}]", out.partition("\n")[0])
        assert all(each.isupper() or "|" in each or each.startswith("/ ") for each in (*taken, *usage))

    def test_help_loads_no_library_of_a_command(self):
        """Such as Alembic, SQLAlchemy and pydantic-settings."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        script = (
            "import sys; from fastapi_prodkit.cli import main; main(['db', '--help']);"
            "heavy = {'alembic', 'sqlalchemy', 'pydantic_settings', 'fastapi', 'rich'};"
            "print(*heavy & set(sys.modules), file=sys.stderr)"
        )

        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

        assert "upgrade" in done.stdout
        assert done.stderr == "\n"

    @pytest.mark.parametrize(
        ("typed", "instead"),
        [
            ("upgrade", "there is no command 'upgrade'; try: fastapi-prodkit db upgrade"),
            ("dbb", "there is no command 'dbb'; try: fastapi-prodkit db"),
            ("xyzzy", "there is no command 'xyzzy'; try: fastapi-prodkit --help"),
            ("help", "there is no command 'help'; try: fastapi-prodkit --help"),
            ("version", "there is no command 'version'; try: fastapi-prodkit --version"),
            ("db help", "there is no command 'help'; try: fastapi-prodkit db --help"),
            ("--verison", "there is no option --verison; try: fastapi-prodkit --version"),
            ("--xyzzy", "there is no option --xyzzy; try: fastapi-prodkit --help"),
            ("db upgade", "there is no command 'upgade'; try: fastapi-prodkit db upgrade"),
            ("db upgrade --sqll", "there is no option --sqll; try: fastapi-prodkit db upgrade --sql"),
            ("db upgrade --lock-timeout", "Option '--lock-timeout' requires an argument; try: fastapi-prodkit --help"),
            (
                "new shop --database postgres",
                f"{NO_DATABASE % 'postgres'}; try: fastapi-prodkit new --database postgresql",
            ),
            ("new shop --database oracle", f"{NO_DATABASE % 'oracle'}; try: fastapi-prodkit new --help"),
            ("db downgrade", "Missing argument 'REVISION'; try: fastapi-prodkit db downgrade --help"),
        ],
    )
    def test_usage_error_suggests_a_command_and_exits_with_2(self, run, typed, instead):
        """A usage error prints one line with the command to type instead, and exits with 2."""
        code, out, err = run(*typed.split())

        assert (code, out, err) == (2, "", f"fastapi-prodkit: {instead}\n")

    @pytest.mark.parametrize(
        ("variables", "label"),
        [
            ({}, "\033[31mfastapi-prodkit:\033[0m"),
            ({"NO_COLOR": ""}, "\033[31mfastapi-prodkit:\033[0m"),
            ({"NO_COLOR": "1"}, "fastapi-prodkit:"),
            ({"TERM": "dumb"}, "fastapi-prodkit:"),
        ],
    )
    def test_colours_require_a_terminal_without_no_color(self, run, monkeypatch, variables, label):
        """An empty NO_COLOR counts as not set."""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        _, _, err = run("xyzzy")

        assert err.startswith(f"{label} there is no command")

    @pytest.mark.system
    def test_sigterm_rolls_back_and_exits_with_143(self, shop, tmp_path):
        """SIGTERM ends a running migration with exit code 143, and its transaction is rolled back."""
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        migration(shop, "0003", 'import time; print("begun", flush=True); time.sleep(60)')
        command = [sys.executable, "-m", "fastapi_prodkit", "db", "upgrade"]
        process = subprocess.Popen(
            command, env=environment(os.environ["DATABASE_URL"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"

        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        _, err = process.communicate(timeout=20)

        assert process.returncode == 143
        assert time.monotonic() - begun < 10
        assert b"Traceback" not in err
        assert not (tmp_path / "shop.db-journal").exists()

    def test_sigterm_rolls_back_the_current_migration(self, run, shop):
        """The earlier signal handler is restored."""
        before = signal.getsignal(signal.SIGTERM)
        migration(shop, "0003", "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")

        with pytest.raises(SystemExit) as ended:
            run("db", "upgrade")

        assert ended.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        assert run("db", "current")[:2] == (0, "")

    @pytest.mark.parametrize("stop", ["KeyboardInterrupt", "EOFError"])
    def test_interrupted_command_prints_one_line(self, run, shop, stop):
        """For Ctrl-C and Ctrl-D."""
        migration(shop, "0003", f"raise {stop}")

        code, _, err = run("db", "upgrade")

        assert code == 130
        assert err.endswith("fastapi-prodkit: interrupted\n")
        assert "Traceback" not in err

    def test_command_in_a_thread_installs_no_signal_handler(self, run):
        """A command also runs outside of the main thread, where Python allows no signal handlers."""
        import threading

        codes = []
        thread = threading.Thread(target=lambda: codes.append(run("--version")[0]))

        thread.start()
        thread.join()

        assert codes == [0]


class TestMigrate:
    def test_db_shows_each_migration_on_standard_error(self, run, shop):
        """The commands of `db` report each migration and a summary on standard error."""
        code, out, err = run("db", "upgrade")
        lines = err.splitlines()
        assert (code, out) == (0, "")
        assert lines[0] == "Running upgrade  -> 0001"
        assert lines[1].startswith("0001 done in ")
        assert lines[-1].startswith("Done: 2 migrations in ")

        assert run("db", "upgrade") == (0, "", "Nothing to do: the database is up to date.\n")
        assert run("db", "current") == (0, "0002 (head)\n", "")
        assert "Done: 1 migration in " in run("db", "downgrade", "-1")[2]
        assert run("db", "downgrade", "0001") == (0, "", "Nothing to do: the database is at this revision already.\n")

    def test_current_check_exits_with_3_if_not_at_head(self, run, shop):
        """With `--check`, `db current` exits with 3 until the database is at the newest revision."""
        run("db", "upgrade", "0001")

        assert run("db", "current", "--check") == (3, "", "The database is not at the newest revision.\n")
        run("db", "upgrade")
        assert run("db", "current", "--check") == (0, "0002 (head)\n", "")

    def test_check_exits_with_3_for_a_model_without_a_migration(self, run, shop):
        """If models have changes without a migration, `db check` exits with 3 and lists the changes."""
        run("db", "upgrade", "0001")
        assert run("db", "check") == (3, "", "The database lacks migrations: run `fastapi-prodkit db upgrade` first.\n")
        run("db", "upgrade")
        assert run("db", "check") == (0, "No new upgrade operations detected.\n", "")
        env = shop / "migrations" / "env.py"
        more = 'Column("name", Integer), Column("size", Integer, index=True)'
        env.write_text(env.read_text().replace('Column("name", String(50))', more))

        code, _, err = run("db", "check")

        assert code == 3
        assert err.splitlines() == [
            "The migrations lack changes of the models:",
            "  add column items size",
            "  modify type items name",
            "  add index ix_items_size on items",
        ]

    def test_revision_writes_a_file(self, run, shop):
        """Empty, or from the models."""
        run("db", "upgrade")

        code, out, _ = run("db", "revision", "-m", "add prices", "--autogenerate")

        assert code == 0
        assert "add_prices.py" in out
        assert "add prices" not in run("db", "history")[2]
        assert "(head)" in run("db", "history", "--verbose")[1]

    def test_sql_is_printed_to_standard_output(self, run, shop):
        """With `--sql`, the `db` commands print the SQL of the migrations, so that it can be run by hand."""
        code, out, _ = run("db", "upgrade", "--sql")
        assert code == 0
        assert "CREATE TABLE items" in out
        code, out, _ = run("db", "downgrade", "0001:base", "--sql")
        assert code == 0
        assert "DROP TABLE items" in out

    def test_configuration_file_can_be_named(self, run, shop, tmp_path, monkeypatch):
        """By `--config` or a variable, from any directory."""
        monkeypatch.chdir(tmp_path)

        assert run("db", "--config", str(shop / "alembic.ini"), "upgrade")[0] == 0
        monkeypatch.setenv("DATABASE_MIGRATIONS_CONFIG", str(shop / "alembic.ini"))
        assert run("db", "current") == (0, "0002 (head)\n", "")

    def test_upgrade_accepts_a_database_that_is_ahead(self, run, shop):
        """After a rollback to an older release."""
        run("db", "upgrade")
        (shop / "migrations" / "versions" / "0002_step.py").unlink()

        code, _, err = run("db", "upgrade")

        assert (code, err) == (0, "Nothing to do: the database is ahead, a newer release has migrated it.\n")

    def test_project_with_a_plain_env_py_runs(self, run, shop):
        """A project whose env.py does not use our package runs its migrations with `db upgrade`."""
        (shop / "migrations" / "env.py").write_text(
            "import os, sqlalchemy\n"
            "from alembic import context\n"
            "engine = sqlalchemy.create_engine(os.environ['DATABASE_URL'])\n"
            "with engine.connect() as connection:\n"
            "    context.configure(connection=connection)\n"
            "    with context.begin_transaction():\n"
            "        context.run_migrations()\n"
            "engine.dispose()\n"
        )

        code, _, err = run("db", "upgrade")

        assert code == 0
        assert "Done: 2 migrations" in err


class TestErrors:
    def test_database_that_is_down_is_one_line_without_the_password(self, run, shop, monkeypatch):
        """If the database is unreachable, the error is one line that does not contain the password."""
        pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
        monkeypatch.setenv("DATABASE_URL", NOWHERE)

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err.startswith("fastapi-prodkit: cannot connect to the database: ")
        assert err.count("\n") == 1
        assert SECRET not in err

    def test_invalid_url_is_one_line_without_the_url(self, run, shop, monkeypatch):
        """The error about an invalid DATABASE_URL names the variable and does not contain its value."""
        monkeypatch.setenv("DATABASE_URL", f"//{SECRET}")

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert "DATABASE_URL" in err
        assert SECRET not in err

    def test_misspelt_variable_is_one_line(self, run, shop, monkeypatch):
        """The warning has no position in our code."""
        monkeypatch.setenv("DATABASE_POOL_SIZ", "5")
        monkeypatch.setattr(warnings, "filters", [])
        warnings.simplefilter("default")

        code, _, err = run("db", "current")

        meant = "DATABASE_POOL_SIZ in the environment is not a setting; did you mean DATABASE_POOL_SIZE?"
        assert (code, err) == (0, f"fastapi-prodkit: warning: {meant}\n")

    def test_missing_database_names_the_variable(self, run, shop, monkeypatch):
        """Without DATABASE_URL, `db upgrade` exits with 1 and tells the user to set the variable."""
        monkeypatch.delenv("DATABASE_URL")

        code, _, err = run("db", "upgrade")

        assert (code, "set DATABASE_URL" in err) == (1, True)

    def test_missing_alembic_names_the_extra(self, run, monkeypatch):
        """Without alembic installed, `db upgrade` exits with 1 and names the extra `database`."""
        monkeypatch.setitem(sys.modules, "alembic", None)

        code, _, err = run("db", "upgrade")

        assert (code, err) == (
            1,
            "fastapi-prodkit: alembic is not installed: pip install 'fastapi-prodkit[database]'\n",
        )

    def test_missing_configuration_names_the_files_and_the_directory(self, run, tmp_path):
        """Without alembic.ini, the error says which files were searched for, and in which directory."""
        pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err == (
            f"fastapi-prodkit: no migrations are configured in alembic.ini or pyproject.toml in {tmp_path}: "
            "name the file, or run `alembic init`\n"
        )

    @pytest.mark.parametrize("command", [["upgrade", "nope"], ["downgrade", "nope"]])
    def test_unknown_revision_prints_the_error_of_alembic(self, run, shop, command):
        """An unknown revision exits with 1 and prints Alembic's own message in one line."""
        code, _, err = run("db", *command)

        assert (code, err) == (1, "fastapi-prodkit: Can't locate revision identified by 'nope'\n")

    def test_check_without_scripts_is_an_error(self, run, shop):
        """Not a negative check."""
        (shop / "migrations").rename(shop / "elsewhere")

        code, _, err = run("db", "check")

        assert code == 1
        assert err.startswith("fastapi-prodkit: Path doesn't exist: ")

    def test_failed_statement_prints_the_error_of_the_database(self, run, shop):
        """Below the migration that ran."""
        migration(shop, "0003", 'op.execute("nonsense")')

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err.splitlines()[-2:] == [
            "Running upgrade 0002 -> 0003",
            'fastapi-prodkit: the database reports: near "nonsense": syntax error',
        ]

    def test_failed_migration_names_its_line_and_masks_secrets(self, run, shop, monkeypatch):
        """A variable adds the traceback."""
        migration(shop, "0003", f'raise RuntimeError("cannot read postgresql://user:{SECRET}@host/name")')

        code, _, err = run("db", "upgrade")
        assert code == 1
        assert "fastapi-prodkit: RuntimeError: cannot read postgresql://user:[redacted]@host/name" in err
        assert "0003_step.py:6)" in err
        assert "Traceback" not in err
        assert SECRET not in err
        monkeypatch.setenv("FASTAPI_PRODKIT_TRACEBACK", "1")
        assert "Traceback" in run("db", "upgrade")[2]

    def test_unreadable_file_is_named(self, run, shop):
        """If a migration cannot open a file, the last line of the error contains the path of the file."""
        migration(shop, "0003", 'open("/nowhere/at/all")')

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err.splitlines()[-1] == "fastapi-prodkit: /nowhere/at/all: No such file or directory"

    def test_error_in_a_library_names_no_line(self, run):
        """An exception without a traceback is described by its type and message alone."""
        from fastapi_prodkit.cli.failure import describe

        assert describe(RuntimeError("")) == "RuntimeError: "


def test_command_is_installed():
    """When the package is installed, its console script `fastapi-prodkit` calls `main` in `__main__`."""
    from importlib.metadata import entry_points

    found = entry_points(group="console_scripts", name="fastapi-prodkit")

    assert [point.value for point in found] in ([], ["fastapi_prodkit.__main__:main"])
    assert Path(door.__file__).name == "__main__.py"
