"""List the names of variables, find the variable that an error is about, and the one that a misspelt name means.

The field `pool_size` of the section `database` is DATABASE_POOL_SIZE; with the prefix `APP_`, APP_DATABASE_POOL_SIZE.
Names are compared in lower case and shown in upper case. Values are never shown.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, core_schema

from fastapi_prodkit._config.keywords import unknown
from fastapi_prodkit.exceptions import SettingsError
from fastapi_prodkit.sections import Section

_BUILT_IN = frozenset(get_args(core_schema.ErrorType))
_FREE_TEXT = {"value_error", "assertion_error", "import_error", "union_tag_invalid"}  # messages may repeat the value
_SECRET_LENGTH = 6  # a message may contain a shorter value by chance
_SHORTEST = len("DEBUG")  # the length of our shortest name; a shorter name is compared as if it had this length
_MAX_MISSING = 2  # letters that a near name may lack; longer names are not passed to difflib
_SCHEME = re.compile(r"^[a-z+]+://")
_WORD = re.compile(r"[^\s:/@?&=,;'\"]+")


@dataclass(frozen=True)
class Unusable:
    """Replace a value that could not be read. It fails validation, so that its reason is reported with other errors."""

    reason: str


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that the field holds, if it holds one."""
    model = _model_of(field)
    return model if model is not None and issubclass(model, Section) else None


def has_switch(field: FieldInfo) -> bool:
    """Return whether the field is a section that `<SECTION>_ENABLED` can leave out: one that can be None."""
    section = section_of(field)
    return section is not None and NoneType in members(field) and "enabled" not in section.model_fields


def variables(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo | None]:
    """Return every variable of the settings with its field; None for the switch of a section."""
    found: dict[str, FieldInfo | None] = {}
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            found |= dict.fromkeys(own_names(name, field, prefix), field)
            continue
        if has_switch(field):
            found[variable(prefix, name, "enabled")] = None
        found |= {variable(prefix, name, key): inner for key, inner in section.model_fields.items()}
    return found


def variable(prefix: str, *path: str) -> str:
    """Return the variable of a field, such as ERRORS_RAISE for the field `raise_` of the section `errors`."""
    return f"{prefix}{'_'.join(path)}".rstrip("_").upper()


def whole_sections(given: Mapping[str, str | None], model: type[BaseModel], prefix: str) -> dict[str, Unusable]:
    """Return why the sections that are given as one JSON object cannot be used: each of their fields is a variable.

    Another value with the name of a section, such as LOG=debug, is for another program.

    Args:
        given: Variables by name, in lower case.
        model: The settings.
        prefix: Of their variables.
    """
    found = {}
    for name, field in model.model_fields.items():
        section, value = section_of(field), given.get(f"{prefix}{name}".lower())
        if section is not None and value is not None:
            names = [variable(prefix, name, key) for key in _keys(value) if key in section.model_fields]
            if names:
                found[name] = Unusable(f"is not read as JSON: set {', '.join(names)} in its place")
    return found


def near_misses(given: Collection[str], ours: Iterable[str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each given name that differs from one of ours by one letter wrong, extra or swapped, or by two missing.

    Known names are correct, and so are names that start with one, because a user's own field may be a model. A name of
    ours that is given as well is not suggested.
    """
    from difflib import get_close_matches  # noqa: PLC0415 - on first use

    names = {name.upper() for name in given}
    missing = [name for name in ours if name not in names]
    own = tuple(f"{name}_" for name in known)
    for name in sorted(names.difference(known)):
        if name.startswith(own):
            continue
        length = max(len(name), _SHORTEST)
        of_that_length = [other for other in missing if abs(len(other) - length) <= _MAX_MISSING]
        for near in get_close_matches(name, of_that_length, n=1, cutoff=(length - 1) / length):  # all letters but one
            yield name, near


def problems(error: ValidationError, model: type[BaseModel], prefix: str) -> dict[str, str]:
    """Return each problem by the name of its variable; a validator that raises `SettingsError` chooses the names."""
    found: dict[str, str] = {}
    for details in error.errors(include_url=False):
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, SettingsError):
            found |= cause.problems
            continue
        for loc in _locations(details, model):
            name, field, rest = _locate(loc, model, prefix)
            index = next((part for part in rest if isinstance(part, int)), None)
            text = _text(details, model, secret=field is not None and SecretStr in members(field))
            text = text if index is None else f"item {index + 1} {text}"
            if field is not None and field.description:
                text += f" ({field.description.rstrip('.')})"
            found[name] = f"{found[name]}; or {text}" if name in found else text
    return found


def _locations(details: ErrorDetails, model: type[BaseModel]) -> list[tuple[int | str, ...]]:
    """Return the locations of an error; if a whole section is missing, those of its required variables."""
    loc = details["loc"]
    section = _model_of(field) if len(loc) == 1 and (field := model.model_fields.get(str(loc[0]))) else None
    if section is None or details["type"] != "missing":
        return [loc]
    return [(*loc, key) for key, inner in section.model_fields.items() if inner.is_required()] or [loc]


def _locate(
    loc: tuple[int | str, ...], model: type[BaseModel], prefix: str
) -> tuple[str, FieldInfo | None, tuple[int | str, ...]]:
    """Return the variable, its field, and the rest of the location: list indexes, and keys that are part of a value."""
    if not loc:
        return model.__name__, None, ()
    head, rest = str(loc[0]), loc[1:]
    field = model.model_fields.get(head)
    if field is None:  # an alias, which takes no prefix, or an argument that does not exist
        return head.upper(), None, rest
    path = [head]
    deepest: Any = model.model_config.get("env_nested_max_split") or len(rest)
    while field is not None and rest and len(path) <= deepest:
        inner, key = _model_of(field), str(rest[0])
        if inner is None or not (key in inner.model_fields or issubclass(inner, Section)):
            break
        path.append(key)
        field, rest = inner.model_fields.get(key), rest[1:]
    return _nested_variable(model, prefix, path), field, rest


def _nested_variable(model: type[BaseModel], prefix: str, path: list[str]) -> str:
    """Return the variable of a nested field; if the settings have no delimiter, the variable and a key in its JSON."""
    delimiter: Any = model.model_config.get("env_nested_delimiter")
    if delimiter is None:
        return ".".join([variable(prefix, path[0]), *path[1:]])
    return f"{prefix}{delimiter.join(path)}".rstrip("_").upper()


def _text(details: ErrorDetails, model: type[BaseModel], *, secret: bool) -> str:
    """Return what is wrong, without the value; for a secret, without any part of the value."""
    given = details["input"]
    if isinstance(given, Unusable):
        return given.reason
    if details["type"] == "missing":
        others = ", or remove the other variables of the section" if len(details["loc"]) > 1 else ""
        return f"is required: set it{others}"
    if details["type"] == "extra_forbidden":
        return unknown(str(details["loc"][-1]), model.model_fields if len(details["loc"]) == 1 else ())
    text = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    free = details["type"] in _FREE_TEXT or details["type"] not in _BUILT_IN
    if free and any(part in text for value in _values(given) for part in (_parts(value) if secret else [value])):
        return "cannot be used; the reason is not shown because it repeats the value"
    if isinstance(given, str | SecretStr):  # pydantic calls the characters of a secret items
        text = text.replace("items after validation", "characters").replace("item after validation", "character")
    return re.sub(r"^(Input|String|Value|Tuple|List) should", "must", text)


def _values(given: Any) -> Iterator[str]:
    if isinstance(given, SecretStr):
        given = given.get_secret_value()
    if isinstance(given, str) and len(given) >= _SECRET_LENGTH:
        yield given
    elif isinstance(given, dict):
        yield from _values([*given, *given.values()])
    elif isinstance(given, list | tuple | set | frozenset):
        for item in given:
            yield from _values(item)


def _parts(secret: str) -> list[str]:
    """Return the parts of a secret that a message must not contain: the whole, and words such as a URL's password."""
    return [secret, *(word for word in _WORD.findall(_SCHEME.sub("", secret)) if len(word) >= _SECRET_LENGTH)]


def _keys(value: str) -> Collection[str]:
    """Return the keys of a JSON object; nothing if the value is none."""
    try:
        content = json.loads(value)
    except ValueError:
        return ()
    return content if isinstance(content, dict) else ()


def members(field: FieldInfo) -> tuple[Any, ...]:
    """Return the types that the field may have."""
    annotation = field.annotation
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    return next((each for each in members(field) if isinstance(each, type) and issubclass(each, BaseModel)), None)


def own_names(name: str, field: FieldInfo, prefix: str) -> list[str]:
    """Return the variables of a field that is not a section: its aliases, which take no prefix, or its own name."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return [choice.upper() for choice in choices if isinstance(choice, str)] or [variable(prefix, name)]
