"""The command line: what it says, where it says it, and how it ends."""

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
    def test_without_the_extra_it_names_the_extra(self, monkeypatch, capsys):
        """The command exists without typer, and says in one line what to install."""
        for name in [name for name in sys.modules if name.startswith("fastapi_prodkit.cli")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(fastapi_prodkit, "cli", raising=False)
        monkeypatch.setitem(sys.modules, "typer", None)

        code = door.main()

        assert code == 1
        assert (
            capsys.readouterr().err == "fastapi-prodkit: typer is not installed: pip install 'fastapi-prodkit[cli]'\n"
        )

    def test_the_door_leads_to_the_commands(self, run, monkeypatch, capsys):
        """`fastapi-prodkit` and `python -m fastapi_prodkit` take their arguments from the process."""
        monkeypatch.setattr(sys, "argv", ["fastapi-prodkit", "--version"])

        code = door.main()

        assert (code, capsys.readouterr().out) == (0, f"fastapi-prodkit {fastapi_prodkit.__version__}\n")

    def test_it_is_a_module_to_run(self, run, monkeypatch, capsys):
        """`python -m fastapi_prodkit` ends with the exit code of the command."""
        monkeypatch.setattr(sys, "argv", ["fastapi-prodkit", "xyzzy"])
        monkeypatch.delitem(sys.modules, "fastapi_prodkit.__main__")

        with pytest.raises(SystemExit) as ended:
            runpy.run_module("fastapi_prodkit", run_name="__main__")

        assert ended.value.code == 2

    @pytest.mark.parametrize("arguments", [["--help"], []])
    def test_help_lists_the_commands(self, run, arguments):
        """`fastapi-prodkit` alone shows what there is to type, as help that was not asked for."""
        code, out, err = run(*arguments)

        assert code == (0 if arguments else 2)
        assert re.search(r"db +Migrate the database\.", out + err)
        assert "Exit codes: 0 done, 1 failed" in out + err
        assert "\033" not in out + err

    @pytest.mark.parametrize(
        "command",
        ["serve", "doctor", "health", "settings", "new", "db", *(f"db {each}" for each in ("upgrade", "revision"))],
    )
    def test_help_names_what_an_option_takes(self, run, command):
        """In capitals, such as FILE or SECONDS, or as the list of its choices; never by its type in Python."""
        _, out, _ = run(*command.split(), "--help")

        taken = re.findall(r"^  (?:-\w, )?--[\w-]+ (\S[^\n]*?)(?:  |\n)", out, re.MULTILINE)
        usage = re.findall(r"[\[{]([\w:]+)[\]}]", out.partition("\n")[0])
        assert all(each.isupper() or "|" in each or each.startswith("/ ") for each in (*taken, *usage))

    def test_help_loads_no_library_of_a_command(self):
        """`--help` is quick: Alembic, SQLAlchemy and pydantic-settings are for those who migrate."""
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
    def test_what_is_not_understood(self, run, typed, instead):
        """One line says what to type instead, and the exit code is 2."""
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
    def test_colour_is_for_terminals_that_want_it(self, run, monkeypatch, variables, label):
        """NO_COLOR is honoured unless it is empty, and so is a terminal that knows none; a pipe gets none anyway."""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

        _, _, err = run("xyzzy")

        assert err.startswith(f"{label} there is no command")

    @pytest.mark.system
    def test_sigterm_ends_a_command_in_order(self, shop, tmp_path):
        """A container that is stopped lets go of the database and undoes the migration at hand; the code is 143."""
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

    def test_sigterm_undoes_the_migration_at_hand(self, run, shop):
        """The same within this process: the transaction is rolled back, and the old handler is back."""
        before = signal.getsignal(signal.SIGTERM)
        migration(shop, "0003", "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")

        with pytest.raises(SystemExit) as ended:
            run("db", "upgrade")

        assert ended.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        assert run("db", "current")[:2] == (0, "")

    @pytest.mark.parametrize("stop", ["KeyboardInterrupt", "EOFError"])
    def test_an_interrupted_command_says_so(self, run, shop, stop):
        """Ctrl-C and Ctrl-D are no errors with a traceback."""
        migration(shop, "0003", f"raise {stop}")

        code, _, err = run("db", "upgrade")

        assert code == 130
        assert err.endswith("fastapi-prodkit: interrupted\n")
        assert "Traceback" not in err

    def test_in_a_thread_it_leaves_signals_alone(self, run):
        """A command may be run from code that is not in the main thread, where Python takes no handlers."""
        import threading

        codes = []
        thread = threading.Thread(target=lambda: codes.append(run("--version")[0]))

        thread.start()
        thread.join()

        assert codes == [0]


class TestMigrate:
    def test_up_and_down(self, run, shop):
        """What is done is shown, step by step, on standard error."""
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

    def test_current_can_ask(self, run, shop):
        """`current --check` is a question for scripts: 3 is no."""
        run("db", "upgrade", "0001")

        assert run("db", "current", "--check") == (3, "", "The database is not at the newest revision.\n")
        run("db", "upgrade")
        assert run("db", "current", "--check") == (0, "0002 (head)\n", "")

    def test_check_compares_models_and_migrations(self, run, shop):
        """A model without its migration is found in CI: 3 is no."""
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

    def test_a_new_migration(self, run, shop):
        """`revision` writes a file, empty or from the models."""
        run("db", "upgrade")

        code, out, _ = run("db", "revision", "-m", "add prices", "--autogenerate")

        assert code == 0
        assert "add_prices.py" in out
        assert "add prices" not in run("db", "history")[2]
        assert "(head)" in run("db", "history", "--verbose")[1]

    def test_sql_goes_to_standard_output(self, run, shop):
        """`--sql` is for whoever runs migrations by hand."""
        code, out, _ = run("db", "upgrade", "--sql")
        assert code == 0
        assert "CREATE TABLE items" in out
        code, out, _ = run("db", "downgrade", "0001:base", "--sql")
        assert code == 0
        assert "DROP TABLE items" in out

    def test_the_file_can_be_named(self, run, shop, tmp_path, monkeypatch):
        """`--config`, or a variable, from any directory."""
        monkeypatch.chdir(tmp_path)

        assert run("db", "--config", str(shop / "alembic.ini"), "upgrade")[0] == 0
        monkeypatch.setenv("DATABASE_MIGRATIONS_CONFIG", str(shop / "alembic.ini"))
        assert run("db", "current") == (0, "0002 (head)\n", "")

    def test_a_rollback_finds_the_database_ahead(self, run, shop):
        """The step before an older release does not stop it."""
        run("db", "upgrade")
        (shop / "migrations" / "versions" / "0002_step.py").unlink()

        code, _, err = run("db", "upgrade")

        assert (code, err) == (0, "Nothing to do: the database is ahead, a newer release has migrated it.\n")

    def test_a_project_of_alembics_own(self, run, shop):
        """An env.py that does not know us runs as it does under `alembic`."""
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
    def test_a_database_that_is_down(self, run, shop, monkeypatch):
        """One line, without the password."""
        pytest.importorskip("asyncpg", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
        monkeypatch.setenv("DATABASE_URL", NOWHERE)

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err.startswith("fastapi-prodkit: cannot connect to the database: ")
        assert err.count("\n") == 1
        assert SECRET not in err

    def test_a_url_that_is_none(self, run, shop, monkeypatch):
        """One line, without what was given."""
        monkeypatch.setenv("DATABASE_URL", f"//{SECRET}")

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert "DATABASE_URL" in err
        assert SECRET not in err

    def test_a_misspelt_variable(self, run, shop, monkeypatch):
        """A warning is a line as well, without the place in our code."""
        monkeypatch.setenv("DATABASE_POOL_SIZ", "5")
        monkeypatch.setattr(warnings, "filters", [])
        warnings.simplefilter("default")

        code, _, err = run("db", "current")

        meant = "DATABASE_POOL_SIZ in the environment is not a setting; did you mean DATABASE_POOL_SIZE?"
        assert (code, err) == (0, f"fastapi-prodkit: warning: {meant}\n")

    def test_no_database(self, run, shop, monkeypatch):
        """The variable is named."""
        monkeypatch.delenv("DATABASE_URL")

        code, _, err = run("db", "upgrade")

        assert (code, "set DATABASE_URL" in err) == (1, True)

    def test_no_alembic(self, run, monkeypatch):
        """Where only the extra of the command line is installed, it names the other one."""
        monkeypatch.setitem(sys.modules, "alembic", None)

        code, _, err = run("db", "upgrade")

        assert (code, err) == (
            1,
            "fastapi-prodkit: alembic is not installed: pip install 'fastapi-prodkit[database]'\n",
        )

    def test_no_migrations(self, run, tmp_path):
        """In a directory without alembic.ini it says what was looked for, and where."""
        pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err == (
            f"fastapi-prodkit: no migrations are configured in alembic.ini or pyproject.toml in {tmp_path}: "
            "name the file, or run `alembic init`\n"
        )

    @pytest.mark.parametrize("command", [["upgrade", "nope"], ["downgrade", "nope"]])
    def test_a_revision_that_does_not_exist(self, run, shop, command):
        """Alembic's own line."""
        code, _, err = run("db", *command)

        assert (code, err) == (1, "fastapi-prodkit: Can't locate revision identified by 'nope'\n")

    def test_scripts_that_are_not_there(self, run, shop):
        """`check` does not take every complaint of Alembic's for a no."""
        (shop / "migrations").rename(shop / "elsewhere")

        code, _, err = run("db", "check")

        assert code == 1
        assert err.startswith("fastapi-prodkit: Path doesn't exist: ")

    def test_a_statement_that_fails(self, run, shop):
        """The database's own words, under the migration that ran."""
        migration(shop, "0003", 'op.execute("nonsense")')

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err.splitlines()[-2:] == [
            "Running upgrade 0002 -> 0003",
            'fastapi-prodkit: the database reports: near "nonsense": syntax error',
        ]

    def test_a_migration_that_raises(self, run, shop, monkeypatch):
        """The place is named, secrets are masked, and the traceback is there for whoever asks for it."""
        migration(shop, "0003", f'raise RuntimeError("cannot read postgresql://user:{SECRET}@host/name")')

        code, _, err = run("db", "upgrade")
        assert code == 1
        assert "fastapi-prodkit: RuntimeError: cannot read postgresql://user:[redacted]@host/name" in err
        assert "0003_step.py:6)" in err
        assert "Traceback" not in err
        assert SECRET not in err
        monkeypatch.setenv("FASTAPI_PRODKIT_TRACEBACK", "1")
        assert "Traceback" in run("db", "upgrade")[2]

    def test_a_file_that_cannot_be_opened(self, run, shop):
        """The file is named."""
        migration(shop, "0003", 'open("/nowhere/at/all")')

        code, _, err = run("db", "upgrade")

        assert code == 1
        assert err.splitlines()[-1] == "fastapi-prodkit: /nowhere/at/all: No such file or directory"

    def test_an_error_in_a_library(self, run):
        """Without a line of the project's own there is no place to name."""
        from fastapi_prodkit.cli.failure import describe

        assert describe(RuntimeError("")) == "RuntimeError: "


def test_the_command_is_installed():
    """`fastapi-prodkit` is on the path after `pip install`."""
    from importlib.metadata import entry_points

    found = entry_points(group="console_scripts", name="fastapi-prodkit")

    assert [point.value for point in found] in ([], ["fastapi_prodkit.__main__:main"])
    assert Path(door.__file__).name == "__main__.py"
