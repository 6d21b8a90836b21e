"""The JSON Schema of a variable: of the text that stands in the environment, whatever is made of it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, ValidationError

__all__ = ["lower_case", "text_schema"]


def _in_any_case(*words: str) -> str:
    spelt = (
        "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in word) for word in words
    )
    return f"({'|'.join(spelt)})"


# What pydantic reads, and no more. ECMA-262 has no flag for upper and lower case that stands in the pattern.
_NONE: Final = rf"^\s*{_in_any_case('none')}\s*$"
_BOOLEAN: Final = f"^{_in_any_case('true', 'false', '1', '0', 'on', 'off', 'yes', 'no', 't', 'f', 'y', 'n')}$"
_DIGITS: Final = "[0-9]+(_[0-9]+)*"
_NUMBERS: Final = {
    "integer": rf"{_DIGITS}(\.0+)?",
    "number": rf"({_DIGITS}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?",
}
_KEPT: Final = ("pattern", "minLength", "maxLength", "format", "writeOnly")  # of a text that stays one
_BOUNDS: Final = {
    "minimum": "At least",
    "exclusiveMinimum": "More than",
    "maximum": "At most",
    "exclusiveMaximum": "Less than",
}


def text_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any], *, or_none: bool) -> dict[str, Any]:
    """Return the schema of the text, in whose description the bounds of a number stand: a text has none.

    Args:
        schema: Of the value that is made of it.
        definitions: What it refers to.
        or_none: Whether the word `none` is read as no value.
    """
    values = [_resolved(each, definitions) for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    texts = [_text(each) for each in values] + ([{"pattern": _NONE}] if or_none else [])
    bounds = " ".join(dict.fromkeys(bound for each in values for bound in _bounds(each)))
    described = {"description": bounds} if bounds else {}
    if len(texts) == 1:
        return {"type": "string", **texts[0], **described}
    return {"type": "string", **({"anyOf": texts} if all(texts) else {}), **described}


def lower_case(schema: Mapping[str, Any], section: type[BaseModel], key: str) -> dict[str, Any]:
    """Add the choices in lower case that the section takes as well."""
    lowered = [each.lower() for each in schema.get("enum", ()) if isinstance(each, str) and each != each.lower()]
    more = [choice for choice in lowered if _takes(section, key, choice)]
    return {**schema, "enum": [*schema["enum"], *more]} if more else dict(schema)


def _takes(section: type[BaseModel], key: str, value: str) -> bool:
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return all(details["loc"][:1] != (key,) for details in error.errors())
    return True


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else definitions[reference.rpartition("/")[2]]


def _text(schema: Mapping[str, Any]) -> dict[str, Any]:
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices:
        return {"enum": [each if isinstance(each, str) else json.dumps(each) for each in choices]}
    match schema.get("type"):
        case "boolean":
            return {"pattern": _BOOLEAN}
        case "integer" | "number" as kind:
            lowest = schema.get("exclusiveMinimum", schema.get("minimum", -1))
            return {"pattern": rf"^\s*{'[+-]?' if lowest < 0 else '[+]?'}{_NUMBERS[kind]}\s*$"}
        case "string":
            return {name: schema[name] for name in _KEPT if name in schema}
        case "object":
            return {"contentMediaType": "application/json"}
    return {}  # a list, which is JSON or has commas, or anything at all


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, words in _BOUNDS.items():
        if name in schema:
            bound = schema[name]
            yield f"{words} {int(bound) if bound == int(bound) else bound}."
