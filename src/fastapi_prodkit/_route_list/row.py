"""One line of the list."""

from dataclasses import dataclass

__all__ = ["ListedRoute"]


@dataclass(frozen=True)
class ListedRoute:
    """One method of a route. Texts are as in the list; `default` is what the app has for all routes.

    Attributes:
        method: `ANY` for all methods; `WEBSOCKET` for a WebSocket. GET includes HEAD.
        path: With the paths of mounts. It begins with `//` and the host for the routes of a `Host`.
        rule: Who may call it, such as `public`, `any user` or `roles admin or editor; scope reports:write`.
        limit: Its rate limits, such as `default; 5/minute`; or `exempt` from the default one.
        deadline: The longest time until its response starts; empty for a WebSocket.
        body: The largest body of a request; empty for a WebSocket.
        in_schema: Whether it is in the OpenAPI schema of its app.
        hidden: Whether `include_in_schema=False` leaves it out.
        note: What it is, if it is not an ordinary route, such as `app StaticFiles`.
        explicit: Whether the code states its rule; otherwise the rule is that of every route.
        by_settings: Whether settings decide about it, such as a probe and the docs pages.
        source: File and line of its endpoint; its module if the file is not below the current directory.
    """

    method: str
    path: str
    rule: str
    limit: str
    deadline: str
    body: str
    in_schema: bool
    hidden: bool
    note: str
    explicit: bool
    by_settings: bool
    source: str
