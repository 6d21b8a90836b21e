"""Rules for operations in migrations that block traffic and that squawk does not know."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["unsafe_statements"]


@dataclass(frozen=True)
class _Rule:
    """A rule: its name, the start of the statements that break it, message and remedy."""

    name: str
    pattern: str
    message: str
    remedy: str


_REPACK = "Leave it to autovacuum, or use pg_repack, which copies the table while it is used."
_RULES = (
    _Rule(
        "ban-lock-table",
        r"LOCK\b",
        "LOCK TABLE blocks other queries of the table until the end of the transaction.",
        "Remove it: each statement takes the lock that it needs.",
    ),
    _Rule(
        "ban-truncate",
        r"TRUNCATE\b",
        "TRUNCATE blocks reads and writes, and deletes rows that the running release may need.",
        "Delete the rows in batches, when no release uses them.",
    ),
    _Rule(
        "ban-vacuum-full",
        r"VACUUM\s*(?:\([^)]*\bFULL\b|FULL\b)",
        "VACUUM FULL rewrites the table and blocks reads and writes meanwhile.",
        _REPACK,
    ),
    _Rule(
        "ban-cluster",
        r"CLUSTER\b",
        "CLUSTER rewrites the table and blocks reads and writes meanwhile.",
        _REPACK,
    ),
    _Rule(
        "ban-rewriting-table",
        r"ALTER\s+TABLE\b[^;]*\b(?:SET\s+(?:TABLESPACE|LOGGED|UNLOGGED|ACCESS\s+METHOD)"
        r"|ADD\s+COLUMN\b[^;]*\b(?:(?:BIG|SMALL)?SERIAL|AS\s+IDENTITY))\b",
        "This rewrites the table and blocks reads and writes meanwhile.",
        "Add a new column or table, and fill it in batches.",
    ),
    _Rule(
        "require-concurrent-refresh",
        r"REFRESH\s+MATERIALIZED\s+VIEW\s+(?!CONCURRENTLY\b)",
        "Refreshing a materialized view without `concurrently` blocks reads.",
        "Give it a unique index and use `concurrently`.",
    ),
    _Rule(
        "ban-unlimited-lock-timeout",
        r"(?:SET\s+(?:(?:LOCAL|SESSION)\s+)?lock_timeout\s*(?:=|TO\b)\s*(?:'?0\w*'?|DEFAULT)\s*(?:;|$)"
        r"|RESET\s+(?:lock_timeout|ALL)\b)",
        "A statement that waits for a lock without a time-out makes every later statement on the table wait.",
        "Leave the time-out of migrations as it is, or set a short one.",
    ),
    _Rule(
        "unchecked-block",
        r"DO\b",
        "The statements of a DO block are not checked.",
        "Write them into the revision.",
    ),
)
# A comment, a string or a dollar-quoted block; a semicolon inside does not end a statement.
_OPAQUE = re.compile(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$", re.DOTALL)
_PATTERNS = [(rule, re.compile(rf"(?:^|;)\s*({rule.pattern})", re.IGNORECASE)) for rule in _RULES]


def unsafe_statements(sql: str) -> Iterator[dict[str, Any]]:
    """Yield violations of our rules in the format of squawk's report."""
    code = _OPAQUE.sub(_blanked, sql)
    for rule, pattern in _PATTERNS:
        for found in pattern.finditer(code):
            line = code.count("\n", 0, found.start(1))
            yield {"rule_name": rule.name, "message": rule.message, "help": rule.remedy, "line": line}


def _blanked(found: re.Match[str]) -> str:
    """Replace the match by blanks, keeping line ends; a short string stays, because it may be a time-out."""
    text = found[0]
    return text if re.fullmatch(r"'\w+'", text) else re.sub(r"[^\n]", " ", text)
