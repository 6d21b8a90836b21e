"""Unsafe operations in new migrations are found, each with its remedy."""

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
    def test_unsafe_operation_has_a_remedy(self, verdict, upgrade, rule, remedy):
        """The lint reports an operation that locks a table or breaks the running release, with a safe alternative."""
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
    def test_safe_operations_pass(self, verdict, upgrade):
        """Additive changes, new tables, concurrent indexes and updates of rows have no finding."""
        assert verdict(upgrade).findings == []

    def test_squawk_toml_excludes_rules(self, directory, verdict):
        """A rule excluded in `.squawk.toml` is not applied to any migration."""
        (directory / ".squawk.toml").write_text('excluded_rules = ["ban-drop-column"]\n')

        assert verdict(DROP).findings == []

    def test_invalid_squawk_toml_is_an_error(self, directory, verdict):
        """An invalid `.squawk.toml` raises a ConfigurationError instead of producing a result without findings."""
        (directory / ".squawk.toml").write_text("nonsense = [")

        with pytest.raises(ConfigurationError, match="squawk failed: Configuration error"):
            verdict(DROP)

    def test_statement_is_found_after_unusual_line_separators(self, verdict):
        """squawk does not count them."""
        (finding,) = verdict(f"""op.execute("COMMENT ON TABLE items IS 'a\\u2028b\\x0cc'")\n{DROP}""").findings

        assert finding.statement == "ALTER TABLE items DROP COLUMN name;"


class TestComments:
    def test_ignored_rule_passes_with_its_reason(self, verdict):
        """In this file, and no other rule."""
        result = verdict(f'{DROP}\nop.drop_table("items")', "# squawk-ignore ban-drop-column: unused since 2.3")

        assert [finding.rule for finding in result.findings] == ["ban-drop-table"]
        assert result.passed == ["ban-drop-column is ignored: unused since 2.3"]

    def test_ignore_comment_may_end_a_line(self, verdict):
        """An ignore comment with a reason at the end of a statement's line suppresses the finding."""
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
    def test_ignore_comment_without_a_reason_is_a_finding(self, verdict, comment):
        """An ignore comment without a reason is reported and does not suppress the original finding."""
        result = verdict(DROP, comment)

        assert [finding.rule for finding in result.findings] == ["squawk-comment", "ban-drop-column"]

    @pytest.mark.parametrize(
        "comment",
        ["-- squawk-ignore ban-drop-column", "-- squawk-ignore-file", "/* squawk-ignore ban-drop-column */ SELECT 1;"],
    )
    def test_ignore_comment_in_sql_needs_a_reason(self, verdict, comment):
        """An ignore comment in SQL without a reason is reported and does not suppress the finding."""
        result = verdict(f'op.execute("""{comment}\nALTER TABLE items DROP COLUMN name""")')

        assert [finding.rule for finding in result.findings] == ["squawk-comment", "ban-drop-column"]

    def test_ignore_comment_in_sql_passes_with_a_reason(self, verdict):
        """An ignore comment in SQL with a reason suppresses the finding, and the result shows the reason."""
        sql = "-- squawk-ignore ban-drop-column: unused since 2.3\\nALTER TABLE items DROP COLUMN name"

        result = verdict(f'op.execute("{sql}")')

        assert (result.findings, result.passed) == ([], ["ban-drop-column is ignored: unused since 2.3"])

    def test_docstring_and_sql_text_are_no_comments(self, verdict):
        """An ignore comment in a docstring or in a string of SQL does not suppress a finding."""
        quoted = """op.execute("SELECT '# squawk-skip'")"""

        result = verdict(f"{quoted}\n{DROP}", '"""\n# squawk-ignore ban-drop-column: why\n"""')

        assert [finding.rule for finding in result.findings] == ["ban-drop-column"]


class TestNotChecked:
    def test_revision_that_cannot_be_rendered_is_a_finding(self, verdict):
        """A revision that cannot be rendered offline is a finding, not a pass, and the message has the error."""
        (finding,) = verdict(READ).findings

        assert finding.rule == "not checked"
        assert finding.message == (
            "It cannot be rendered offline: AttributeError: 'NoneType' object has no attribute 'scalar_one'"
        )

    def test_skipped_revision_shows_its_reason(self, verdict):
        """A skip comment with a reason lets a revision pass that cannot be rendered, and the result has the reason."""
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
    def test_revision_that_differs_offline_is_a_finding(self, verdict, upgrade, message, others):
        """Its SQL is checked; a reason lets it pass."""
        upgrade = f"from alembic import context\n{upgrade}"
        found = verdict(upgrade).findings
        skipped = verdict(upgrade, "# squawk-skip: why")

        assert (found[0].rule, found[0].message) == ("not checked", message)
        assert [finding.rule for finding in found[1:]] == others
        assert [finding.rule for finding in skipped.findings] == others
        assert skipped.passed == ["not checked: why"]

    def test_downgrade_is_not_checked(self, directory):
        """The lint checks only the upgrade of a revision, so its downgrade has no findings."""
        migration(directory, "0003", "pass", 'op.drop_table("items")')
        config = configured(directory, "sqlite://")
        scripts = ScriptDirectory.from_config(config)

        (result,) = migration_lint.lint(config, scripts, [scripts.get_revision("0003")])

        assert result.findings == []

    def test_skip_comment_does_not_skip_sql_that_can_be_rendered(self, verdict):
        """A skip comment applies only to a revision that cannot be rendered, so its SQL is still checked."""
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

    def test_check_lint_prints_findings_and_exits_with_3(self, directory, run):
        """`db check --lint` prints findings and ignored rules, and exits with 3 if a migration is unsafe."""
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

    def test_from_and_base_require_lint(self, run):
        """`--from` and `--base` without `--lint` are refused with exit code 2, because they would have no effect."""
        code, lines = run("--from", "0001")

        assert code == 2
        assert lines[0].startswith("fastapi-prodkit: Invalid value: --from and --base belong to --lint; try: ")

    def test_missing_extra_is_named(self, run, monkeypatch):
        """Even without new migrations."""
        monkeypatch.setattr(migration_lint.shutil, "which", lambda *_, **__: None)

        assert run("--lint", "--from", "head") == (
            1,
            ["fastapi-prodkit: squawk is not installed: pip install 'fastapi-prodkit[lint]'"],
        )
