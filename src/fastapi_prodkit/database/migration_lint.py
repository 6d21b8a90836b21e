"""Find operations in migrations that block traffic or break the running release, with squawk.

    # squawk-ignore ban-drop-column: no release uses it since 2.3
    # squawk-skip: it reads rows and writes them back, which cannot be rendered

These are comments in the file of a revision. The first one permits what a rule forbids in that file; it may also be
written in the SQL, after `--`. The second one skips a revision that cannot be rendered offline. The rules are squawk's,
https://squawkhq.com/docs/rules, and those of `migration_rules`.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.script import Script, ScriptDirectory

from fastapi_prodkit.database.migration_rules import unsafe_statements
from fastapi_prodkit.database.migration_source import asks_for_offline_mode, comments, is_empty
from fastapi_prodkit.database.migration_sql import Rendered, render
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError

__all__ = ["Finding", "Verdict", "lint"]

# Excluded rules. Those about types of columns find nothing that blocks. Those about statements that can run twice are
# not needed in a transaction; in CREATE INDEX CONCURRENTLY, IF NOT EXISTS would accept an existing INVALID index.
_STYLE = frozenset(
    {
        "ban-char-field",
        "prefer-bigint-over-int",
        "prefer-bigint-over-smallint",
        "prefer-identity",
        "prefer-robust-stmts",
        "prefer-text-field",
        "prefer-timestamp-tz",
    }
)

# Remedies for rules of squawk that come without one.
_LATER = "First release code that does not use it, then drop it with a later release."
_REPLACE = "Add a new one, write to both, copy the rows in batches, and drop the old one with a later release."
_REMEDIES = {
    "ban-drop-column": _LATER,
    "ban-drop-table": _LATER,
    "changing-column-type": _REPLACE,
    "renaming-column": _REPLACE,
    "renaming-table": _REPLACE,
}
_RENDERABLE = "Do not read the database in offline mode, or write in the file: # squawk-skip: reason"
_WITH_REASON = "Name the rule and the reason: # squawk-ignore RULE: reason, or # squawk-skip: reason"

_SAME_SQL = "Emit the same SQL in both modes, or write in the file: # squawk-skip: reason"

_COMMENT = re.compile(r"(?:#|--)\s*squawk-(?:ignore\s+([\w-]+)|(skip))\s*:\s*(\S.*)")
_ANY_COMMENT = re.compile(r"#\s*squawk-")
_SQL_COMMENT = re.compile(r"(?:--|/\*)\s*squawk-[^\n]*")


@dataclass(frozen=True)
class Finding:
    """A problem of a revision: rule, message, statement and remedy."""

    rule: str
    message: str
    remedy: str
    statement: str = ""


@dataclass
class Verdict:
    """The problems of a revision, and those that its comments permit."""

    path: Path
    findings: list[Finding] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


def lint(config: Config, directory: ScriptDirectory, scripts: list[Script]) -> Iterator[Verdict]:
    """Yield the verdict for each revision.

    Raises:
        ConfigurationError: squawk fails, for example because of an invalid `.squawk.toml`.
        MissingExtraError: squawk is not installed.
    """
    program = _program()
    for script in scripts:
        verdict = Verdict(Path(script.path))
        allowed, skip = _parse_comments(verdict, filter(_ANY_COMMENT.match, comments(verdict.path)))
        try:
            rendered = render(config, directory, script)
        except Exception as error:  # noqa: BLE001 - a revision may need a database; the error is reported, or skipped
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _note_unchecked(verdict, f"It cannot be rendered offline: {reason}", _RENDERABLE, skip)
        else:
            _note_other_mode(verdict, rendered, skip)
            allowed |= _parse_comments(verdict, _SQL_COMMENT.findall(rendered.sql))[0]
            for violation in [*_squawk(program, rendered.sql), *unsafe_statements(rendered.sql)]:
                _note(verdict, violation, rendered.sql, allowed)
        yield verdict


def _parse_comments(verdict: Verdict, found: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Return the reason for each ignored rule, and the reason to skip the file; report malformed comments."""
    allowed: dict[str, str] = {}
    skip = None
    for comment in found:
        parsed = _COMMENT.fullmatch(comment)
        if parsed is None:
            verdict.findings.append(Finding("squawk-comment", f"{comment} has no effect.", _WITH_REASON))
        elif parsed[2]:
            skip = parsed[3]
        else:
            allowed[parsed[1]] = parsed[3]
    return allowed, skip


def _note_other_mode(verdict: Verdict, rendered: Rendered, skip: str | None) -> None:
    """Report a revision that may run other SQL in a database than it renders offline."""
    if not rendered.has_statements and not is_empty(verdict.path):
        _note_unchecked(verdict, "It emits nothing offline.", _SAME_SQL, skip)
    elif asks_for_offline_mode(verdict.path):
        _note_unchecked(verdict, "It checks whether it runs offline, and may do more in a database.", _SAME_SQL, skip)


def _note_unchecked(verdict: Verdict, message: str, remedy: str, skip: str | None) -> None:
    if skip is None:
        verdict.findings.append(Finding("not checked", message, remedy))
    else:
        verdict.passed.append(f"not checked: {skip}")


def _note(verdict: Verdict, violation: dict[str, Any], sql: str, allowed: dict[str, str]) -> None:
    rule = violation["rule_name"]
    if rule in _STYLE:
        return
    if rule in allowed:
        verdict.passed.append(f"{rule} is ignored: {allowed[rule]}")
        return
    remedy = violation["help"] or _REMEDIES.get(rule, f"See https://squawkhq.com/docs/{rule}")
    statement = sql.split("\n")[violation["line"]].strip()  # squawk counts lines from 0
    verdict.findings.append(Finding(rule, violation["message"], remedy, statement))


def _program() -> str:
    folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    program = shutil.which("squawk", path=folders)
    if program is None:
        raise MissingExtraError("squawk is not installed: pip install 'fastapi-prodkit[lint]'")
    return program


def _squawk(program: str, sql: str) -> list[dict[str, Any]]:
    command = [program, "--reporter", "json"]
    code = sql.replace("squawk-", "squawk ")  # disables squawk's own comments: we handle them
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)  # noqa: S603 - a list
    try:
        violations: list[dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        raise ConfigurationError(f"squawk failed: {done.stderr.strip()}") from None
    return violations
