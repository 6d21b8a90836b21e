"""The authorization and token endpoints of the test issuer: codes, PKCE, client credentials, and pages of others."""

import json
from base64 import urlsafe_b64encode
from contextlib import closing
from hashlib import sha256
from http.client import HTTPConnection
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from fastapi_prodkit.testing.authorization import AuthorizationServer, Person

VERIFIER = "v" * 43
CHALLENGE = urlsafe_b64encode(sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
REDIRECT_URI = "http://localhost:8000/docs/oauth2-redirect"
ALICE = Person("alice", ("admin",))


@pytest.fixture
def server():
    """A server that makes tokens of readable text, and signs Alice in."""
    server = AuthorizationServer(lambda grant: f"{grant.client} {grant.person and grant.person.sub} {grant.scopes}")
    server.person = ALICE
    return server


@pytest.fixture
def issuer():
    """A test issuer without TLS."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    from fastapi_prodkit.testing import Issuer

    with Issuer(tls=False) as issuer:
        yield issuer


def asking(**changes):
    """Return the query of an authorization request; None leaves a parameter out."""
    parameters = {
        "response_type": "code",
        "client_id": "docs",
        "redirect_uri": REDIRECT_URI,
        "scope": "openid reports:read",
        "state": "s1",
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
    }
    return urlencode({name: value for name, value in (parameters | changes).items() if value is not None})


def exchanging(granted, **changes):
    """Return the form of a token request; None leaves a parameter out."""
    parameters = {
        "grant_type": "authorization_code",
        "code": granted,
        "client_id": "docs",
        "redirect_uri": REDIRECT_URI,
        "code_verifier": VERIFIER,
    }
    return urlencode({name: value for name, value in (parameters | changes).items() if value is not None})


def returned(answer):
    """Return the parameters with which a browser is sent back."""
    assert answer.status == 303
    url = answer.headers["Location"]
    assert url.startswith(f"{REDIRECT_URI}?")
    return {name: value for name, [value] in parse_qs(urlsplit(url).query).items()}


def new_code(server, **changes):
    return returned(server.authorize(asking(**changes)))["code"]


# The authorization code


def test_code_is_exchanged_for_a_token(server):
    """With the state that the client has sent, for all scopes that it has asked for."""
    back = returned(server.authorize(asking()))
    answer = server.token(exchanging(back["code"]))

    assert back.keys() == {"code", "state"}
    assert back["state"] == "s1"
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    assert json.loads(answer.body) == {
        "access_token": "docs alice ('openid', 'reports:read')",
        "token_type": "Bearer",
        "expires_in": 3600,
        "scope": "openid reports:read",
    }


def test_query_of_the_redirect_uri_is_kept(server):
    """RFC 6749 section 3.1.2."""
    answer = server.authorize(asking(redirect_uri=f"{REDIRECT_URI}?x=1", state=None))

    assert returned(answer).keys() == {"x", "code"}


def test_page_signs_in_whoever_is_named(server):
    """The form has the same address, so its query is that of the request."""
    server.person = None
    page = server.authorize(asking(client_id="<docs>"))
    back = returned(server.authorize(asking(), "sub=bob&roles=editor+auditor"))

    assert page.status == 200
    assert b"Sign in to &lt;docs&gt;" in page.body
    assert b'<form method="post">' in page.body
    assert json.loads(server.token(exchanging(back["code"])).body)["access_token"].startswith("docs bob")


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "https://evil.example/callback",
        "http://localhost.evil.example/",
        "http://localhost@evil.example/",
        "javascript:alert(1)",
        "//localhost/callback",
        "http://[::1/callback",
        "http://evil.example\\@localhost/callback",
        "http://localhost/callback\r\nSet-Cookie: a=b",
        "http://localhost/callback#fragment",
    ],
)
def test_no_other_machine_gets_a_code(server, uri):
    """The answer is no redirect (RFC 6749 section 4.1.2.1)."""
    answer = server.authorize(asking(redirect_uri=uri))

    assert answer.status == 400
    assert "Location" not in answer.headers
    assert json.loads(answer.body)["error"] == "invalid_request"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": None}, "invalid_request"),
        ({"client_id": ""}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
    ],
)
def test_wrong_request_returns_an_error_with_the_state(server, changes, error):
    """To the client."""
    back = returned(server.authorize(asking(**changes)))

    assert back.keys() == {"error", "error_description", "state"}
    assert (back["error"], back["state"]) == (error, "s1")


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "unknown"},
        {"client_id": "other"},
        {"redirect_uri": f"{REDIRECT_URI}/"},
        {"code_verifier": "w" * 43},
        {"code_verifier": "short"},
    ],
)
def test_code_is_bound_to_its_request(server, changes):
    """To the client, the redirect_uri and the verifier; the first attempt uses it up."""
    code = new_code(server)
    refused = server.token(exchanging(code, **changes))
    again = server.token(exchanging(code))

    assert refused.status == 400
    assert refused.headers["Cache-Control"] == "no-store"
    assert json.loads(refused.body)["error"] == "invalid_grant"
    assert again.status == (200 if "code" in changes else 400)


def test_answer_without_a_scope_has_none(server):
    """Because there is nothing to say about it."""
    answer = server.token(exchanging(new_code(server, scope=None)))

    assert "scope" not in json.loads(answer.body)


def test_short_verifier_is_refused_even_if_it_fits(server):
    """RFC 7636 section 4.1."""
    challenge = urlsafe_b64encode(sha256(b"short").digest()).rstrip(b"=").decode()

    answer = server.token(exchanging(new_code(server, code_challenge=challenge), code_verifier="short"))

    assert json.loads(answer.body)["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ("", "invalid_request"),
        ("grant_type=password", "unsupported_grant_type"),
        (exchanging("c", code_verifier=None), "invalid_request"),
        (exchanging("c") + "&code=d", "invalid_request"),
    ],
)
def test_wrong_token_request_is_an_error(server, form, error):
    """RFC 6749 section 5.2."""
    answer = server.token(form)

    assert (answer.status, json.loads(answer.body)["error"]) == (400, error)


# On the wire


def call(issuer, method, path, body="", headers=None):
    """Return the status, the headers and the body of an answer."""
    form = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
    with closing(HTTPConnection(urlsplit(issuer.url).netloc)) as connection:
        connection.request(method, path, body, form | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def claims_of(body):
    jwt = pytest.importorskip("jwt")
    return jwt.decode(json.loads(body)["access_token"], options={"verify_signature": False})


def test_client_credentials_are_exchanged_for_a_token(issuer):
    """Of the client itself, or of the person who is named."""
    form = "grant_type=client_credentials"
    own = claims_of(call(issuer, "POST", "/token", form)[2])
    person = claims_of(call(issuer, "POST", "/token", f"{form}&sub=bob&roles=x+y&client_id=cli&scope=a+b")[2])

    assert (own["sub"], own["client_id"], own["roles"], own["scope"]) == ("test-app", "test-app", [], "")
    assert (person["sub"], person["client_id"], person["roles"], person["scope"]) == ("bob", "cli", ["x", "y"], "a b")


def test_issuer_signs_in_on_the_wire(issuer):
    """Its discovery document names the endpoints; without a person it shows the page."""
    discovery = json.loads(call(issuer, "GET", "/.well-known/openid-configuration")[2])
    _, _, page = call(issuer, "GET", f"/authorize?{asking()}")
    issuer.sign_in("bob", roles=["editor"])
    status, headers, _ = call(issuer, "GET", f"/authorize?{asking()}")
    issuer.sign_in(None)
    again, _, _ = call(issuer, "GET", f"/authorize?{asking()}")
    [code] = parse_qs(urlsplit(headers["Location"]).query)["code"]
    claims = claims_of(call(issuer, "POST", "/token", exchanging(code))[2])

    assert discovery["authorization_endpoint"] == f"{issuer.url}/authorize"
    assert discovery["token_endpoint"] == f"{issuer.url}/token"
    assert discovery["code_challenge_methods_supported"] == ["S256"]
    assert b"<button>" in page
    assert (status, again) == (303, 200)
    assert (claims["sub"], claims["roles"], claims["scope"]) == ("bob", ["editor"], "openid reports:read")
    assert issuer.requests[-2:] == ["/authorize", "/token"]


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", "/token", "POST"), ("POST", "/jwks", "GET")])
def test_other_method_is_refused(issuer, method, path, allowed):
    """With the method that works."""
    status, headers, _ = call(issuer, method, path)

    assert (status, headers["Allow"]) == (405, allowed)


def test_body_that_is_no_form_is_not_read(issuer):
    """Such as JSON."""
    form, headers = "grant_type=client_credentials", {"Content-Type": "application/json"}

    status, _, body = call(issuer, "POST", "/token", form, headers)

    assert (status, json.loads(body)["error"]) == (400, "invalid_request")


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/jwks", "/token"])
@pytest.mark.parametrize(
    ("origin", "allowed"), [("http://localhost:8000", True), ("https://evil.example", False), ("null", False)]
)
def test_pages_on_this_machine_may_call_the_issuer(issuer, path, origin, allowed):
    """Other pages may not read its tokens."""
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}

    status, headers, _ = call(issuer, "OPTIONS", path, headers=asked)

    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == (origin if allowed else None)
    assert (headers["Vary"] == "Origin") is allowed
    assert "X-Requested-With" in headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize(
    ("origin", "status"), [("http://localhost:8000", 200), ("http://evil.example", 403), ("null", 403)]
)
def test_pages_of_other_names_get_no_token(issuer, origin, status):
    """A page whose name leads to this machine, by DNS, may read all that it gets, whatever CORS says."""
    form = "grant_type=client_credentials&sub=alice"

    answer = call(issuer, "POST", "/token", form, {"Origin": origin})

    assert (answer[0], b"access_token" in answer[2]) == (status, status == 200)
