"""Authentication on the wire: who calls, and how credentials are refused."""

import asyncio
import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Annotated

import pytest
from clock import Clock
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from forging import SECRET, claims, secret_token, token
from prometheus_client import CollectorRegistry

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import ApiKey, Auth, User, hash_api_key, new_api_key
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import CheckWarning, ConfigurationError, MissingExtraError
from fastapi_prodkit.sections import AuthSettings

KEY = new_api_key()
KEYS = [ApiKey(name="billing", hash=hash_api_key(KEY), scopes={"reports:read"}, roles={"auditor"})]
INVALID = 'Bearer error="invalid_token", error_description="The token or key is not valid."'
EXPIRED = 'Bearer error="invalid_token", error_description="The token or key has expired."'
SEVERAL = 'Bearer error="invalid_request", error_description="Send one token or one key, in one header line."'


def bearer(value):
    return {"Authorization": f"Bearer {value if isinstance(value, str) else value.decode()}"}


def service(auth, **keywords):
    """An app with a route for callers, and one for everybody."""
    app = FastAPI(**keywords)
    add_problem_handlers(app)

    @app.get("/me")
    async def me(user: Annotated[User, Depends(auth.current_user)]):
        return {
            "id": user.id,
            "kind": user.kind,
            "roles": sorted(user.roles),
            "scopes": sorted(user.scopes),
            "class": type(user).__name__,
        }

    @app.post("/maybe")
    async def maybe(request: Request):
        user = await auth.authenticate(request)
        return user and user.id

    return app


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def secret_auth(registry):
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    return Auth(AuthSettings(secret=SECRET, audience=["orders"], api_keys=KEYS), registry=registry)


@pytest.fixture
def client(secret_auth):
    return TestClient(service(secret_auth))


@pytest.fixture
def issuer():
    pytest.importorskip("jwt", reason="the extra auth is not installed")
    from fastapi_prodkit.testing import Issuer

    with Issuer() as issuer:
        yield issuer


def refusals(registry):
    """Return how many credentials were refused for each reason."""
    return {
        sample.labels["reason"]: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "http_server_refused_credentials_total"
    }


class TestCallers:
    def test_token_of_an_issuer_is_accepted(self, issuer):
        """The example of the documentation: keys are fetched in the background, with a real server."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
        sent = issuer.token("alice", roles=["admin"], scopes=["read"])

        with TestClient(service(auth, lifespan=auth.lifespan)) as client:
            responses = [client.get("/me", headers=bearer(sent)) for _ in range(3)]

        assert [response.json() for response in responses] == [
            {"id": "alice", "kind": "user", "roles": ["admin"], "scopes": ["read"], "class": "User"}
        ] * 3
        assert len(issuer.requests) == 2
        assert (auth.issuers, auth.token_endpoints()) == ([issuer.url], [f"{issuer.url}/token"])

    def test_token_is_accepted_without_a_lifespan(self, issuer):
        """Then the first token waits for the keys."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)

        response = TestClient(service(auth)).get("/me", headers=bearer(issuer.token()))

        assert response.json()["id"] == "alice"

    def test_token_of_a_secret_is_accepted(self, client):
        """For small services."""
        assert client.get("/me", headers=bearer(secret_token())).json()["id"] == "alice"

    @pytest.mark.parametrize("headers", [{"X-API-Key": KEY}, {"Authorization": f"ApiKey {KEY}"}])
    def test_api_key_is_accepted(self, headers, client):
        """In either header; the caller has the name, the scopes and the roles of the key."""
        responses = [client.get("/me", headers=headers).json() for _ in range(2)]

        assert (
            responses
            == [{"id": "billing", "kind": "key", "roles": ["auditor"], "scopes": ["reports:read"], "class": "User"}] * 2
        )

    def test_api_keys_alone_are_enough(self, monkeypatch, registry):
        """Without the extra; a bearer token is no credentials then."""
        monkeypatch.setitem(sys.modules, "jwt", None)
        client = TestClient(service(Auth(AuthSettings(api_keys=KEYS), registry=registry)))

        accepted = client.get("/me", headers={"X-API-Key": KEY})
        refused = client.get("/me", headers=bearer("abc"))

        assert accepted.json()["id"] == "billing"
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "ApiKey")

    def test_key_that_was_removed_is_refused_at_once(self, registry):
        """What `find_key` returns is not remembered."""
        table = {hash_api_key(KEY): KEYS[0]}

        async def find_key(hashed):
            return table.get(hashed)

        client = TestClient(service(Auth(find_key=find_key, registry=registry)))
        before = client.get("/me", headers={"X-API-Key": KEY})
        table.clear()
        after = client.get("/me", headers={"X-API-Key": KEY})

        assert (before.status_code, after.status_code) == (200, 401)
        assert after.headers["www-authenticate"] == "ApiKey"
        assert refusals(registry) == {"api_key": 1}

    def test_key_of_the_settings_expires(self, registry):
        """Although it is remembered."""
        clock = Clock()
        key = ApiKey(name="x", hash=hash_api_key(KEY), expires=datetime.fromtimestamp(clock.now + 10, UTC))
        client = TestClient(service(Auth(AuthSettings(api_keys=[key]), registry=registry, clock=clock)))

        before = client.get("/me", headers={"X-API-Key": KEY})
        clock.now += 10
        after = client.get("/me", headers={"X-API-Key": KEY})

        assert (before.status_code, after.status_code) == (200, 401)
        assert after.json()["detail"] == "The token or key has expired."

    def test_user_is_of_a_class_of_ones_own(self, registry):
        """A subclass; of API keys, too."""
        pytest.importorskip("jwt")

        class Employee(User):
            pass

        client = TestClient(
            service(Auth(AuthSettings(secret=SECRET, audience=["orders"], api_keys=KEYS), user=Employee))
        )

        kinds = [
            client.get("/me", headers=each).json()["class"] for each in (bearer(secret_token()), {"X-API-Key": KEY})
        ]

        assert kinds == ["Employee", "Employee"]

    def test_caller_may_be_optional(self, client):
        """`authenticate` returns None for a request without credentials, and refuses wrong ones."""
        answers = [client.post("/maybe", headers=headers) for headers in ({}, bearer(secret_token()), bearer("wrong"))]

        assert [answer.status_code for answer in answers] == [200, 200, 401]
        assert [answer.json() for answer in answers[:2]] == [None, "alice"]

    def test_token_that_was_verified_is_known(self, secret_auth):
        """Without waiting: until then, and for requests without credentials or with several, it is not."""
        known, other = [(b"authorization", f"Bearer {secret_token(jti=n)}".encode()) for n in "ab"]
        scopes = [
            {"type": "http", "headers": headers, "client": ("203.0.113.1", 1)}
            for headers in ([known], [other], [], [known, known], [(b"authorization", b"Basic x")])
        ]

        before = secret_auth.known_user(scopes[0])
        verified = asyncio.run(secret_auth.authenticate(Request(scopes[0])))

        assert before is None
        assert [secret_auth.known_user(scope) for scope in scopes] == [verified, None, None, None, None]
        assert secret_auth.known_user(scopes[0]) is verified

    def test_token_that_was_verified_expires(self, registry):
        """With the clock skew, and not later."""
        pytest.importorskip("jwt")
        clock = Clock()
        client = TestClient(service(Auth(AuthSettings(secret=SECRET), registry=registry, clock=clock)))
        sent = bearer(secret_token(aud=None, iat=1000, exp=1100))
        statuses = []

        for now in (1000, 1001, 1099, 1100, 1159, 1160):
            clock.now = now
            statuses.append(client.get("/me", headers=sent).status_code)

        assert statuses == [200] * 5 + [401]

    def test_token_is_not_valid_under_another_scheme(self, client):
        """A key that was verified is no token, and a token is no key."""
        client.get("/me", headers={"X-API-Key": KEY})
        client.get("/me", headers=bearer(secret_token()))

        statuses = [
            client.get("/me", headers=headers).status_code
            for headers in (bearer(KEY), {"X-API-Key": secret_token()}, {"Authorization": f"ApiKey {secret_token()}"})
        ]

        assert statuses == [401] * 3


class TestRefusals:
    def test_request_without_credentials_gets_the_challenge(self, client, registry):
        """RFC 6750 section 3.1: without an error; of every scheme that is accepted. Nothing was refused."""
        response = client.get("/me")

        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer, ApiKey"
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["cache-control"] == "no-store"
        assert refusals(registry) == {}

    @pytest.mark.parametrize("where", ["query", "form", "json", "cookie", "basic"])
    def test_token_elsewhere_is_not_read(self, where, client, registry):
        """RFC 6750 section 5.3: a token in a URL is logged, and one in a cookie is sent by every page."""
        sent = secret_token()
        keywords = {
            "query": {"params": {"access_token": sent, "token": sent, "api_key": KEY}},
            "form": {"data": {"access_token": sent}},
            "json": {"json": {"access_token": sent}},
            "cookie": {"headers": {"Cookie": f"access_token={sent}; Authorization=Bearer {sent}"}},
            "basic": {"headers": {"Authorization": f"Basic {sent}"}},
        }[where]

        assert client.post("/maybe", **keywords).json() is None
        assert refusals(registry) == {}

    @pytest.mark.parametrize(
        "headers",
        [
            [("Authorization", "Bearer {0}"), ("Authorization", "Bearer {0}")],
            [("Authorization", "Bearer {0}"), ("authorization", "Basic x")],
            [("Authorization", "Bearer {0}"), ("X-API-Key", KEY)],
            [("X-API-Key", KEY), ("X-API-Key", KEY)],
        ],
    )
    def test_several_credentials_are_a_bad_request(self, headers, client, registry):
        """RFC 6750 section 3.1, invalid_request: even if each of them is valid."""
        sent = secret_token()
        client.get("/me", headers=bearer(sent))

        response = client.get("/me", headers=[(name, value.format(sent)) for name, value in headers])

        assert response.status_code == 400
        assert response.headers["www-authenticate"] == SEVERAL
        assert refusals(registry) == {"several_credentials": 1}

    @pytest.mark.parametrize(
        ("sent", "reason", "challenge"),
        [
            ("", "malformed", INVALID),
            ("abc", "malformed", INVALID),
            ("a b", "malformed", INVALID),
            (secret_token() + "x" * 9000, "malformed", INVALID),
            (token({"alg": "none"}, claims()), "algorithm", INVALID),
            (token({"alg": "HS256"}, claims()), "signature", INVALID),
            (token({"alg": "HS256", "jku": "https://evil.example"}, claims()), "header", INVALID),
            (secret_token(aud="other"), "audience", INVALID),
            (secret_token(exp=None), "claims", INVALID),
            (secret_token(exp=int(time.time()) - 3600), "expired", EXPIRED),
            (secret_token(nbf=int(time.time()) + 3600), "not_yet_valid", INVALID),
        ],
    )
    def test_refused_token_says_no_more_than_that(self, sent, reason, challenge, client, registry):
        """The reason is in the metric; a client learns only that its token has expired."""
        response = client.get("/me", headers=bearer(sent))

        assert response.status_code == 401
        assert response.headers["www-authenticate"] == challenge
        assert response.json()["detail"] in challenge
        assert refusals(registry) == {reason: 1}

    def test_refused_api_key_says_no_more_than_that(self, client, registry):
        """`ApiKey` has no parameters."""
        responses = [client.get("/me", headers={"X-API-Key": sent}) for sent in (new_api_key(), KEY[:-1])]

        assert [response.status_code for response in responses] == [401, 401]
        assert {response.headers["www-authenticate"] for response in responses} == {"ApiKey"}
        assert refusals(registry) == {"api_key": 1, "malformed": 1}

    def test_reason_is_on_the_access_line(self, secret_auth, registry, capsys):
        """In a sentence without the token, and in the metric of all refusals."""
        settings = Settings(environment="test", log={"format": "json"})
        app = create_app(settings, registry=registry)
        app.add_api_route("/me", lambda: "ok", dependencies=[Depends(secret_auth.current_user)])
        sent = secret_token(aud="s3cret-other")
        with TestClient(app) as client:
            client.get("/me", headers=bearer(sent))
            client.get("/me")
            client.get("/me", headers=bearer(secret_token()))

        output = capsys.readouterr().out
        lines = [line for line in map(json.loads, output.splitlines()) if line.get("http_path") == "/me"]

        assert [(line["http_status"], line.get("reason")) for line in lines] == [
            (401, "the token's aud has no item of AUTH_AUDIENCE"),
            (401, "there are no credentials"),
            (200, None),
        ]
        assert sent not in output
        assert "s3cret-other" not in output
        assert registry.get_sample_value("http_server_refusals_total", {"reason": "unauthenticated"}) == 2

    def test_forged_tokens_of_a_client_are_limited(self, client, registry, caplog):
        """To ten a minute; then new tokens are not verified, and those that are known go on working."""
        caplog.set_level(logging.WARNING, "fastapi_prodkit.auth")
        known, new = bearer(secret_token()), bearer(secret_token(jti="new"))
        client.get("/me", headers=known)

        statuses = [client.get("/me", headers=bearer(f"guess-{number}")).status_code for number in range(12)]
        response = client.get("/me", headers=new)

        assert statuses == [401] * 10 + [429] * 2
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert client.get("/me", headers=known).status_code == 200
        assert caplog.messages == ["credentials of testclient are refused: the token does not have three parts"] * 10
        assert refusals(registry) == {"malformed": 10, "too_many": 3}

    def test_wrong_keys_of_a_client_are_limited(self, client):
        """Like tokens."""
        statuses = [client.get("/me", headers={"X-API-Key": new_api_key()}).status_code for _ in range(11)]

        assert statuses == [401] * 10 + [429]

    def test_key_that_was_found_before_is_not_locked_out(self):
        """By the guesses of a neighbour with the same address; a key that is removed then counts as one of them."""
        used, new = new_api_key(), new_api_key()
        table = {hash_api_key(key): ApiKey(name="bot", hash=hash_api_key(key)) for key in (used, new)}
        client = TestClient(service(Auth(find_key=table.get)))
        client.get("/me", headers={"X-API-Key": used})
        for _ in range(10):
            client.get("/me", headers={"X-API-Key": new_api_key()})

        statuses = [client.get("/me", headers={"X-API-Key": key}).status_code for key in (used, new, used)]
        table.clear()
        after = [client.get("/me", headers={"X-API-Key": used}).status_code for _ in range(2)]

        assert statuses == [200, 429, 200]
        assert after == [401, 429]

    def test_expired_tokens_are_not_limited(self, client, caplog):
        """Behind one address there may be an office of people, with apps that have not been closed over night."""
        expired = [secret_token(exp=int(time.time()) - 100 - number) for number in range(12)]

        statuses = [client.get("/me", headers=bearer(sent)).status_code for sent in expired]

        assert statuses == [401] * 12
        assert client.get("/me", headers=bearer(secret_token())).status_code == 200
        assert not caplog.records

    def test_refusal_without_problem_handlers(self, secret_auth):
        """In a plain FastAPI app status and header are right, too."""
        app = FastAPI()
        app.add_api_route("/", lambda: "ok", dependencies=[Depends(secret_auth.current_user)])

        response = TestClient(app).get("/", headers=bearer("wrong"))

        assert (response.status_code, response.headers["www-authenticate"]) == (401, INVALID)
        assert response.json() == {"detail": "The token or key is not valid."}


class TestIssuers:
    @pytest.mark.parametrize("fault", ["refused", "garbage", "error"])
    def test_issuer_that_is_down_is_a_503(self, fault, issuer, registry):
        """A token is neither valid nor invalid; the client may try again, and is served when the issuer is back."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context, registry=registry)
        client, sent = TestClient(service(auth)), bearer(issuer.token())

        with issuer.fault(fault):
            down = [client.get("/me", headers=sent) for _ in range(2)]
        (keys,) = auth._tokens.issuers
        keys._clock = lambda: time.monotonic() + 60
        back = client.get("/me", headers=sent)

        assert [response.status_code for response in down] == [503, 503]
        assert down[0].headers["retry-after"] == "1"
        assert down[0].json()["detail"] == "Tokens cannot be verified at the moment."
        assert back.status_code == 200
        assert refusals(registry) == {}

    @pytest.mark.parametrize("fault", ["silent", "slow"])
    def test_issuer_that_does_not_answer_delays_no_start(self, fault, issuer):
        """And nothing else: the start, requests without a token, and the end."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
        started = time.perf_counter()

        with issuer.fault(fault), TestClient(service(auth, lifespan=auth.lifespan)) as client:
            response = client.get("/me")

        assert response.status_code == 401
        assert time.perf_counter() - started < 3  # a fetch takes 5 s

    def test_issuer_that_fails_later_is_not_noticed(self, issuer):
        """Tokens of known keys go on working, new ones too."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
        client = TestClient(service(auth))
        client.get("/me", headers=bearer(issuer.token()))
        (keys,) = auth._tokens.issuers
        keys._clock = lambda: time.monotonic() + 3600

        with issuer.fault("refused"):
            statuses = [client.get("/me", headers=bearer(issuer.token(name))).status_code for name in ("bob", "carol")]

        assert statuses == [200, 200]

    def test_rotation_in_mid_traffic_is_not_noticed(self, issuer):
        """Tokens of both keys are accepted; of the earlier one, until the issuer withdraws it."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
        client = TestClient(service(auth))
        earlier = bearer(issuer.token())
        client.get("/me", headers=earlier)
        (keys,) = auth._tokens.issuers

        def after_rotation(minutes, **keywords):
            issuer.rotate(**keywords)
            keys._clock = lambda: time.monotonic() + 60 * minutes
            return [client.get("/me", headers=sent).status_code for sent in (bearer(issuer.token()), earlier)]

        assert after_rotation(1) == [200, 200]
        assert after_rotation(2, withdraw=True) == [200, 401]

    def test_certificate_of_somebody_else_is_refused(self, issuer, caplog):
        """Nothing that such a server says is believed."""
        auth = Auth(issuer.settings())

        response = TestClient(service(auth)).get("/me", headers=bearer(issuer.token()))

        assert response.status_code == 503
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text

    def test_reason_of_a_503_is_on_the_access_line(self, issuer, registry, capsys):
        """With the code of its own in the metric."""
        app = create_app(Settings(environment="test"), registry=registry)
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context, registry=registry)
        app.add_api_route("/me", lambda: "ok", dependencies=[Depends(auth.current_user)])
        with issuer.fault("error"), TestClient(app) as client:
            client.get("/me", headers=bearer(issuer.token()))

        assert "no token can be verified: https://127.0.0.1" in capsys.readouterr().out
        assert registry.get_sample_value("http_server_refusals_total", {"reason": "issuer_unavailable"}) == 1

    def test_readiness_warns_of_an_issuer_that_is_down(self, issuer):
        """The service stays ready; the details name the issuer and say why."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
        app = create_app(Settings(environment="test"), checks={"auth": auth.check}, lifespan=auth.lifespan)
        app.add_api_route("/me", lambda: "ok", dependencies=[Depends(auth.current_user)])

        with issuer.fault("error"), TestClient(app) as client:
            client.get("/me", headers=bearer(issuer.token()))
            response = client.get("/ready")

        assert response.status_code == 200
        assert response.json()["status"] == "warn"
        (check,) = response.json()["checks"]["auth"]
        assert check["output"].startswith(f"{issuer.url}: no token can be verified: {issuer.url}/.well-known")

    async def test_check_passes_with_fresh_keys(self, issuer):
        """Of all issuers; without issuers there is nothing to check."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)
        with pytest.raises(CheckWarning, match="have not been fetched yet"):
            await auth.check()

        await auth.authenticate(
            Request({"type": "http", "headers": [(b"authorization", b"Bearer " + issuer.token().encode())]})
        )

        await auth.check()
        await Auth(AuthSettings(api_keys=KEYS)).check()

    async def test_lifespan_fetches_keys_without_a_request(self, issuer):
        """So that the first token does not wait."""
        auth = Auth(issuer.settings(), ssl_context=issuer.ssl_context)

        async with auth.lifespan(), asyncio.timeout(5):
            while auth._tokens.issuers[0].warning():
                await asyncio.sleep(0.01)

        await auth.check()

    async def test_lifespan_without_issuers_does_nothing(self):
        """It may be used whatever is configured."""
        async with Auth(AuthSettings(api_keys=KEYS)).lifespan():
            pass


class TestConstruction:
    def test_nothing_to_accept_is_an_error(self):
        """It would refuse everybody."""
        with pytest.raises(ConfigurationError, match="accepts nothing; give AuthSettings"):
            Auth()

    @pytest.mark.parametrize("settings", [{"secret": SECRET}, {"issuer": ["https://a.example"], "audience": ["x"]}])
    @pytest.mark.parametrize("module", ["jwt", "cryptography", "httpx2"])
    def test_missing_extra_is_an_error(self, settings, module, monkeypatch):
        """At construction, with the command that installs it; a secret needs no HTTP client."""
        pytest.importorskip("jwt")
        monkeypatch.setitem(sys.modules, module, None)
        if module == "httpx2" and "secret" in settings:
            Auth(AuthSettings(**settings))
            return

        with pytest.raises(MissingExtraError, match=r"pip install 'fastapi-prodkit\[auth\]'"):
            Auth(AuthSettings(**settings))
