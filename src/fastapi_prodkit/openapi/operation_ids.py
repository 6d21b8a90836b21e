"""The names of operations, after which client generators name methods."""

import re
from enum import Enum
from typing import Any

from fastapi.routing import APIRoute

__all__ = ["METHODS", "name_operations", "operation_id"]

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")  # OpenAPI 3.1.1, section 4.8.9


def operation_id(route: APIRoute) -> str:
    """Name an operation `{first tag}_{function name}`, such as `items_create`; without a tag, by its function.

    Pass it as `FastAPI(generate_unique_id_function=operation_id)`. Client generators name methods after operations. The
    name does not contain the path, so a change of the path does not change it. The tags of the outermost
    `include_router` come first, so tags on the routers are enough to keep equal function names apart.
    """
    words = [word.value if isinstance(word, Enum) else word for word in route.tags[:1]]
    return "_".join(re.sub(r"\W+", "_", word).strip("_") for word in [*map(str.lower, words), route.name])


def name_operations(schema: dict[str, Any]) -> None:
    """Make operation ids unique: add the method, and the path if operations of one id have different paths.

    All operations of one id get the longer name, so that no name depends on their order.
    """
    places = [
        (path, method, item[method])
        for path, item in schema.get("paths", {}).items()
        for method in METHODS
        if "operationId" in item.get(method, {})
    ]
    paths: dict[str, list[str]] = {}
    for path, _, operation in places:
        paths.setdefault(operation["operationId"], []).append(path)
    for path, method, operation in places:
        name = operation["operationId"]
        if len(paths[name]) > 1:
            where = "" if len(set(paths[name])) == 1 else "_" + re.sub(r"\W+", "_", path).strip("_")
            operation["operationId"] = f"{name}{where}_{method}"
