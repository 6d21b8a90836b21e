"""What the OpenAPI document of an app says about authentication: how to send credentials, and where they are needed.

`guard_routes` adds it, so that the document says of each operation what the guard decides:

    operation        security                                        responses
    public           []
    caller optional  none, or each scheme that `Auth` accepts        401
    any caller       each scheme, without scopes                     401
    roles, scopes    each scheme, with the scopes                    401, 403

What an operation declares by FastAPI's own security classes is needed as well.

An issuer is described by the address of its discovery document alone (`openIdConnect`): clients find its endpoints
there, and no schema waits for an issuer.
"""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, Final

from fastapi import FastAPI

from fastapi_prodkit._asgi import walk_dependencies
from fastapi_prodkit._routing.fastapi_routes import Entry, entries_of
from fastapi_prodkit.auth.authenticator import Auth
from fastapi_prodkit.auth.fetching import discovery_url
from fastapi_prodkit.auth.rules import Requirement, Rule, rule_of

__all__ = ["add_security_schemes"]

_TOKEN: Final = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "An access token, in `Authorization: Bearer ...`.",
}
_BOUND_TOKEN: Final = {
    "type": "http",
    "scheme": "DPoP",
    "description": "An access token that is bound to a key, in `Authorization: DPoP ...`, with a proof in `DPoP`.",
}
_API_KEY: Final = {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."}
_CHALLENGE: Final = {
    "description": "Which credentials are accepted, and why those that were sent are not (RFC 6750 section 3).",
    "schema": {"type": "string"},
}


def add_security_schemes(app: FastAPI, auth: Auth[Any]) -> None:
    """Make the OpenAPI document of a guarded app say who may call each operation.

        app.openapi = custom_openapi
        add_security_schemes(app, app.state.auth)

    `guard_routes` does it. It wraps `app.openapi`, even if the app overrides it; call it again if the override is set
    later. A schema is changed once, whenever it is built.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        schema = build()
        _describe(schema, app, auth)
        return schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way


def _describe(schema: dict[str, Any], app: FastAPI, auth: Auth[Any]) -> None:
    components = schema.setdefault("components", {})
    known = components.setdefault("securitySchemes", {})
    ours = {name if known.get(name, scheme) == scheme else f"Prodkit{name}": scheme for name, scheme in _schemes(auth)}
    if known.items() >= ours.items():  # the schema is the one that was described before
        return
    known.update(ours)
    components.setdefault("headers", {}).setdefault("WWW-Authenticate", {**_CHALLENGE})
    for (path, method), (route, rule) in _rules(entries_of(app.router.routes), auth).items():
        operation = schema.get("paths", {}).get(path, {}).get(method.lower())
        if operation is not None:
            _describe_operation(operation, route, rule, ours)


def _schemes(auth: Auth[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if "bearer" in auth.schemes:
        yield "AccessToken", {**_TOKEN}
        for number, issuer in enumerate(auth.issuers, start=1):
            scheme = {"type": "openIdConnect", "openIdConnectUrl": discovery_url(issuer), "description": "Sign in."}
            yield f"SignIn{number if number > 1 else ''}", scheme
    if "dpop" in auth.schemes:
        yield "BoundToken", {**_BOUND_TOKEN}
    if "apikey" in auth.schemes:
        yield "ApiKey", {**_API_KEY}


def _rules(entries: Iterable[Entry], auth: Auth[Any]) -> dict[tuple[str | None, str], tuple[Any, Rule]]:
    """Return the route and its rule by path and method; of several routes the first, which is the one that serves."""
    rules: dict[tuple[str | None, str], tuple[Any, Rule]] = {}
    found = True  # whether the guard finds the route: not what comes after one that only the router knows
    for entry in entries:
        found = found and entry.asked is not None
        route = entry.asked or entry.chosen
        rule = rule_of(route, entry.routers, auth.default)
        if rule.public and not found:
            rule = Rule(public=False, required=(), caller=auth.default)
        for method in getattr(route, "methods", None) or ():
            rules.setdefault((entry.template, method), (route, rule))
    return rules


def _describe_operation(operation: dict[str, Any], route: Any, rule: Rule, schemes: Iterable[str]) -> None:
    own = operation.setdefault("security", [])  # what dependencies of FastAPI's security classes have declared
    calls = list(walk_dependencies(getattr(route, "dependant", None)))
    needs_caller = rule.caller == "required" or any(_is(Auth.current_user, each) for each in calls)
    if not needs_caller and rule.caller == "ignored" and not any(_is(Auth.authenticate, each) for each in calls):
        return
    ours = [{name: scopes} for scopes in _scopes(rule.required) for name in schemes]
    anonymous: list[dict[str, list[str]]] = [] if needs_caller else [{}]
    operation["security"] = [{**theirs, **each} for each in (*anonymous, *ours) for theirs in own or [{}]]
    _add_response(operation, 401, "There are no credentials, or they are refused.", challenges=True)
    if rule.required:
        wanted = " and ".join(f"the {each}" for each in rule.required)
        needs_scope = any(each.kind == "scope" for each in rule.required)
        _add_response(operation, 403, f"The caller does not have {wanted}.", challenges=needs_scope)


def _is(method: Any, dependency: Any) -> bool:
    """Return whether a dependency is this method of an `Auth`."""
    return getattr(dependency, "__func__", None) is method


def _scopes(required: Iterable[Requirement]) -> Iterator[list[str]]:
    """Yield each set of scopes that is enough."""
    choices = [
        [each.names] if each.match == "all" else [{name} for name in sorted(each.names)]
        for each in required
        if each.kind == "scope"
    ]
    for chosen in product(*choices):
        yield sorted(frozenset().union(*chosen))


def _add_response(operation: dict[str, Any], status: int, description: str, *, challenges: bool) -> None:
    """Describe a response, unless the operation does; its content is that of all other errors."""
    responses = operation.setdefault("responses", {})
    response = responses.setdefault(str(status), {"description": description})
    if "$ref" in response:
        return
    if challenges:
        response.setdefault("headers", {})["WWW-Authenticate"] = {"$ref": "#/components/headers/WWW-Authenticate"}
    if "content" in responses.get("default", {}):
        response.setdefault("content", {**responses["default"]["content"]})
