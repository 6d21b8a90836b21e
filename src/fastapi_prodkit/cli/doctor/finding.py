"""Rules and their findings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from fastapi_prodkit.cli.doctor.facts import Facts

__all__ = ["DOCS", "SEVERITIES", "Check", "Finding", "Problem", "Rule", "Severity", "rule"]

Severity: TypeAlias = Literal["error", "warning", "info"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "info")  # most severe first

DOCS: Final = "https://fastapi-prodkit.github.io/fastapi-prodkit/pieces/doctor/"


class Problem(NamedTuple):
    """A problem that a check found, and its remedy."""

    reason: str
    remedy: str


Check: TypeAlias = Callable[[Facts], Iterator[Problem]]


@dataclass(frozen=True)
class Finding:
    """A finding of a rule.

    Attributes:
        id: Id of the rule. Ids do not change, so dashboards and suppressions can rely on them.
        severity: `error` is a problem in production; `warning` may be one, depending on the environment.
        title: Title of the rule.
        reason: What was found, and why it matters, without values that could be secret.
        remedy: How to fix it.
    """

    id: str
    severity: Severity
    title: str
    reason: str
    remedy: str

    @property
    def docs(self) -> str:
        """Return the URL of the rule's documentation."""
        return f"{DOCS}#{self.id}"


@dataclass(frozen=True)
class Rule:
    """A check with an id, a severity and a title."""

    id: str
    severity: Severity
    title: str
    check: Check

    def findings(self, facts: Facts) -> Iterator[Finding]:
        """Yield the findings of the check."""
        for reason, remedy in self.check(facts):
            yield Finding(self.id, self.severity, self.title, reason, remedy)


def rule(name: str, severity: Severity, title: str) -> Callable[[Check], Rule]:
    """Decorate a check function to make a rule; `name` is the id."""
    return lambda check: Rule(name, severity, title, check)
