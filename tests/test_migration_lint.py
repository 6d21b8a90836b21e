"""Unsafe operations in new migrations are found before they run, each with the safe way."""

import pytest
from migrating import INDEX, configured, migration, project

from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError

pytest.importorskip("sqlalchemy", reason="needs the extra: pip install 'fastapi-prodkit[database]'")
pytest.importorskip("alembic", reason="needs the extra: pip install 'fastapi-prodkit[database]'")

from alembic.script import ScriptDirectory

from fastapi_prodkit.database import migration_lint

try:
    migration_lint._program()
except MissingExtraError as missing:
    pytest.skip(str(missing), allow_module_level=True)

DROP = 'op.drop_column("items", "name")'
NEW_TABLE = """op.create_table("parts", sa.Column("id", sa.SmallInteger(), primary_key=True))
op.create_index("parts_id", "parts", ["id"])"""
OUTSIDE = """with op.get_context().autocommit_block():
    op.execute("{}")"""
READ = 'op.get_bind().execute(sa.text("SELECT 1")).scalar_one()'


@pytest.fixture
def directory(tmp_path, monkeypatch):
    directory = project(tmp_path / "project")
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def verdict(directory):
    """Return a function that writes a revision and returns the verdict on it."""

    def run(upgrade, comment=""):
        migration(directory, "0003", upgrade)
        path = directory / "migrations" / "versions" / "0003_step.py"
        path.write_text(f"{comment}\n{path.read_text()}")
        config = configured(directory, "sqlite://")
        scripts = ScriptDirectory.from_config(config)
        return next(migration_lint.lint(config, scripts, [scripts.get_revision("0003")]))

    return run


class TestRules:
    @pytest.mark.parametrize(
        ("upgrade", "rule", "remedy"),
        [
            (DROP, "ban-drop-column", "First release code that does not use it"),
            ('op.drop_table("items")', "ban-drop-table", "First release code that does not use it"),
            ('op.rename_table("items", "things")', "renaming-table", "Add a new one, write to both"),
            (
                'op.alter_column("items", "name", new_column_name="title")',
                "renaming-column",
                "Add a new one, write to both",
            ),
            (
                'op.alter_column("items", "name", type_=sa.Text())',
                "changing-column-type",
                "Add a new one, write to both",
            ),
            ('op.alter_column("items", "name", nullable=False)', "adding-not-nullable-field", "CHECK"),
            ('op.create_index("by_name", "items", ["name"])', "require-concurrent-index-creation", "concurrently"),
            ('op.drop_index("by_name")', "require-concurrent-index-deletion", "CONCURRENTLY"),
            ('op.create_unique_constraint("u", "items", ["name"])', "disallowed-unique-constraint", "CONCURRENTLY"),
            ('op.create_check_constraint("c", "items", "id > 0")', "constraint-missing-not-valid", "NOT VALID"),
            (
                'op.create_foreign_key("f", "items", "items", ["id"], ["id"])',
                "adding-foreign-key-constraint",
                "VALIDATE",
            ),
            (
                'op.add_column("items", sa.Column("n", sa.Integer(), nullable=False))',
                "adding-required-field",
                "nullable",
            ),
            (
                'op.execute("ALTER TABLE items ALTER COLUMN name DROP NOT NULL")',
                "ban-drop-not-null",
                "https://squawkhq.com/",
            ),
            (
                'op.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")',
                "ban-lock-table",
                "takes the lock that it needs",
            ),
            ('op.execute("SELECT 1;\\n/* all */ truncate items")', "ban-truncate", "in batches"),
            (OUTSIDE.format("VACUUM FULL items"), "ban-vacuum-full", "pg_repack"),
            (OUTSIDE.format("VACUUM (ANALYZE, FULL) items"), "ban-vacuum-full", "pg_repack"),
            ('op.execute("CLUSTER items USING items_pkey")', "ban-cluster", "pg_repack"),
            ('op.execute("ALTER TABLE items SET UNLOGGED")', "ban-rewriting-table", "in batches"),
            ('op.execute("ALTER TABLE items ADD COLUMN number bigserial")', "ban-rewriting-table", "in batches"),
            ('op.execute("REINDEX TABLE items")', "require-concurrent-reindex", "concurrently"),
            ('op.execute("REFRESH MATERIALIZED VIEW totals")', "require-concurrent-refresh", "unique index"),
            ("""op.execute("SET lock_timeout = '0'")""", "ban-unlimited-lock-timeout", "Leave the time-out"),
            ('op.execute("DO $$ BEGIN DROP TABLE items; END $$")', "unchecked-block", "into the revision"),
            ('op.execute("SELECT nothing FROM")', "syntax-error", "https://squawkhq.com/docs/syntax-error"),
        ],
    )
    def test_an_unsafe_operation_has_a_safe_way(self, verdict, upgrade, rule, remedy):
        """What stops traffic, or breaks the release that still runs."""
        found = {finding.rule: finding for finding in verdict(upgrade).findings}

        assert remedy in found[rule].remedy
        assert found[rule].message
        assert found[rule].statement

    @pytest.mark.parametrize(
        "upgrade",
        [
            'op.add_column("items", sa.Column("size", sa.Integer()))',
            'op.add_column("items", sa.Column("code", sa.String(3), nullable=False, server_default="abc"))',
            NEW_TABLE,
            INDEX,
            INDEX.replace(", if_not_exists=True", ""),
            'op.execute("UPDATE items SET name = id")',
            "pass",
            OUTSIDE.format("REFRESH MATERIALIZED VIEW CONCURRENTLY totals"),
            OUTSIDE.format("VACUUM items"),
            """op.execute("SET lock_timeout = '5s'")""",
            """op.execute("COMMENT ON TABLE items IS 'a; TRUNCATE b'")""",
            """op.execute("CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $f$ BEGIN;\\nTRUNCATE a; END $f$")""",
        ],
    )
    def test_what_is_safe_passes(self, verdict, upgrade):
        """Time-outs are set, a new table is nobody's yet, and types of columns are a matter of taste."""
        assert verdict(upgrade).findings == []

    def test_a_configuration_of_squawk_counts(self, directory, verdict):
        """`.squawk.toml` excludes rules for the whole project."""
        (directory / ".squawk.toml").write_text('excluded_rules = ["ban-drop-column"]\n')

        assert verdict(DROP).findings == []

    def test_a_configuration_that_squawk_does_not_take(self, directory, verdict):
        """It is not taken for a verdict."""
        (directory / ".squawk.toml").write_text("nonsense = [")

        with pytest.raises(ConfigurationError, match="squawk failed: Configuration error"):
            verdict(DROP)

    def test_the_statement_is_found_behind_other_ends_of_lines(self, verdict):
        """SQL may have characters that Python, and not squawk, takes for the end of a line."""
        (finding,) = verdict(f"""op.execute("COMMENT ON TABLE items IS 'a\\u2028b\\x0cc'")\n{DROP}""").findings

        assert finding.statement == "ALTER TABLE items DROP COLUMN name;"


class TestComments:
    def test_a_rule_is_ignored_for_a_reason(self, verdict):
        """For the file, and no other rule with it; the reason is shown."""
        result = verdict(f'{DROP}\nop.drop_table("items")', "# squawk-ignore ban-drop-column: unused since 2.3")

        assert [finding.rule for finding in result.findings] == ["ban-drop-table"]
        assert result.passed == ["ban-drop-column is ignored: unused since 2.3"]

    def test_at_the_end_of_a_line(self, verdict):
        """Where the operation is."""
        assert verdict(f"{DROP}  # squawk-ignore ban-drop-column: unused since 2.3").findings == []

    @pytest.mark.parametrize(
        "comment",
        [
            "# squawk-ignore ban-drop-column",
            "# squawk-ignore ban-drop-column:",
            "# squawk-ignore: why",
            "# squawk-skip",
        ],
    )
    def test_without_a_reason_it_is_a_finding(self, verdict, comment):
        """And nothing is ignored."""
        result = verdict(DROP, comment)

        assert [finding.rule for finding in result.findings] == ["squawk-comment", "ban-drop-column"]

    @pytest.mark.parametrize(
        "comment",
        ["-- squawk-ignore ban-drop-column", "-- squawk-ignore-file", "/* squawk-ignore ban-drop-column */ SELECT 1;"],
    )
    def test_in_the_sql_it_needs_a_reason_too(self, verdict, comment):
        """It would let the statement pass without a word."""
        result = verdict(f'op.execute("""{comment}\nALTER TABLE items DROP COLUMN name""")')

        assert [finding.rule for finding in result.findings] == ["squawk-comment", "ban-drop-column"]

    def test_in_the_sql_with_a_reason(self, verdict):
        """It is what it is in the file."""
        sql = "-- squawk-ignore ban-drop-column: unused since 2.3\\nALTER TABLE items DROP COLUMN name"

        result = verdict(f'op.execute("{sql}")')

        assert (result.findings, result.passed) == ([], ["ban-drop-column is ignored: unused since 2.3"])

    def test_text_is_no_comment(self, verdict):
        """Neither a docstring nor SQL."""
        quoted = """op.execute("SELECT '# squawk-skip'")"""

        result = verdict(f"{quoted}\n{DROP}", '"""\n# squawk-ignore ban-drop-column: why\n"""')

        assert [finding.rule for finding in result.findings] == ["ban-drop-column"]


class TestNotChecked:
    def test_what_cannot_be_rendered_fails(self, verdict):
        """It is not taken for safe."""
        (finding,) = verdict(READ).findings

        assert finding.rule == "not checked"
        assert finding.message == (
            "It cannot be rendered offline: AttributeError: 'NoneType' object has no attribute 'scalar_one'"
        )

    def test_it_is_skipped_for_a_reason(self, verdict):
        """The reason is shown."""
        result = verdict(READ, "# squawk-skip: it counts rows")

        assert (result.findings, result.passed) == ([], ["not checked: it counts rows"])

    @pytest.mark.parametrize(
        ("upgrade", "message", "others"),
        [
            (f"if context.is_offline_mode():\n    return\n{DROP}", "It emits nothing offline.", []),
            (
                f'{DROP}\nif not op.get_context().as_sql:\n    op.execute("TRUNCATE items")',
                "It checks whether it runs offline, and may do more in a database.",
                ["ban-drop-column"],
            ),
        ],
    )
    def test_what_does_something_else_offline_fails(self, verdict, upgrade, message, others):
        """What it emits is checked, and what it may do besides is said; a reason lets that pass."""
        upgrade = f"from alembic import context\n{upgrade}"
        found = verdict(upgrade).findings
        skipped = verdict(upgrade, "# squawk-skip: why")

        assert (found[0].rule, found[0].message) == ("not checked", message)
        assert [finding.rule for finding in found[1:]] == others
        assert [finding.rule for finding in skipped.findings] == others
        assert skipped.passed == ["not checked: why"]

    def test_what_a_downgrade_asks_does_not_count(self, directory):
        """The lint is about upgrades."""
        migration(directory, "0003", '"nothing"', "op.get_context().as_sql")
        config = configured(directory, "sqlite://")
        scripts = ScriptDirectory.from_config(config)

        (result,) = migration_lint.lint(config, scripts, [scripts.get_revision("0003")])

        assert result.findings == []

    def test_what_can_be_rendered_is_not_skipped(self, verdict):
        """The comment lets pass what cannot be checked, and nothing else."""
        assert [finding.rule for finding in verdict(DROP, "# squawk-skip: why").findings] == ["ban-drop-column"]


class TestCommand:
    @pytest.fixture
    def run(self, directory, capsys):
        pytest.importorskip("typer", reason="needs the extra: pip install 'fastapi-prodkit[cli]'")
        from fastapi_prodkit.cli import main

        def run(*arguments):
            code = main(["db", "check", *arguments])
            return code, capsys.readouterr().err.splitlines()

        return run

    def test_it_says_where_what_why_and_how(self, directory, run):
        """Exit code 3 is no."""
        migration(directory, "0003", DROP)
        migration(
            directory, "0004", f"# squawk-ignore ban-drop-table: it was never used\n{DROP.replace('column', 'table')}"
        )
        migration(directory, "0004", 'op.drop_table("old")  # squawk-ignore ban-drop-table: it was never used')

        assert run("--lint", "--from", "0001") == (
            3,
            [
                "migrations/versions/0003_step.py",
                "  ban-drop-column: Dropping a column may break existing clients.",
                "    ALTER TABLE items DROP COLUMN name;",
                "    First release code that does not use it, then drop it with a later release.",
                "migrations/versions/0004_step.py",
                "  ban-drop-table is ignored: it was never used",
                "Migrations above 0001: 3; unsafe: 1.",
            ],
        )
        assert run("--lint", "--from", "0003")[0] == 0

    def test_a_revision_or_a_branch_without_lint(self, run):
        """They would change nothing."""
        code, lines = run("--from", "0001")

        assert code == 2
        assert lines[0].startswith("fastapi-prodkit: Invalid value: --from and --base belong to --lint; try: ")

    def test_without_the_extra(self, run, monkeypatch):
        """It is named, also where nothing is new."""
        monkeypatch.setattr(migration_lint.shutil, "which", lambda *_, **__: None)

        assert run("--lint", "--from", "head") == (
            1,
            ["fastapi-prodkit: squawk is not installed: pip install 'fastapi-prodkit[lint]'"],
        )
