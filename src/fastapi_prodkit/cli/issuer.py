"""`fastapi-prodkit issuer`: run an OpenID issuer on this machine, for development."""

from contextlib import ExitStack, suppress
from threading import Event
from typing import Annotated

import typer

from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections.auth import PresetName

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def issuer(
    *,
    port: Annotated[
        int, typer.Option(metavar="NUMBER", min=0, max=65535, help="Port on 127.0.0.1; 0 is a free one.")
    ] = 9000,
    preset: Annotated[PresetName, typer.Option(help="Whose tokens are imitated.")] = "standard",
    audience: Annotated[str, typer.Option(metavar="NAME", help="Name of the API, in the tokens.")] = "test-api",
) -> None:
    """Run an OpenID issuer until Ctrl-C, for development without a network. It gives a token to everybody who asks.

    Standard output has the variables with which a service accepts its tokens. Then fastapi-prodkit token makes a token,
    and Authorize in /docs signs in. The issuer has new keys at each start, which a service notices within a minute.
    """
    from fastapi_prodkit.testing import Issuer  # noqa: PLC0415 - an extra

    with ExitStack() as stack, suppress(KeyboardInterrupt):
        try:
            running = stack.enter_context(Issuer(preset, audience=audience, tls=False, port=port))
        except OSError as error:
            raise ConfigurationError(f"port {port} cannot be used: {error.strerror}; try another --port") from error
        typer.echo(f"AUTH_ISSUER={running.url}\nAUTH_AUDIENCE={audience}\nAUTH_PRESET={preset}")
        typer.echo("Serving until Ctrl-C. With these variables, try: fastapi-prodkit token alice", err=True)
        Event().wait()  # for a signal, which raises here
