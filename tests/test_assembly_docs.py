"""Who may open the docs pages of an app, and how they sign people in."""

import json
import re
import time
from base64 import b64encode

import pytest
from browser import driven_tab, needs_browser
from fastapi import Depends, Request
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from wire import serving

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit._route_list.listing import list_routes
from fastapi_prodkit.auth import CurrentUser, hash_api_key, new_api_key, require_scopes
from fastapi_prodkit.sections import AuthSettings

TOKEN = "a-long-pässword:with-a-colon"
KEY = new_api_key()
CALLER = {"X-API-Key": KEY}
KEYS = AuthSettings(api_keys=(f"bot {hash_api_key(KEY)} scope=reports:read",))
PATHS = ("/docs", "/docs/oauth2-redirect", "/docs/assets/swagger-ui.css", "/openapi.json")


def basic(password, user="anyone"):
    return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}


def client_of(environment="prod", docs=None, registry=None, **sections):
    """Return a client of an app with docs."""
    settings = Settings(
        environment=environment,
        docs={"token": TOKEN} if docs is None else docs,
        hosts={"allowed": ["testserver"]},
        metrics=None,
        **sections,
    )
    return TestClient(create_app(settings, registry=registry or CollectorRegistry()))


def statuses(client, headers=None):
    return [client.get(path, headers=headers).status_code for path in PATHS]


# The password


@pytest.mark.parametrize("sections", [{}, {"auth": KEYS}], ids=["without auth", "with auth"])
@pytest.mark.parametrize("environment", ["staging", "prod"])
def test_docs_ask_for_the_password(environment, sections):
    """A browser shows a dialog for it; the name of the user does not matter."""
    client = client_of(environment, **sections)

    refused = client.get("/docs")

    assert statuses(client) == [401] * 4
    assert refused.headers["www-authenticate"] == 'Basic realm="docs", charset="UTF-8"'
    assert refused.headers["content-type"] == "application/problem+json"
    assert statuses(client, basic(TOKEN)) == statuses(client, basic(TOKEN, user="")) == [200] * 4


@pytest.mark.parametrize(
    "value",
    [
        basic("wrong")["Authorization"],
        basic("")["Authorization"],
        basic(f"{TOKEN} ")["Authorization"],
        basic(TOKEN.partition(":")[0])["Authorization"],
        f"Basic {b64encode(TOKEN.encode()).decode()}",  # without a user, the part behind the colon is the password
        f"Basic {b64encode(TOKEN.partition(':')[0].encode()).decode()}",
        "Basic",
        "Basic ",
        "Basic ????",
        "Basic =",
        f"Basic {basic(TOKEN)['Authorization']}",
    ],
)
@pytest.mark.parametrize("sections", [{}, {"auth": KEYS}], ids=["without auth", "with auth"])
def test_wrong_password_is_refused(value, sections):
    """However it is sent."""
    client = client_of(**sections)

    response = client.get("/openapi.json", headers={"Authorization": value})

    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize("scheme", ["Bearer", "ApiKey", "Digest"])
def test_password_of_another_scheme_is_not_read(scheme):
    """It is none of Basic's."""
    client = client_of()

    assert client.get("/docs", headers={"Authorization": f"{scheme} token".encode()}).status_code == 401
    assert client.get("/docs", headers={"Authorization": f"{scheme} {TOKEN}".encode()}).status_code == 401


def test_wrong_passwords_are_logged_counted_and_limited(caplog, capsys):
    """Like other tokens of operators, and without any part of them; a request without one is not counted."""
    registry = CollectorRegistry()
    client = client_of(registry=registry)
    capsys.readouterr()

    client.get("/docs")
    guesses = [client.get("/docs", headers=basic("a-guess")).status_code for _ in range(11)]
    right = client.get("/docs", headers=basic(TOKEN))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert guesses == [401] * 10 + [429]
    assert (right.status_code, "retry-after" in right.headers) == (429, True)
    assert registry.get_sample_value("http_server_refused_tokens_total", {"http_route": "/docs"}) == 12
    warnings = [each.getMessage() for each in caplog.records if each.name == "fastapi_prodkit.tokens"]
    assert warnings == ["/docs: a request of testclient had a wrong token"] * 10
    reasons = [line.get("reason") for line in lines if line["event"] == "request"]
    assert reasons[1:11] == ["the token is wrong"] * 10
    assert "a-guess" not in str(lines)
    assert b64encode(b"anyone:a-guess").decode() not in str(lines)


def test_caller_of_the_app_opens_the_docs(capsys):
    """Without the password, as before; the access line names the caller."""
    client = client_of(auth=KEYS)
    capsys.readouterr()

    served = statuses(client, CALLER)
    refused = client.get("/openapi.json", headers={"X-API-Key": "wrong"})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert served == [200] * 4
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "ApiKey")
    assert [line.get("user_id") for line in lines if line["event"] == "request"] == ["bot"] * 4 + [None]


def test_password_opens_nothing_else():
    """A browser sends it with each request to the host, and to those that try an operation."""
    client = client_of(auth=KEYS)

    @client.app.get("/reports")
    async def reports() -> str:
        return "secret"

    assert client.get("/reports", headers=basic(TOKEN)).status_code == 401
    assert client.get("/reports", headers=basic(TOKEN) | CALLER).status_code == 200


def test_routes_with_docs_need_nothing_in_dev_and_test():
    """Not even with a password in the settings."""
    assert [statuses(client_of(environment, auth=KEYS)) for environment in ("dev", "test")] == [[200] * 4] * 2


@pytest.mark.parametrize(("sections", "expected"), [({}, 200), ({"auth": KEYS}, 401)])
def test_docs_without_a_password_are_as_public_as_the_app(sections, expected):
    """With authentication they need a caller."""
    client = client_of(docs={}, **sections)

    assert statuses(client) == [expected] * 4
    assert statuses(client, CALLER) == [200] * 4


@pytest.mark.parametrize(
    ("sections", "rule"), [({}, "DOCS_TOKEN"), ({"auth": KEYS}, "DOCS_TOKEN or any user")], ids=["without", "with"]
)
def test_list_of_routes_names_the_password(sections, rule):
    """As who may open the docs."""
    rules = {each.path: each.rule for each in list_routes(client_of(**sections).app)}

    assert {rules[path] for path in PATHS} == {rule}


def test_password_protects_a_schema_elsewhere():
    """At an address of the app's own."""
    settings = Settings(environment="prod", docs={"token": TOKEN}, hosts={"allowed": ["testserver"]}, metrics=None)
    client = TestClient(create_app(settings, openapi_url="/v1/schema.json"))

    assert client.get("/v1/schema.json").status_code == 401
    assert client.get("/v1/schema.json", headers=basic(TOKEN)).status_code == 200
    assert client.head("/docs", headers=basic(TOKEN)).status_code == 200


# Signing in


def sign_in_of(client):
    """Return the configuration with which the page signs people in; None if it has none."""
    page = client.get("/docs").text
    found = re.search(r"ui\.initOAuth\((.*)\)", page)
    return json.loads(found[1]) if found else None


ISSUER = {"issuer": ("https://login.example.com/",), "audience": ("orders", "more")}


@pytest.mark.parametrize(
    ("docs", "auth", "expected"),
    [
        ({}, ISSUER, {"usePkceWithAuthorizationCodeGrant": True}),
        ({"client_id": "spa"}, ISSUER, {"usePkceWithAuthorizationCodeGrant": True, "clientId": "spa"}),
        (
            {"client_id": "spa"},
            ISSUER | {"preset": ("auth0",)},
            {
                "usePkceWithAuthorizationCodeGrant": True,
                "clientId": "spa",
                "additionalQueryStringParams": {"audience": "orders"},
            },
        ),
        ({"client_id": "spa"}, {"secret": "s" * 32}, None),
    ],
)
def test_page_signs_in_at_the_issuer(docs, auth, expected):
    """With PKCE; Auth0 has to know for which API the token is."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")

    assert sign_in_of(client_of("test", docs=docs, auth=auth)) == expected


def test_configuration_of_the_app_wins():
    """Field by field."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    settings = Settings(environment="test", docs={"client_id": "spa"}, auth=ISSUER)
    app = create_app(settings, swagger_ui_init_oauth={"clientId": "own", "appName": "Orders"})

    assert sign_in_of(TestClient(app)) == {
        "usePkceWithAuthorizationCodeGrant": True,
        "clientId": "own",
        "appName": "Orders",
    }


# In a browser

UNFOLDED = {"docExpansion": "full", "tryItOutEnabled": True}


def documented(settings):
    """An app with one operation, which shows its caller, and whether the request has credentials of HTTP Basic."""
    app = create_app(settings, swagger_ui_parameters=UNFOLDED)

    @app.get("/me", dependencies=[Depends(require_scopes("reports:read"))])
    async def me(user: CurrentUser, request: Request) -> str:
        sent = request.headers.get("authorization", "none").split()[0]
        return f"{user.kind} {user.id} {sent}"

    return app


def choose(tab, scheme, *, schemes):
    """Open the dialog "Authorize" as soon as it has all schemes, and return the selector of one of them."""
    tab.evaluate(f"ui.authSelectors.definitionsToAuthorize().size === {schemes}")
    tab.click(".btn.authorize")
    return f".auth-container:has({scheme})"


def answer_of(tab):
    """Close the dialog, try the operation, and return the status and the body."""
    tab.evaluate("(document.querySelector('.close-modal')?.click(), true)")
    tab.evaluate("(document.querySelector('.btn-clear')?.click(), true)")
    tab.evaluate("!document.querySelector('.live-responses-table')")
    tab.click(".execute")
    status = tab.text(".live-responses-table tbody .response-col_status")
    return status, tab.text(".live-responses-table tbody .highlight-code code")


def violations(tab):
    return [text for source, text in tab.complaints if source in ("security", "javascript")]


@pytest.mark.system
@needs_browser
def test_page_authorizes_with_a_token_and_with_a_key():
    """Both are pasted, under the policy of the page."""
    jwt = pytest.importorskip("jwt", reason="the extra auth is not installed")
    secret = "s" * 32
    auth = {"secret": secret, "api_keys": KEYS.api_keys}
    token = jwt.encode({"sub": "alice", "scope": "reports:read", "exp": time.time() + 60}, secret)
    with serving(documented(Settings(environment="test", docs={}, auth=auth))) as port, driven_tab() as tab:
        tab.open(f"http://127.0.0.1:{port}/docs")
        anonymous = answer_of(tab)
        form = choose(tab, "#auth-bearer-value", schemes=2)
        tab.enter("#auth-bearer-value", token)
        tab.click(f"{form} .authorize")
        with_token = answer_of(tab)
        form = choose(tab, "#api_key_value", schemes=2)
        tab.click(".auth-container:has([aria-label='Remove authorization']) .auth")
        tab.enter("#api_key_value", KEY)
        tab.click(f"{form} .authorize")
        with_key = answer_of(tab)

        assert violations(tab) == []

    assert anonymous[0] == "401"
    assert (with_token, with_key) == (("200", '"user alice Bearer"'), ("200", '"key bot none"'))


@pytest.mark.system
@needs_browser
def test_page_signs_in_with_pkce():
    """At an issuer of another origin; the token has the scopes that the operations require."""
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    from fastapi_prodkit.testing import Issuer

    with Issuer(tls=False) as issuer:
        issuer.sign_in("alice")
        app = documented(Settings(environment="test", docs={"client_id": "spa"}, auth=issuer.settings()))
        with serving(app) as port, driven_tab() as tab:
            tab.open(f"http://127.0.0.1:{port}/docs")
            form = choose(tab, "#client_id_authorization_code", schemes=3)
            tab.click(f"{form} .authorize")
            tab.evaluate("document.querySelector('.auth-container h6')?.innerText === 'Authorized'")
            answer = answer_of(tab)

            assert violations(tab) == []

    assert answer == ("200", '"user alice Bearer"')
    assert issuer.requests[-2:] == ["/token", "/token"]  # the first is the preflight


@pytest.mark.system
@needs_browser
def test_browser_asks_for_the_password_once():
    """And sends it with what the page tries, where it opens nothing and hinders nothing."""
    auth = {"api_keys": KEYS.api_keys}
    hosts = {"allowed": ["127.0.0.1"]}
    app = documented(Settings(environment="prod", docs={"token": TOKEN}, auth=auth, hosts=hosts, metrics=None))
    with serving(app) as port, driven_tab() as tab:
        tab.open(f"http://127.0.0.1:{port}/docs", TOKEN)
        form = choose(tab, "#api_key_value", schemes=1)
        tab.enter("#api_key_value", KEY)
        tab.click(f"{form} .authorize")
        with_key = answer_of(tab)
        tab.open(f"http://127.0.0.1:{port}/docs/oauth2-redirect")
        title = tab.evaluate("document.title")

        assert violations(tab) == []

    assert title == "Swagger UI: OAuth2 Redirect"
    assert with_key == ("200", '"key bot Basic"')
