"""The errors in the schema, as `add_problem_handlers` sends them."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import BaseRoute

from fastapi_prodkit._problem import MEDIA_TYPE
from fastapi_prodkit.openapi.operation_ids import METHODS, name_operations

__all__ = ["add_problem_schemas"]

_COMPONENTS = "#/components/schemas/"
_FASTAPI_422 = {"application/json": {"schema": {"$ref": f"{_COMPONENTS}HTTPValidationError"}}}

_PROBLEM: dict[str, Any] = {
    "title": "Problem",
    "description": "What went wrong (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "description": "Identifies the kind of problem."},
        "title": {"type": "string", "description": "Names the kind of problem."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599, "description": "The HTTP status code."},
        "detail": {"type": "string", "description": "Explains this occurrence."},
        "instance": {"type": "string", "format": "uri-reference", "description": "The path of the request."},
        "request_id": {"type": "string", "description": "The id under which the service logged the request."},
    },
}
_INVALID_FIELD = {
    "title": "InvalidField",
    "type": "object",
    "required": ["loc", "msg", "type"],
    "properties": {
        "loc": {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            "description": "Where the value is: body, query, path, header or cookie, then the keys that lead to it.",
        },
        "msg": {"type": "string", "description": "What is wrong with the value."},
        "type": {"type": "string", "description": "Identifies the kind of error."},
    },
}
_VALIDATION_PROBLEM = {
    **_PROBLEM,
    "title": "ValidationProblem",
    "description": "The request is not valid for this operation.",
    "required": [*_PROBLEM["required"], "errors"],
    "properties": {**_PROBLEM["properties"], "errors": {"type": "array", "items": _INVALID_FIELD}},
}


def add_problem_schemas(app: FastAPI) -> None:
    """Make the app's schema show errors as `add_problem_handlers` sends them, and keep operation ids apart.

    Each operation gets a `default` response `Problem`, its 422 becomes a `ValidationProblem`, and error responses
    that were declared without content get `Problem`; those with content stay as they are. The `statuses` of a
    dependency, such as a rate limit's 429, are shown on the routes that depend on it. If operations share an id, their
    method is added to it, and their path if it differs. Webhooks stay as they are, because other services answer them.

    This wraps `app.openapi`, even if the app overrides it; call it again if the override is set later. The problems
    are added once to each schema that is built.
    """
    if not isinstance(app.openapi, _ProblemSchema):
        app.openapi = _ProblemSchema(app.openapi, app)  # type: ignore[method-assign] # FastAPI's documented way


class _ProblemSchema:
    """Build the schema with the original function, and add the problems to it once."""

    def __init__(self, build: Callable[[], dict[str, Any]], app: FastAPI) -> None:
        self._build = build
        self._app = app
        self._completed: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate Operation ID")  # name_operations makes the ids unique
            schema = self._build()
        if schema is not self._completed:
            name_operations(schema)
            _declare(schema, self._app.routes)
            _show_problems(schema)
            self._completed = schema
        return schema


def _declare(schema: dict[str, Any], routes: Sequence[BaseRoute]) -> None:
    """Add the responses that dependencies declare in an attribute `statuses`, such as a rate limit's 429."""
    for context in iter_route_contexts(routes):
        if not isinstance(context.original_route, APIRoute):
            continue
        item = schema.get("paths", {}).get(context.path_format, {})
        for operation in (item.get(method.lower()) for method in context.methods or ()):
            for status in _statuses(context.dependant) if operation is not None else ():
                operation["responses"].setdefault(str(status), {"description": HTTPStatus(status).phrase})


def _statuses(dependant: Dependant) -> Iterator[int]:
    yield from getattr(dependant.call, "statuses", ())
    for each in dependant.dependencies:
        yield from _statuses(each)


def _show_problems(schema: dict[str, Any]) -> None:
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    problem = _component(schemas, "Problem", _PROBLEM)
    validation_problem = _component(schemas, "ValidationProblem", _VALIDATION_PROBLEM)
    for item in schema.get("paths", {}).values():
        for method in item.keys() & METHODS:
            responses = item[method].setdefault("responses", {})
            for status, response in responses.items():
                if response.get("content") == _FASTAPI_422:
                    response["content"] = _content(validation_problem)
                elif status[0] in "45" and not response.keys() & {"content", "$ref"}:
                    response["content"] = _content(problem)
            responses.setdefault("default", {"description": "Error", "content": _content(problem)})
    for name in ("HTTPValidationError", "ValidationError"):
        if f'"{_COMPONENTS}{name}"' not in json.dumps(schema):
            schemas.pop(name, None)


def _component(schemas: dict[str, Any], name: str, definition: dict[str, Any]) -> str:
    """Add the definition, under another name if the service has a model of that name, and return its name."""
    if schemas.setdefault(name, copy.deepcopy(definition)) == definition:
        return name
    return _component(schemas, f"Prodkit{name}", definition)


def _content(name: str) -> dict[str, Any]:
    return {MEDIA_TYPE: {"schema": {"$ref": f"{_COMPONENTS}{name}"}}}
