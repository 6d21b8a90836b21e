"""Assert that the routes of an app are those of its `routes.lock`."""

from pathlib import Path

from starlette.applications import Starlette

from fastapi_prodkit._route_list.check import check_routes
from fastapi_prodkit._route_list.listing import list_routes

__all__ = ["assert_routes_locked"]


def assert_routes_locked(app: Starlette, file: str | Path = "routes.lock", *, strict: bool = False) -> None:
    """Fail if the routes of an app differ from a file, as `fastapi-prodkit routes --check` does.

        def test_routes(app):
            assert_routes_locked(app)

    Args:
        app: The app, as in ENVIRONMENT=test. If its lifespan adds routes, it must have started.
        file: The file, which `fastapi-prodkit routes --write` has written.
        strict: Fail as well if a route has no explicit rule: `public`, `CurrentUser`, or what it requires.

    Raises:
        AssertionError: The message says what has changed, what has opened first, and how to accept it.
    """
    failures = check_routes(list_routes(app), Path(file), strict=strict)
    if failures:
        raise AssertionError("\n".join(map(str, failures)))
