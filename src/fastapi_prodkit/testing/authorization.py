"""The authorization and the token endpoint of the test issuer: OAuth 2.0 (RFC 6749) with PKCE (RFC 7636).

There are no clients to register, and no passwords: every client id is known, and whoever signs in is believed. So the
issuer gives codes only to pages on this machine, which are the only ones that may read its tokens, too.
"""

import html
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi_prodkit.auth.proof_keys import base64url_sha256
from fastapi_prodkit.sections.auth import is_loopback
from fastapi_prodkit.testing.issuer_server import Answer
from fastapi_prodkit.testing.token_shapes import LIFETIME

__all__ = ["AuthorizationServer", "Grant", "Person", "is_on_this_machine"]

_CHALLENGE: Final = r"[A-Za-z0-9_-]{43}"  # a SHA-256 in base64url
_URL: Final = r"https?://[A-Za-z0-9.:\[\]-]+([/?#][!-\[\]-~]*)?"  # for a browser a backslash ends the host
_VERIFIER: Final = r"[A-Za-z0-9._~-]{43,128}"  # RFC 7636 section 4.1
_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Test issuer</title>
<h1>Sign in to {client}</h1>
<form method="post">
<p><label>Name <input name="sub" value="alice" required autofocus></label></p>
<p><label>Roles, between spaces <input name="roles"></label></p>
<p><button>Sign in</button></p>
</form></html>
"""


class Person(NamedTuple):
    """Who signs in.

    Attributes:
        sub: Their id.
        roles: Their roles.
    """

    sub: str
    roles: tuple[str, ...]


class Grant(NamedTuple):
    """What an access token is made for.

    Attributes:
        person: Who has signed in; None for a token of the client itself.
        client: Its client id.
        scopes: All that the client has asked for.
    """

    person: Person | None
    client: str
    scopes: tuple[str, ...]


class _Code(NamedTuple):
    grant: Grant
    redirect_uri: str
    challenge: str


class _OAuthError(Exception):
    """An error response (RFC 6749 sections 4.1.2.1 and 5.2)."""

    def __init__(self, code: str, description: str) -> None:
        super().__init__(description)
        self.members = {"error": code, "error_description": description}


class AuthorizationServer:
    """Answer requests to `/authorize` and `/token`.

    Args:
        make_token: Returns the access token of a grant.

    Attributes:
        person: Signs in without the page; None shows the page.
    """

    def __init__(self, make_token: Callable[[Grant], str]) -> None:
        self.person: Person | None = None
        self._make_token = make_token
        self._codes: dict[str, _Code] = {}

    def authorize(self, query: str, form: str = "") -> Answer:
        """Redirect with a code, or show the page on which a person signs in; errors are as in section 4.1.2.1."""
        try:
            parameters = _read(query)
            redirect_uri = _required(parameters, "redirect_uri")
            if not is_on_this_machine(redirect_uri) or "#" in redirect_uri:
                raise _OAuthError("invalid_request", "redirect_uri must be a URL of this machine without a fragment")
        except _OAuthError as error:  # there is no URL to which it may be sent
            return Answer.of_json(400, error.members)
        state = {name: parameters[name] for name in parameters.keys() & {"state"}}
        try:
            challenge = _challenge_of(parameters)
            client = _required(parameters, "client_id")
            person = self.person or _person(_read(form))
        except _OAuthError as error:
            return _redirect(redirect_uri, error.members | state)
        if person is None:
            return Answer(200, {"Content-Type": "text/html"}, _PAGE.format(client=html.escape(client)).encode())
        code = secrets.token_urlsafe(32)
        self._codes[code] = _Code(Grant(person, client, _words(parameters, "scope")), redirect_uri, challenge)
        return _redirect(redirect_uri, {"code": code} | state)

    def token(self, form: str) -> Answer:
        """Exchange a code, or client credentials, for an access token; errors are as in section 5.2.

        With client credentials, `sub` and `roles` ask for the token of a person.
        """
        try:
            grant = self._granted(_read(form))
        except _OAuthError as error:
            return Answer.of_json(400, error.members, Cache_Control="no-store")
        content = {"access_token": self._make_token(grant), "token_type": "Bearer", "expires_in": LIFETIME}
        if grant.scopes:
            content["scope"] = " ".join(grant.scopes)
        return Answer.of_json(200, content, Cache_Control="no-store")

    def _granted(self, form: Mapping[str, str]) -> Grant:
        kind = _required(form, "grant_type")
        if kind == "client_credentials":
            return Grant(_person(form), form.get("client_id", "test-app"), _words(form, "scope"))
        if kind != "authorization_code":
            raise _OAuthError("unsupported_grant_type", "use authorization_code or client_credentials")
        names = ("code", "client_id", "redirect_uri", "code_verifier")
        code, client, redirect_uri, verifier = (_required(form, name) for name in names)
        issued = self._codes.pop(code, None)  # a code is used up by the first attempt
        if issued is None or (issued.grant.client, issued.redirect_uri) != (client, redirect_uri):
            raise _OAuthError("invalid_grant", "the code is unknown, used, or of another client or redirect_uri")
        if not re.fullmatch(_VERIFIER, verifier) or base64url_sha256(verifier.encode()) != issued.challenge:
            raise _OAuthError("invalid_grant", "the code_verifier does not fit the code_challenge")
        return issued.grant


def is_on_this_machine(url: str) -> bool:
    """Return whether a URL, or an origin, is one of this machine, and browsers cannot read it as another one."""
    try:
        return re.fullmatch(_URL, url) is not None and is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _challenge_of(parameters: Mapping[str, str]) -> str:
    if _required(parameters, "response_type") != "code":
        raise _OAuthError("unsupported_response_type", "use response_type=code")
    if parameters.get("code_challenge_method") != "S256":
        raise _OAuthError("invalid_request", "PKCE is required: use code_challenge_method=S256")
    challenge = _required(parameters, "code_challenge")
    if not re.fullmatch(_CHALLENGE, challenge):
        raise _OAuthError("invalid_request", "code_challenge is not a SHA-256 in base64url")
    return challenge


def _read(text: str) -> dict[str, str]:
    """Read a query or a form; a parameter without a value counts as left out (RFC 6749 section 3.1)."""
    pairs = parse_qsl(text)
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise _OAuthError("invalid_request", "a parameter is repeated")
    return parameters


def _required(parameters: Mapping[str, str], name: str) -> str:
    if name not in parameters:
        raise _OAuthError("invalid_request", f"{name} is missing")
    return parameters[name]


def _words(parameters: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(parameters.get(name, "").split())


def _person(form: Mapping[str, str]) -> Person | None:
    return Person(form["sub"], _words(form, "roles")) if "sub" in form else None


def _redirect(url: str, parameters: Mapping[str, str]) -> Answer:
    separator = "&" if "?" in url else "?"
    return Answer(303, {"Location": f"{url}{separator}{urlencode(parameters)}", "Cache-Control": "no-store"})
