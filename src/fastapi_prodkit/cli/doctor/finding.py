"""What a rule is, and what it finds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from fastapi_prodkit.cli.doctor.facts import Facts

__all__ = ["DOCS", "SEVERITIES", "Check", "Fault", "Finding", "Rule", "Severity", "rule"]

Severity: TypeAlias = Literal["error", "warning", "info"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "info")  # the worst first

DOCS: Final = "https://fastapi-prodkit.github.io/fastapi-prodkit/pieces/doctor/"


class Fault(NamedTuple):
    """What a check found, and what to do about it."""

    reason: str
    remedy: str


Check: TypeAlias = Callable[[Facts], Iterator[Fault]]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        id: Of the rule; it stays, so that dashboards and suppressions may rely on it.
        severity: `error` would hurt in production; `warning` may, depending on what stands around the service.
        title: What the rule is about.
        reason: What was found, and why it matters. No value that could be a secret.
        remedy: What to do.
    """

    id: str
    severity: Severity
    title: str
    reason: str
    remedy: str

    @property
    def docs(self) -> str:
        """Return where the rule is explained."""
        return f"{DOCS}#{self.id}"


@dataclass(frozen=True)
class Rule:
    """A check with a name."""

    id: str
    severity: Severity
    title: str
    check: Check

    def findings(self, facts: Facts) -> Iterator[Finding]:
        """Yield what the check finds."""
        for reason, remedy in self.check(facts):
            yield Finding(self.id, self.severity, self.title, reason, remedy)


def rule(name: str, severity: Severity, title: str) -> Callable[[Check], Rule]:
    """Make a rule of a function; the name is the id."""
    return lambda check: Rule(name, severity, title, check)
