"""API docs that work offline under a strict Content-Security-Policy, and a schema that generates good clients.

Three independent parts: `docs_router` serves Swagger UI from the package `fastapi-swagger`, `operation_id` names the
operations, and `add_problem_schemas` makes the schema show errors as they are sent. There is no ReDoc: it needs
workers and styles that a strict policy forbids, and shows nothing that Swagger UI does not.
"""

from fastapi_prodkit.openapi.operation_ids import operation_id
from fastapi_prodkit.openapi.problem_schemas import add_problem_schemas
from fastapi_prodkit.openapi.swagger_ui import docs_router

__all__ = ["add_problem_schemas", "docs_router", "operation_id"]
