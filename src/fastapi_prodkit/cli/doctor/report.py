"""Render the findings as text, as JSON, and as annotations for GitHub Actions."""

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Final

from fastapi_prodkit._terminal import coloured
from fastapi_prodkit.cli.annotations import annotation
from fastapi_prodkit.cli.doctor.examination import Examination
from fastapi_prodkit.cli.doctor.finding import SEVERITIES, Finding, Severity

__all__ = ["as_github", "as_json", "as_text"]

_WIDTH = 80
_COLOURS: Final[dict[Severity, str]] = {"error": "\033[31m", "warning": "\033[33m", "info": "\033[36m"}
_BOLD, _DIM, _PLAIN = "\033[1m", "\033[2m", "\033[0m"
_COMMANDS: Final[dict[Severity, str]] = {"error": "error", "warning": "warning", "info": "notice"}


def as_text(examination: Examination) -> str:
    """Return the findings as text in 80 columns, with colours if the terminal supports them."""
    colours = coloured(sys.stdout)
    blocks = [_block(finding, colours=colours) for finding in examination.findings]
    return "\n\n".join([*blocks, "\n".join(_summary(examination))])


def as_json(examination: Examination, target: str | None) -> str:
    """Return one JSON object; the doctor's page documents its fields."""
    facts = examination.facts
    fields = ("id", "severity", "title", "reason", "remedy", "docs")
    report = {
        "schema": 1,
        "environment": facts.environment,
        "app": target,
        "summary": _counts(examination),
        "findings": [{name: getattr(finding, name) for name in fields} for finding in examination.findings],
        "skipped": [{"what": what, "reason": reason} for what, reason in facts.skipped.items()],
    }
    return json.dumps(report, indent=2)


def as_github(examination: Examination) -> str:
    """Return an annotation for each finding, and the summary."""
    lines = [
        annotation(
            _COMMANDS[finding.severity],
            f"{finding.reason} {finding.remedy} {finding.docs}",
            title=f"{finding.id}: {finding.title}",
        )
        for finding in examination.findings
    ]
    return "\n".join([*lines, *_summary(examination)])


def _block(finding: Finding, *, colours: bool) -> str:
    label = finding.severity.upper().ljust(len("WARNING"))
    title, name = finding.title, finding.id
    if colours:
        label = f"{_COLOURS[finding.severity]}{label}{_PLAIN}"
        title, name = f"{_BOLD}{title}{_PLAIN}", f"{_DIM}{name}{_PLAIN}"
    explained = [*_wrapped(finding.reason, ""), *_wrapped(finding.remedy, "-> "), *_wrapped(finding.docs, "")]
    return "\n".join([f"{label}  {title}  [{name}]", *explained])


def _wrapped(text: str, mark: str) -> list[str]:
    indent = " " * len("WARNING  ")
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent + mark,
        subsequent_indent=indent + " " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(examination: Examination) -> Iterator[str]:
    facts = examination.facts
    for what, reason in facts.skipped.items():
        yield from textwrap.wrap(f"Not examined: {what} ({reason}).", _WIDTH, subsequent_indent="  ")
    counts = _counts(examination)
    found = ", ".join(
        f"{count} {name if count == 1 or name == 'info' else f'{name}s'}" for name, count in counts.items()
    )
    yield f"{found}; checked as {facts.environment}."


def _counts(examination: Examination) -> dict[Severity, int]:
    counts = Counter(finding.severity for finding in examination.findings)
    return {severity: counts[severity] for severity in SEVERITIES}
