"""List every variable of a settings class, with its current value and source."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Final, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from fastapi_prodkit._config.variables import has_switch, members, own_names, section_of, variable
from fastapi_prodkit.logging.redaction import Redactor

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

    from fastapi_prodkit.secrets import VariablesSource

__all__ = ["Variable", "variables"]

_MASK: Final = "********"
_SWITCH: Final = "Turn this feature on or off."


@dataclass(frozen=True)
class Variable:
    """One variable.

    Attributes:
        name: Name in the environment.
        section: Name of its section; empty for a variable without a section.
        type: Type in one or two words.
        default: Default as text; None without a default.
        required: Whether the settings are invalid without it.
        begins: Whether its section exists only if this variable is set.
        description: Description with the unit.
        secret: Whether its value is never shown.
        value: Current value as text, masked if it is a secret; None if it is not set.
        source: Where the value comes from; empty for the default.
    """

    name: str
    section: str
    type: str
    default: str | None
    required: bool
    begins: bool
    description: str
    secret: bool
    value: str | None = None
    source: str = ""


def variables(settings_cls: "type[BaseSettings]") -> list[Variable]:
    """Return all variables in the order of the class, with their current values.

    Values are not validated, so this works for invalid settings as well.

    Raises:
        MissingExtraError: A secret in AWS is configured and boto3 is not installed.
    """
    sources = _sources(settings_cls)
    prefix = str(settings_cls.model_config.get("env_prefix", ""))
    redactor = Redactor()
    found = []
    for each in _declared(settings_cls, prefix):
        name = each.name.lower()
        source = next((source for source in sources if name in source.env_vars), None)
        if source is not None:
            value = _MASK if each.secret else redactor.text(str(source.env_vars[name]))
            found.append(replace(each, value=value, source=source.origin))
        else:
            found.append(each)
    return found


def _sources(settings_cls: "type[BaseSettings]") -> "list[VariablesSource]":
    """Return the sources that provide variables, in the order of precedence of the class."""
    from pydantic_settings import (  # noqa: PLC0415 - `--help` does not need it
        DotEnvSettingsSource,
        EnvSettingsSource,
        InitSettingsSource,
        SecretsSettingsSource,
    )

    from fastapi_prodkit.secrets import VariablesSource  # noqa: PLC0415

    sources = settings_cls.settings_customise_sources(
        settings_cls,
        init_settings=InitSettingsSource(settings_cls, init_kwargs={}),
        env_settings=EnvSettingsSource(settings_cls),
        dotenv_settings=DotEnvSettingsSource(settings_cls),
        file_secret_settings=SecretsSettingsSource(settings_cls),
    )
    return [source for source in sources if isinstance(source, VariablesSource)]


def _declared(settings_cls: "type[BaseSettings]", prefix: str) -> Iterator[Variable]:
    for name, own in settings_cls.model_fields.items():
        section = section_of(own)
        if section is None:
            for each in own_names(name, own, prefix):
                yield _variable(each, "", own, always=True)
            continue
        if has_switch(own):
            yield _switch(variable(prefix, name, "enabled"), name, own, section)
        for key, inner in section.model_fields.items():
            yield _variable(variable(prefix, name, key), name, inner, always=not has_switch(own))


def _switch(name: str, section: str, own: FieldInfo, model: type[BaseModel]) -> Variable:
    """Return the on/off variable of a section; for a section without one, the required variable that turns it on."""
    needed = any(inner.is_required() for inner in model.model_fields.values())
    default = None if needed else "false" if own.default is None else "true"
    return Variable(
        name=name,
        section=section,
        type="bool",
        default=default,
        required=False,
        begins=False,
        description=_SWITCH,
        secret=False,
    )


def _variable(name: str, section: str, declared: FieldInfo, *, always: bool) -> Variable:
    return Variable(
        name=name,
        section=section,
        type=_type(declared),
        default=_default(declared),
        required=declared.is_required() and always,
        begins=declared.is_required() and not always,
        description=declared.description or "",
        secret=SecretStr in members(declared),
    )


def _type(declared: FieldInfo) -> str:
    names = []
    for member in members(declared):
        if member is NoneType:
            names.append("none")
        elif get_origin(member) is Literal:
            names += [str(choice) for choice in get_args(member)]
        elif get_origin(member) in (tuple, list, set, frozenset):
            names.append("list")
        else:
            names.append("secret" if member is SecretStr else getattr(member, "__name__", str(member)))
    return " | ".join(names)


def _default(declared: FieldInfo) -> str | None:
    value = declared.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None or isinstance(value, BaseModel):
        return None
    if isinstance(value, SecretStr):
        value = value.get_secret_value()  # a default is in the source code, so it is not secret
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) else json.dumps(plain)
