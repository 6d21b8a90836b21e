"""`fastapi-prodkit key NAME`: make an API key, and the entry of AUTH_API_KEYS that accepts it."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the program, such as billing.")],
    *,
    scope: Annotated[list[str] | None, typer.Option(metavar="SCOPE", help="What it may do; repeatable.")] = None,
    role: Annotated[list[str] | None, typer.Option(metavar="ROLE", help="A role of the program; repeatable.")] = None,
    days: Annotated[int | None, typer.Option(metavar="DAYS", min=1, max=36_500, help="How long it is valid.")] = None,
) -> None:
    """Make an API key. It is shown once: only its hash is stored.

    The first line of standard output is the key, the second one is the entry. Old keys of the program stay valid until
    their entries are removed.
    """
    from fastapi_prodkit.auth.api_keys import hash_api_key, new_api_key  # noqa: PLC0415 - `--help` does not need it

    made = new_api_key()
    words = [name, hash_api_key(made)]
    words += [f"scope={each}" for each in scope or ()]
    words += [f"role={each}" for each in role or ()]
    if days is not None:
        words.append(f"expires={datetime.now(UTC).date() + timedelta(days=days)}")
    entry = " ".join(words)
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or "," in entry or len(entry.split()) != len(words):
        raise typer.BadParameter("a name has letters, digits, . _ or -; a scope or role has no spaces and no commas")
    typer.echo(made)
    typer.echo(entry)
    typer.echo("The first line is for the program. The second one is an entry of AUTH_API_KEYS.", err=True)
