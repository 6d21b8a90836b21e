"""`fastapi-prodkit health URL`: check a service, for Docker's HEALTHCHECK in images without curl."""

import http.client
import os
import urllib.error
import urllib.request
from typing import Annotated

import typer

__all__ = ["app"]

_UNHEALTHY = 1

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def health(
    url: Annotated[
        str | None,
        typer.Argument(
            metavar="URL",
            help="By default http://127.0.0.1:$PORT/health, or the first path of HEALTH_LIVE_PATHS; "
            "PORT is 8000 if not set.",
        ),
    ] = None,
    *,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Time-out of the request, seconds.")] = 3.0,
) -> None:
    """Check that a service is healthy: exit with 0 for a 2xx response, with 1 otherwise.

    In a Dockerfile: HEALTHCHECK CMD ["fastapi-prodkit", "health"].
    """
    path = os.environ.get("HEALTH_LIVE_PATHS", "/health").partition(",")[0].strip()
    target = url or f"http://127.0.0.1:{os.environ.get('PORT', '8000')}{path}"
    if not target.startswith(("http://", "https://")):
        raise typer.BadParameter("write a URL, such as http://127.0.0.1:8000/health")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    try:
        with opener.open(target, timeout=timeout) as response:
            typer.echo(f"{response.status} {response.read(500).decode(errors='replace')}".rstrip())
    except urllib.error.HTTPError as error:
        with error:
            typer.echo(f"{error.code} {error.read(500).decode(errors='replace')}".rstrip(), err=True)
        raise typer.Exit(_UNHEALTHY) from None
    except (OSError, http.client.HTTPException) as error:
        typer.echo(f"no answer: {getattr(error, 'reason', None) or error}", err=True)
        raise typer.Exit(_UNHEALTHY) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that follows no redirects, because another server would answer the probe."""

    def redirect_request(self, *_: object) -> None:
        return None
