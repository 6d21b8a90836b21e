"""`fastapi-prodkit health URL`: whether a service is well, for Docker's HEALTHCHECK and without curl in the image."""

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
            help="By default http://127.0.0.1:$PORT/health, PORT being 8000 unless it is set; or the first path of "
            "HEALTH_LIVE_PATHS.",
        ),
    ] = None,
    *,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Longest time for the answer, seconds.")
    ] = 3.0,
) -> None:
    """Ask a service whether it is well: exit code 0 for a 2xx, 1 for anything else.

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
    """A probe that is redirected is answered by somebody else."""

    def redirect_request(self, *_: object) -> None:
        return None
