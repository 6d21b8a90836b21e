"""Rate limits as decorators: the arguments of a decorator, and the wrapper that counts before the endpoint runs."""

import functools
import inspect
import re
from collections.abc import Callable, Coroutine, Mapping
from inspect import Parameter
from typing import Any, NamedTuple

from anyio import from_thread
from fastapi import Depends
from starlette.requests import HTTPConnection
from starlette.responses import Response

from fastapi_prodkit import _scope
from fastapi_prodkit._pipeline.exchange import Exchange
from fastapi_prodkit.rate_limit.endpoints import is_limited, limited_elsewhere
from fastapi_prodkit.rate_limit.keys import bounded
from fastapi_prodkit.rate_limit.limits import Limit, add_quota_headers, checked_cost, cost_of, parse_limits, text_of

__all__ = ["DecoratedLimit", "Hit", "decorate", "decorated_limits"]

# Parameters that the wrapper adds if the endpoint does not have them.
_CONNECTION, _RESPONSE, _CHECK = "prodkit_connection", "prodkit_response", "prodkit_check"

CountHit = Callable[[HTTPConnection, "Hit"], Coroutine[Any, Any, None]]
FindHit = Callable[[HTTPConnection | None], "Hit | None"]


class Hit(NamedTuple):
    """What a decorator counts for one request: limits, the text of the limits, key and cost."""

    limits: list[Limit]
    key: str
    cost: int
    text: str


class DecoratedLimit:
    """The arguments of one decorator.

    Args:
        options: The arguments that were passed, by slowapi's names. The limit is a text, or a function that returns a
            text; if the function has a parameter `key`, it is called with the key.
        owner: Name of what the limit belongs to: an endpoint, or a scope of several endpoints.
        name: Name in headers and problems, used if it is a valid header value.
        endpoint: The endpoint.
        known: All limits of the limiter, by id.

    Raises:
        ConfigurationError: The limit cannot be read, or its cost is negative or not an integer.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        owner: str,
        name: str | None,
        endpoint: Any,
        known: dict[str, Limit],
    ) -> None:
        before = sum(each.size for each in _rules_of(endpoint))
        self.owner = owner
        self.options = options
        self._name = name if name and re.fullmatch(r"[A-Za-z0-9_.:-]+", name) else f"route-{before + 1}"
        self._name = "route" if self._name == "route-1" else self._name
        self._value = value = options["limit_value"]
        self._known = known
        self._read: dict[tuple[str, str], list[Limit]] = {}
        self._by_key = callable(value) and "key" in inspect.signature(value).parameters
        self._key_takes = _takes_request(options["key_func"])
        self._exempt_when = options.get("exempt_when")
        self._exempt_takes = self._exempt_when is not None and len(inspect.signature(self._exempt_when).parameters) == 1
        self._cost = checked_cost(options.get("cost", 1))
        self._methods = {method.upper() for method in options["methods"]} if options.get("methods") else None
        self.size: int = 1 if callable(value) else len(self._limits(value, owner))

    def hit(self, connection: HTTPConnection) -> Hit | None:
        """Return limits, key and cost for a request; None if the decorator does not apply to the request."""
        method = connection.scope.get("method", "WEBSOCKET")
        if not self.applies_to(method):
            return None
        if self._exempt_when is not None and self._exempt_when(*[connection] * self._exempt_takes):
            return None
        key = self.options["key_func"](*[connection] * self._key_takes)
        if not key:
            return None
        text = self._value if isinstance(self._value, str) else self._value(*[key] * self._by_key)
        owner = f"{self.owner}:{method}" if self.options.get("per_method") else self.owner
        cost = cost_of(self._cost(connection)) if callable(self._cost) else self._cost
        return Hit(self._limits(text, owner), bounded(key), cost, text)

    def applies_to(self, method: str) -> bool:
        """Return whether the decorator applies to requests of a method."""
        return self._methods is None or method in self._methods

    def __str__(self) -> str:
        """Return the limits, such as `2/second; 100/hour`, or the name of the function that returns them."""
        return f"{self._value.__name__}()" if callable(self._value) else text_of(self._limits(self._value, self.owner))

    def message(self) -> str | None:
        """Return the decorator's error message for refused requests, if it has one."""
        message: str | Callable[[], str] | None = self.options.get("error_message")
        return message() if callable(message) else message

    def as_slowapi_limit(self, kind: Callable[..., Any], item: Any) -> Any:
        """Return slowapi's `Limit` object; `kind` is its class, passed in so that this module needs no slowapi."""
        given = self.options.get
        return kind(
            item,
            given("key_func"),
            self.owner,
            given("per_method", False),
            given("methods"),
            given("error_message"),
            given("exempt_when"),
            given("cost", 1),
            given("override_defaults", False),
        )

    def _limits(self, text: str, owner: str) -> list[Limit]:
        limits = self._read.get((text, owner))
        if limits is None:
            made = parse_limits(text, name=self._name, owner=owner)
            limits = self._read[text, owner] = [self._known.setdefault(limit.id, limit) for limit in made]
        return limits


def decorate(endpoint: Any, rule: DecoratedLimit, count: CountHit, enabled: Callable[[], bool]) -> Any:
    """Return the endpoint, wrapped so that its limit is checked before it runs.

    Args:
        endpoint: A function, async or not, or a generator function.
        rule: The limit.
        count: Counts a request; raises if the request is over the limit.
        enabled: Returns whether limits are checked.
    """

    def hit(connection: HTTPConnection | None) -> Hit | None:
        return rule.hit(connection) if connection is not None and enabled() and is_limited(limited) else None

    inner = inspect.unwrap(endpoint)
    if inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
        limited = _yielding(endpoint, hit, count)
    elif inspect.iscoroutinefunction(endpoint) or inspect.iscoroutinefunction(inner):
        limited = _async(endpoint, hit, count)
    else:
        limited = _in_thread(endpoint, hit, count)
    vars(limited).update(
        {_scope.ENDPOINT_LIMITS: (*_rules_of(endpoint), rule), "statuses": (429,)}
    )  # the schema shows the statuses
    limited_elsewhere(endpoint, limited)
    return limited


def decorated_limits(endpoint: Any, method: str) -> list[DecoratedLimit]:
    """Return the limits that decorators have put on an endpoint, for requests of a method."""
    rules = _rules_of(endpoint)
    return [each for each in rules if each.applies_to(method) and is_limited(endpoint)]


def _rules_of(endpoint: Any) -> tuple[DecoratedLimit, ...]:
    found: tuple[DecoratedLimit, ...] = getattr(endpoint, _scope.ENDPOINT_LIMITS, ())
    return found


def _async(endpoint: Any, hit: FindHit, count: CountHit) -> Any:
    parameters = _Parameters(endpoint)

    @functools.wraps(endpoint)
    async def limited(*args: Any, **kwargs: Any) -> Any:
        connection, response = parameters.take(args, kwargs)
        found = hit(connection)
        if connection is None or found is None:
            return await endpoint(*args, **kwargs)
        await count(connection, found)
        return _with_headers(connection, response, await endpoint(*args, **kwargs))

    return parameters.show(limited)


def _in_thread(endpoint: Any, hit: FindHit, count: CountHit) -> Any:
    parameters = _Parameters(endpoint)

    @functools.wraps(endpoint)
    def limited(*args: Any, **kwargs: Any) -> Any:
        connection, response = parameters.take(args, kwargs)
        found = hit(connection)  # in this thread, because the decorator's functions may block
        if connection is None or found is None:
            return endpoint(*args, **kwargs)
        from_thread.run(count, connection, found)
        return _with_headers(connection, response, endpoint(*args, **kwargs))

    return parameters.show(limited)


def _yielding(endpoint: Any, hit: FindHit, count: CountHit) -> Any:
    """Limit a generator endpoint by a dependency: when the generator itself runs, the response has started already."""

    async def check(connection: HTTPConnection, response: Response) -> None:
        found = hit(connection)
        if found is not None:
            await count(connection, found)
            _with_headers(connection, response, None)

    signature = inspect.signature(endpoint)
    name = f"{_CHECK}_{len(signature.parameters)}"

    @functools.wraps(endpoint)
    def limited(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return endpoint(*args, **kwargs)

    return _show(limited, signature, [Parameter(name, Parameter.KEYWORD_ONLY, default=Depends(check))])


class _Parameters:
    """The endpoint's parameters for the connection and the response; those that are missing are added."""

    def __init__(self, endpoint: Any) -> None:
        self._signature = _signature(endpoint)
        connection = _find(self._signature, HTTPConnection, {"request", "websocket"})
        response = _find(self._signature, Response, set())
        self._connection = connection or _CONNECTION
        self._response = response or _RESPONSE
        self._position = list(self._signature.parameters).index(connection) if connection else -1
        self._added = [
            Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind)
            for name, kind, found in ((_CONNECTION, HTTPConnection, connection), (_RESPONSE, Response, response))
            if found is None
        ]

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[HTTPConnection | None, Response | None]:
        """Return connection and response, and remove added arguments; None if the endpoint was called directly."""
        connection, response = kwargs.get(self._connection), kwargs.get(self._response)
        for parameter in self._added:
            kwargs.pop(parameter.name, None)
        if connection is None and 0 <= self._position < len(args):
            connection = args[self._position]
        return connection if isinstance(connection, HTTPConnection) else None, response

    def show(self, limited: Any) -> Any:
        """Give the wrapper a signature with both parameters, so that FastAPI passes them."""
        return _show(limited, self._signature, self._added)


def _show(limited: Any, signature: inspect.Signature, added: list[Parameter]) -> Any:
    # `**kwargs` must stay the last parameter.
    own = list(signature.parameters.values())
    rest = [own.pop()] if own and own[-1].kind is Parameter.VAR_KEYWORD else []
    limited.__signature__ = signature.replace(parameters=[*own, *added, *rest])
    return limited


def _signature(endpoint: Any) -> inspect.Signature:
    try:
        return inspect.signature(endpoint, eval_str=True)
    except NameError:  # an annotation that is imported for type checkers only
        return inspect.signature(endpoint)


def _find(signature: inspect.Signature, kind: type, names: set[str]) -> str | None:
    """Return the parameter annotated with `kind`, or else an unannotated parameter with one of `names`."""
    for name, parameter in signature.parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, type) and issubclass(annotation, kind) and annotation is not Parameter.empty:
            return name
    for name, parameter in signature.parameters.items():
        if name in names and (parameter.annotation is Parameter.empty or isinstance(parameter.annotation, str)):
            return name
    return None


def _takes_request(function: Callable[..., Any]) -> bool:
    """Return whether a key function takes the request: it has such a parameter, or requires an argument."""
    parameters = inspect.signature(function).parameters.values()
    return any(
        each.name == "request" or (each.default is Parameter.empty and each.kind <= Parameter.POSITIONAL_OR_KEYWORD)
        for each in parameters
    )


def _with_headers(connection: HTTPConnection, response: Response | None, result: Any) -> Any:
    """Add the headers to the response if there is no exchange to send them; return the result."""
    response = result if isinstance(result, Response) else response
    if response is not None and Exchange.innermost(connection.scope) is None:
        headers = add_quota_headers(connection.scope, [])
        response.headers.update({name.decode(): value.decode() for name, value in headers.items()})
    return result
