"""The keywords of a middleware, which are fields of its section: `CORSMiddleware(app, max_age=60)`."""

import inspect
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from fastapi_prodkit.exceptions import ConfigurationError

__all__ = ["unknown", "with_keywords"]

_Section = TypeVar("_Section", bound=BaseModel)

_NOT_RENAMED: Final[Mapping[str, str]] = MappingProxyType({})


def with_keywords(
    layer: object,
    settings: _Section,
    keywords: Mapping[str, object],
    accepted: Collection[str],
    renamed: Mapping[str, str] = _NOT_RENAMED,
) -> _Section:
    """Return the settings with the given keywords as values of their fields.

    Args:
        layer: The middleware that is constructed; the error names it.
        settings: The values of all other fields.
        keywords: The keyword arguments.
        accepted: The keywords that the middleware takes.
        renamed: Field by keyword, for keywords that have another name than their field.

    Raises:
        ConfigurationError: A keyword is not accepted, cannot be used, or means the same as another one. Or the settings
            are the section of another middleware, or not a section, such as the list that Starlette's CORSMiddleware
            takes in this position.
    """
    owner = type(layer).__name__
    if not isinstance(settings, BaseModel):
        raise ConfigurationError(f"{owner}: {type(settings).__name__} is not a section of settings; use keywords")
    missing = {renamed.get(name, name) for name in accepted} - type(settings).model_fields.keys()
    if missing:
        raise ConfigurationError(
            f"{owner}: {type(settings).__name__} has no {min(missing)}; give the section of this piece, or use keywords"
        )
    if not keywords:
        return settings
    given = {renamed.get(name, name): name for name in keywords}  # by field
    problems = {name: unknown(name, _parameters(layer, accepted)) for name in keywords if name not in accepted}
    for name in keywords.keys() - given.values():
        problems[name] = f"means the same as {given[renamed.get(name, name)]}: give one of them"
    if not problems:
        # Without the defaults: some layers ask `model_fields_set` which values were given.
        before = {field: value for field, value in settings if field in settings.model_fields_set}
        values = {field: keywords[name] for field, name in given.items()}
        try:
            return settings.model_validate({**before, **values})
        except ValidationError as error:
            problems = {given.get(field, field): reason for field, reason in _reasons(error)}
    # Outside of `except`, so that the ValidationError, which has the values, is not the context of this error.
    raise ConfigurationError("\n".join(f"{owner}({name}=...): {reason}" for name, reason in problems.items()))


def unknown(name: str, known: Collection[str]) -> str:
    """Return the text for a name that does not exist, with the name that was probably meant."""
    from difflib import get_close_matches  # noqa: PLC0415 - on first use

    near = get_close_matches(name, known, n=1)
    return f"does not exist; did you mean {near[0]}?" if near else "does not exist"


def _parameters(layer: object, accepted: Collection[str]) -> list[str]:
    """Return the accepted keywords, and the other keyword-only parameters of the middleware."""
    parameters = inspect.signature(type(layer)).parameters.values()
    return [*accepted, *(each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY)]


def _reasons(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Yield the field of each error, and what is wrong with it, without the value."""
    for each in error.errors(include_url=False, include_input=False):
        yield str(next(iter(each["loc"]), "settings")), each["msg"].removeprefix("Value error, ")
