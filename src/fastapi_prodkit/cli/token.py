"""`fastapi-prodkit token SUB`: make an access token that the service accepts, for development and tests."""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fastapi_prodkit import _extras
from fastapi_prodkit.exceptions import ConfigurationError

if TYPE_CHECKING:
    from fastapi_prodkit.sections import AuthSettings

__all__ = ["app"]

_MINUTES: Final = 60
_TIMEOUT: Final = 5.0  # seconds for each request to an issuer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def token(
    sub: Annotated[str, typer.Argument(metavar="SUB", help="Id of the caller, such as alice.")],
    *,
    role: Annotated[list[str] | None, typer.Option(metavar="ROLE", help="A role of the caller; repeatable.")] = None,
    scope: Annotated[list[str] | None, typer.Option(metavar="SCOPE", help="A scope of the token; repeatable.")] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="A further claim, or NAME:=JSON; repeatable. With AUTH_SECRET only."),
    ] = None,
    minutes: Annotated[
        int | None,
        typer.Option(metavar="MINUTES", min=1, max=525_600, help="How long it is valid, by default 60."),
    ] = None,
) -> None:
    """Make an access token, in dev and test only. Standard output is the token and nothing else.

    With AUTH_SECRET the token is signed here. With AUTH_ISSUER on this machine the issuer makes it;
    fastapi-prodkit issuer runs one. The settings are read from the environment and the .env files of the directory.
    """
    from fastapi_prodkit.settings import Settings  # noqa: PLC0415 - `--help` does not need it

    settings = Settings()
    if settings.environment not in ("dev", "test"):
        raise ConfigurationError(f"tokens are made in dev and test only, and ENVIRONMENT is {settings.environment}")
    auth = settings.auth
    if auth is None or not (auth.secret or auth.issuer):
        raise ConfigurationError(
            "the service accepts no tokens: set AUTH_SECRET, such as the output of openssl rand -hex 32, or AUTH_ISSUER"
        )
    roles, scopes = role or [], scope or []
    if auth.secret is not None:
        claims = _claims(auth, sub, roles, scopes, minutes or _MINUTES) | _further(claim or [])
        typer.echo(_sign(claims, auth.secret.get_secret_value()))
        return
    if claim or minutes:
        raise ConfigurationError("--claim and --minutes need AUTH_SECRET: the issuer decides about them")
    typer.echo(_request(_issuer_here(auth.issuer), sub, roles, scopes))


def _claims(
    auth: "AuthSettings", sub: str, roles: Sequence[str], scopes: Sequence[str], minutes: int
) -> dict[str, Any]:
    """Return the claims that a service with a shared secret reads."""
    from fastapi_prodkit.auth.presets import SHARED_SECRET, keys_to  # noqa: PLC0415 - `--help` does not need it

    now = int(time.time())
    claims: dict[str, Any] = {"sub": sub, "iat": now, "exp": now + minutes * 60}
    if auth.audience:
        claims["aud"] = auth.audience[0]
    if roles:
        _put(claims, keys_to((auth.roles_claim or SHARED_SECRET.roles)[0]), roles)
    if scopes:
        _put(claims, keys_to((auth.scopes_claim or SHARED_SECRET.scopes)[0]), " ".join(scopes))
    return claims


def _put(claims: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set the claim to which the names lead."""
    *outer, last = keys
    for name in outer:
        claims = claims.setdefault(name, {})
    claims[last] = value


def _further(claims: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in claims:
        written, equals, text = each.partition("=")
        name = written.removesuffix(":")
        if not (name and equals):
            raise typer.BadParameter(f"{each!r} is no claim: write NAME=TEXT, or NAME:=JSON")
        try:
            found[name] = text if name == written else json.loads(text)
        except ValueError:
            raise typer.BadParameter(f"the claim {name} is not JSON: {text!r}") from None
    return found


def _sign(claims: dict[str, Any], secret: str) -> str:
    jwt: Any = _extras.require("jwt", extra="auth")
    signed: str = jwt.encode(claims, secret, algorithm="HS256")
    return signed


def _issuer_here(issuers: Sequence[str]) -> str:
    """Return the first issuer on this machine."""
    from fastapi_prodkit.sections.auth import is_loopback  # noqa: PLC0415 - `--help` does not need it

    for issuer in issuers:
        if is_loopback(urllib.parse.urlsplit(issuer).hostname or ""):
            return issuer
    raise ConfigurationError(
        f"{issuers[0]} makes its tokens itself: sign in with Authorize in /docs, or request one with the client "
        "credentials of an app; without an issuer, try: fastapi-prodkit issuer, or AUTH_SECRET in place of AUTH_ISSUER"
    )


def _request(issuer: str, sub: str, roles: Sequence[str], scopes: Sequence[str]) -> str:
    """Return a token of the issuer, which its token endpoint makes for anybody."""
    endpoint = _json(f"{issuer.rstrip('/')}/.well-known/openid-configuration").get("token_endpoint")
    if not isinstance(endpoint, str) or not endpoint.startswith(f"{issuer.rstrip('/')}/"):
        raise ConfigurationError(f"{issuer} has no token endpoint of its own")
    form = {"grant_type": "client_credentials", "sub": sub, "roles": " ".join(roles), "scope": " ".join(scopes)}
    made = _json(endpoint, urllib.parse.urlencode(form).encode()).get("access_token")
    if not isinstance(made, str):
        raise ConfigurationError(f"{endpoint} has answered without an access_token")
    return made


def _json(url: str, form: bytes | None = None) -> dict[str, Any]:
    """Return the JSON object at a URL on this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, form, timeout=_TIMEOUT) as response:
            content = json.load(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigurationError(f"{url} gives no token: {reason}; is fastapi-prodkit issuer running?") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{url} has answered with something else than a JSON object")
    return content
