"""Everything that fastapi-prodkit raises.

    ProdkitError
    ├── ConfigurationError (ValueError)    a setting or an argument is wrong; raised at construction
    │   └── SettingsError                  all problems that `Settings()` has found, without values
    ├── MissingExtraError (ImportError)    a piece is switched on and its extra is not installed
    ├── MigrationError                     the database's schema is not what this release needs, or stays locked
    ├── CheckWarning                       raised by a readiness check: degraded, but still able to serve
    └── ProblemError (HTTPException)       an error response, RFC 9457

`except ProdkitError` catches every exception class of this library. `SettingsWarning` (UserWarning) is issued for
settings that are probably a mistake, such as a misspelt variable.
"""

import http.client
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

__all__ = [
    "CheckWarning",
    "ConfigurationError",
    "MigrationError",
    "MissingExtraError",
    "ProblemError",
    "ProdkitError",
    "SettingsError",
    "SettingsWarning",
]


class ProdkitError(Exception):
    """Base class of all exceptions of this library. They can be pickled, for pools of processes and task queues."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the attributes, and not the call that has made them: its arguments are not all in `args`."""
        return _restore, (type(self), self.args), vars(self)


class ConfigurationError(ProdkitError, ValueError):
    """A setting or an argument cannot be used. The message names it, the reason and the remedy."""


class SettingsError(ConfigurationError):
    """Settings cannot be used. The message lists all of them by name, never by value.

    Attributes:
        problems: variable name -> what is wrong, and the remedy.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        count = f"{len(self.problems)} setting{'s' if len(self.problems) != 1 else ''} cannot be used:"
        super().__init__("\n".join([count, *(f"  {name}: {text}" for name, text in self.problems.items())]))


class SettingsWarning(UserWarning):
    """A setting is probably a mistake, such as a misspelt variable."""


class MissingExtraError(ProdkitError, ImportError):
    """An optional dependency is not installed. The message names the extra to install."""


class MigrationError(ProdkitError):
    """Migrations are pending, were refused, or could not run: another migration runs, or a lock was not released."""


class CheckWarning(ProdkitError):  # noqa: N818 - it is the warning level of a check, not an error
    """Raised by a readiness check to pass with status `warn`; the message is shown with the details of the probe."""


class ProblemError(ProdkitError, HTTPException):
    """End the request with an RFC 9457 problem response.

    It is a Starlette `HTTPException`, so status and headers are right even in an app that never called
    `add_problem_handlers`; the body then is FastAPI's `{"detail": ...}`.

    Args:
        status: HTTP status code, 400 to 599.
        detail: What went wrong with this request, for the client. Never internals.
        type: URI reference that identifies the kind of problem; dereferences to its documentation.
        title: Short summary of the kind; by default the status phrase, as RFC 9457 section 4.2.1 asks for.
        headers: Response headers, such as `Retry-After` or `WWW-Authenticate`.
        extensions: Further members of the problem object; the standard members win over equal names.
    """

    def __init__(
        self,
        status: int,
        detail: str | None = None,
        *,
        type: str = "about:blank",  # noqa: A002 - the standard's own name for the member
        title: str | None = None,
        headers: Mapping[str, str] | None = None,
        **extensions: Any,
    ) -> None:
        phrase = http.client.responses.get(status, "Unknown Error")
        HTTPException.__init__(self, status, detail or phrase, headers)
        self.type = type
        self.title = title or phrase
        self.extensions = extensions


def _restore(kind: type[ProdkitError], args: tuple[Any, ...]) -> ProdkitError:
    """Return an exception without its attributes, which pickle restores."""
    return kind.__new__(kind, *args)
