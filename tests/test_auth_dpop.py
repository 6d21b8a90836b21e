"""DPoP on the wire: tokens that are bound to a key, and a proof with each request."""

import asyncio
import hashlib
import json
import logging
import re
import time
from typing import Annotated

import pytest

pytest.importorskip("jwt", reason="the extra auth is not installed")

from clock import Clock
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.testclient import TestClient
from forging import SECRET, base64url, encoded, hs256, secret_token
from prometheus_client import CollectorRegistry
from redis_servers import redis_or_skip
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit.auth import Auth, CurrentUser, User, dpop, guard_routes, hash_api_key, new_api_key
from fastapi_prodkit.auth.nonces import SECONDS
from fastapi_prodkit.errors import add_problem_handlers
from fastapi_prodkit.exceptions import ConfigurationError, ProblemError
from fastapi_prodkit.rate_limit import MemoryStore, SharedStore, once
from fastapi_prodkit.request_id import RequestIDMiddleware
from fastapi_prodkit.sections import AuthSettings, RateLimitSettings
from fastapi_prodkit.testing import DPoPKey, Issuer

KEY = DPoPKey()
OTHER = DPoPKey()
TOKEN = secret_token(cnf={"jkt": KEY.thumbprint})
URL = "http://testserver/me"
ALGS = 'algs="ES256 ES384 ES512 EdDSA PS256 RS256"'
API_KEY = new_api_key()


def auth_of(dpop="allowed", store=None, registry=None, clock=time.time, **fields):
    values = {"secret": SECRET, "audience": ["orders"], "dpop": dpop, **fields}
    return Auth(AuthSettings(**values), store=store or MemoryStore(), registry=registry, clock=clock)


def service(auth):
    app = FastAPI()
    add_problem_handlers(app)

    @app.get("/me")
    @app.post("/me")
    async def me(user: Annotated[User, Depends(auth.current_user)]):
        return user.id

    return app


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def client(registry):
    return TestClient(service(auth_of(registry=registry)))


def dpop_error(error, description):
    return f'DPoP error="{error}", error_description="{description}", {ALGS}'


def refusals(registry):
    return {
        sample.labels["reason"]
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "http_server_refused_credentials_total"
    }


class TestAccepted:
    @pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512", "EdDSA", "PS256", "RS256"])
    def test_bound_token_with_its_proof(self, algorithm, client):
        """Of a key of each kind."""
        key = DPoPKey(algorithm)
        token = secret_token(cnf={"jkt": key.thumbprint})

        assert client.get("/me", headers=key.headers("GET", URL, token)).json() == "alice"

    @pytest.mark.parametrize("mode", ["allowed", "required"])
    def test_token_of_an_issuer(self, mode):
        """The example of the documentation."""
        with Issuer(audience="orders") as issuer:
            auth = Auth(issuer.settings(dpop=mode), store=MemoryStore(), ssl_context=issuer.ssl_context)
            token = issuer.token("alice", bound_to=KEY)

            response = TestClient(service(auth)).get("/me", headers=KEY.headers("GET", URL, token))

        assert response.json() == "alice"

    def test_known_token_costs_only_its_proof(self, client, monkeypatch):
        """Its own signature was verified before."""
        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code == 200
        monkeypatch.setattr("fastapi_prodkit.auth.tokens.TokenVerifier.verify", None)

        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).json() == "alice"

    @pytest.mark.parametrize("age", [-59, 0, 60, 119])
    def test_proof_of_a_client_whose_clock_differs(self, age, client):
        """By the leeway; beside that it may be a minute old."""
        headers = KEY.headers("GET", URL, TOKEN, iat=time.time() - age)

        assert client.get("/me", headers=headers).status_code == 200

    def test_scheme_in_any_case_of_letters(self, client):
        """RFC 9110 section 11.1."""
        headers = {**KEY.headers("GET", URL, TOKEN), "Authorization": f"dpop  {TOKEN}"}

        assert client.get("/me", headers=headers).status_code == 200

    def test_method_and_query(self, client):
        """A proof is for one method, and for a URL with any query."""
        response = client.post("/me?page=2", headers=KEY.headers("POST", f"{URL}?page=1", TOKEN))

        assert response.status_code == 200

    def test_media_type_in_full(self, client):
        """RFC 7515 section 4.1.9: `typ` is a media type, whose `application/` may be written."""
        headers = KEY.headers("GET", URL, TOKEN, headers={"typ": "application/dpop+jwt"})

        assert client.get("/me", headers=headers).status_code == 200

    def test_bearer_token_and_api_key_beside_it(self):
        """If DPoP is allowed, nothing changes for other clients."""
        entry = {"name": "billing", "hash": hash_api_key(API_KEY)}
        client = TestClient(service(auth_of(api_keys=[entry])))

        ids = [
            client.get("/me", headers=headers).json()
            for headers in ({"Authorization": f"Bearer {secret_token()}"}, {"X-API-Key": API_KEY})
        ]

        assert ids == ["alice", "billing"]


def header(**parameters):
    return lambda: KEY.proof("GET", URL, TOKEN, headers=parameters)


def claim(**members):
    return lambda: KEY.proof("GET", URL, TOKEN, **members)


def raw(part, content):
    """Return a function that makes a proof with another header (0) or other claims (1), which is signed correctly."""

    def proof():
        parts = KEY.proof("GET", URL, TOKEN).encode().split(b".")
        parts[part] = encoded(content)
        return signed(b".".join(parts[:2]))

    return proof


def signed(content, key=KEY.private_key):
    der = key.sign(content, ec.ECDSA(hashes.SHA256()))
    r, s = utils.decode_dss_signature(der)
    return content + b"." + base64url(r.to_bytes(32, "big") + s.to_bytes(32, "big"))


def with_signature(change):
    def proof():
        content, _, signature = KEY.proof("GET", URL, TOKEN).encode().rpartition(b".")
        return content + b"." + change(content, signature)

    return proof


def hmac_with_public_key(name):
    """Return a function that signs with the public key as the secret of an HMAC, which anybody can."""

    def proof():
        content = b".".join(map(encoded, ({"typ": "dpop+jwt", "alg": name, "jwk": KEY.jwk}, claims())))
        return content + b"." + base64url(hs256(json.dumps(KEY.jwk))(content))

    return proof


def claims():
    ath = base64url(hashlib.sha256(TOKEN.encode()).digest()).decode()
    return {"htm": "GET", "htu": URL, "iat": int(time.time()), "jti": "a" * 20, "ath": ath}


def without(name):
    return claim(**{name: None})


def duplicate(member):
    """Return a function that makes a proof whose claims have a second member, the last of which some parsers take."""
    return raw(1, json.dumps(claims()).encode().replace(b'{"htm"', b"{" + member + b', "htm"'))


NOW = int(time.time())
MALFORMED = {
    "no proof": lambda: "",
    "text": lambda: "proof",
    "two parts": lambda: ".".join(KEY.proof("GET", URL, TOKEN).split(".")[:2]),
    "five parts": lambda: f"{KEY.proof('GET', URL, TOKEN)}.a.b",
    "two proofs": lambda: f"{KEY.proof('GET', URL, TOKEN)}, {KEY.proof('GET', URL, TOKEN)}",
    "padding": lambda: KEY.proof("GET", URL, TOKEN) + "==",
    "larger than 8 KiB": claim(more="x" * 6000),
    "header is no object": raw(0, b"[]"),
    "claims are no object": raw(1, b'"GET"'),
    "nested too deeply": raw(1, b"[" * 3000),
    "duplicate htm": duplicate(b'"htm": "POST"'),
    "duplicate nonce": duplicate(b'"ath": {"a": 1, "a": 2}'),
    "NaN": raw(1, b'{"iat": NaN}'),
    "typ of a token": header(typ="at+jwt"),
    "typ JWT": header(typ="JWT"),
    "no typ": header(typ=None),
    "typ is no text": header(typ=["dpop+jwt"]),
    "no alg": header(alg=None),
    "alg none": header(alg="none"),
    "alg None": header(alg="None"),
    "alg HS256": header(alg="HS256"),
    "alg of another key": header(alg="RS256"),
    "HS256 with the public key": hmac_with_public_key("HS256"),
    "HS512 with the public key": hmac_with_public_key("HS512"),
    "no jwk": header(jwk=None),
    "jwk is no object": header(jwk=json.dumps(KEY.jwk)),
    "jwk is a set": header(jwk={"keys": [KEY.jwk]}),
    "jwk with a private key": header(jwk={**KEY.jwk, "d": "AQAB"}),
    "jwk is a secret": header(jwk={"kty": "oct", "k": "AQAB"}),
    "jwk without y": header(jwk={"kty": "EC", "crv": "P-256", "x": KEY.jwk["x"]}),
    "jwk off the curve": header(jwk={**KEY.jwk, "y": KEY.jwk["x"]}),
    "jku": header(jku="https://evil.example/jwks"),
    "x5u": header(x5u="https://evil.example/x5u"),
    "x5c": header(x5c=["MIIB"]),
    "crit": header(crit=["exp"]),
    "b64": header(b64=False),
    "cty": header(cty="JWT"),
    "zip": header(zip="DEF"),
    "no htm": without("htm"),
    "htm of another method": claim(htm="POST"),
    "htm in lower case": claim(htm="get"),
    "htm is no text": claim(htm=["GET"]),
    "no htu": without("htu"),
    "htu of another path": claim(htu="http://testserver/you"),
    "htu of another host": claim(htu="http://evil.example/me"),
    "htu of another scheme": claim(htu="https://testserver/me"),
    "htu of another port": claim(htu="http://testserver:8000/me"),
    "htu of a parent": claim(htu="http://testserver/"),
    "htu with a slash more": claim(htu="http://testserver/me/"),
    "htu is a path": claim(htu="/me"),
    "htu is no text": claim(htu=[URL]),
    "htu is a surrogate": claim(htu="\ud800"),
    "no iat": without("iat"),
    "iat too old": claim(iat=NOW - 60 - 60 - 2),
    "iat in the future": claim(iat=NOW + 3600),
    "iat is text": claim(iat=str(NOW)),
    "iat is a boolean": claim(iat=True),
    "iat in milliseconds": claim(iat=NOW * 1000),
    "iat is huge": claim(iat=10**400),
    "no ath": without("ath"),
    "ath is empty": claim(ath=""),
    "ath of another token": claim(ath=base64url(hashlib.sha256(secret_token().encode()).digest()).decode()),
    "ath in hexadecimal digits": claim(ath=hashlib.sha256(TOKEN.encode()).hexdigest()),
    "ath with padding": lambda: KEY.proof("GET", URL, TOKEN, ath=claims()["ath"] + "="),
    "ath is no text": claim(ath=1),
    "ath is not ASCII": claim(ath="\u00e9" * 43),
    "no jti": without("jti"),
    "jti is empty": claim(jti=""),
    "jti is too long": claim(jti="x" * 257),
    "jti is no text": claim(jti=1),
}
WRONG_SIGNATURES = {
    "signature of another key": lambda: OTHER.proof("GET", URL, TOKEN, headers={"jwk": KEY.jwk}),
    "signature of other content": with_signature(lambda content, _: signed(content + b"x").rpartition(b".")[2]),
    "r=s=0": with_signature(lambda *_: base64url(bytes(64))),
    "signature in DER": with_signature(
        lambda content, _: base64url(KEY.private_key.sign(content, ec.ECDSA(hashes.SHA256())))
    ),
    "cut": with_signature(lambda *_: base64url(b"s" * 63)),
}


class TestForgedProofs:
    @pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED)
    def test_wrong_proof_is_refused(self, make, client, registry):
        """Each is right in everything else; it uses up nothing."""
        headers = {"Authorization": f"DPoP {TOKEN}", "DPoP": make()}

        response = client.get("/me", headers=headers)

        assert response.status_code == 401
        assert response.headers["www-authenticate"] == dpop_error("invalid_dpop_proof", "The DPoP proof is not valid.")
        assert refusals(registry) == {"proof"}

    @pytest.mark.parametrize("make", WRONG_SIGNATURES.values(), ids=WRONG_SIGNATURES)
    def test_proof_with_a_wrong_signature_is_refused(self, make, client, registry, caplog):
        """That is a forgery: it is logged, without any part of it."""
        sent = make()

        response = client.get("/me", headers={"Authorization": f"DPoP {TOKEN}", "DPoP": sent})

        assert response.headers["www-authenticate"] == dpop_error("invalid_dpop_proof", "The DPoP proof is not valid.")
        assert refusals(registry) == {"proof_signature"}
        assert "credentials of testclient are refused: the DPoP proof's signature is wrong" in caplog.text
        assert not any(part in caplog.text for part in (sent if isinstance(sent, str) else sent.decode()).split("."))

    def test_two_lines_are_refused(self, client, registry):
        """The next service might read the other one."""
        proofs = [KEY.proof("GET", URL, TOKEN) for _ in range(2)]
        headers = [("Authorization", f"DPoP {TOKEN}"), *[("DPoP", proof) for proof in proofs]]

        response = client.get("/me", headers=headers)

        assert response.status_code == 401
        assert refusals(registry) == {"proof"}

    def test_missing_line_is_refused(self, client, registry):
        """A stolen token alone is worth nothing."""
        response = client.get("/me", headers={"Authorization": f"DPoP {TOKEN}"})

        assert response.headers["www-authenticate"] == dpop_error("invalid_dpop_proof", "The DPoP proof is not valid.")
        assert refusals(registry) == {"proof"}

    def test_missing_line_of_a_known_token_is_refused(self, client):
        """Also if the token was accepted a moment ago."""
        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code == 200

        assert client.get("/me", headers={"Authorization": f"DPoP {TOKEN}"}).status_code == 401

    def test_proof_of_another_key_is_refused(self, client, registry, caplog):
        """Of a thief with a key of their own, whether the token is known or not."""
        answers = []
        for _ in range(2):
            answers.append(client.get("/me", headers=OTHER.headers("GET", URL, TOKEN)))
            client.get("/me", headers=KEY.headers("GET", URL, TOKEN))

        assert {answer.headers["www-authenticate"] for answer in answers} == {
            dpop_error("invalid_token", "The token or key is not valid.")
        }
        assert refusals(registry) == {"proof_key"}
        assert "the token is bound to another key than that of the DPoP proof" in caplog.text

    def test_forged_proofs_of_a_client_are_limited(self, client):
        """Ten in a minute, as forged tokens are; then a known token still works."""
        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code == 200
        statuses = [client.get("/me", headers=OTHER.headers("GET", URL, TOKEN)).status_code for _ in range(12)]

        assert statuses == [401] * 10 + [429] * 2
        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code == 200

    @pytest.mark.parametrize("fields", [{"exp": NOW - 3600}, {"aud": "other"}, {"iss": "x", "exp": "soon"}])
    def test_token_that_is_not_valid_is_refused(self, fields, client):
        """A proof says nothing about the token; and the refused token uses up no proof."""
        token = secret_token(cnf={"jkt": KEY.thumbprint}, **fields)

        response = client.get("/me", headers=KEY.headers("GET", URL, token))

        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith('DPoP error="invalid_token"')

    @pytest.mark.parametrize(
        ("cnf", "code"),
        [
            (None, "not_bound"),
            ({}, "sender_constrained"),
            ({"x5t#S256": KEY.thumbprint}, "sender_constrained"),
            ({"jkt": KEY.thumbprint, "x5t#S256": "a"}, "sender_constrained"),
            ({"jkt": KEY.thumbprint, "jwk": {}}, "sender_constrained"),
            ([KEY.thumbprint], "sender_constrained"),
            pytest.param(KEY.thumbprint, "sender_constrained", id="text"),
            ({"jkt": None}, "proof_key"),
            ({"jkt": [KEY.thumbprint]}, "proof_key"),
            ({"jkt": KEY.thumbprint.lower()}, "proof_key"),
            ({"jkt": f"{KEY.thumbprint}="}, "proof_key"),
        ],
    )
    def test_token_that_is_not_bound_to_the_key_is_refused(self, cnf, code, client, registry):
        """Nor one that needs another proof as well."""
        token = secret_token(cnf=cnf)

        response = client.get("/me", headers=KEY.headers("GET", URL, token))

        assert response.status_code == 401
        assert refusals(registry) == {code}


class TestDowngrade:
    @pytest.mark.parametrize("mode", ["off", "allowed", "required"])
    @pytest.mark.parametrize("with_proof", [False, True])
    def test_bound_token_is_no_bearer_token(self, mode, with_proof, registry):
        """Whoever has stolen it would send it so; known or not, with a proof or without."""
        client = TestClient(service(auth_of(mode, registry=registry)))
        proof = KEY.headers("GET", URL, TOKEN)
        client.get("/me", headers=proof)
        headers = {**(KEY.headers("GET", URL, TOKEN) if with_proof else {}), "Authorization": f"Bearer {TOKEN}"}

        response = client.get("/me", headers=headers)

        assert response.status_code == 401
        assert refusals(registry) == {"not_bound" if mode == "required" else "sender_constrained"}

    def test_remembered_token_has_no_line_that_can_be_sent(self, client):
        """A known token is found by its key and itself, and no credentials are spelt like that."""
        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code == 200
        lines = [
            f"{scheme}{KEY.thumbprint} {TOKEN}" for scheme in ("DPoP ", "Bearer ", "ApiKey ", "", f"{KEY.thumbprint} ")
        ]

        assert [client.get("/me", headers={"Authorization": line}).status_code for line in lines] == [401] * 5

    def test_scheme_is_unknown_if_it_is_off(self):
        """It costs nothing, and the client is told what is accepted."""
        client = TestClient(service(auth_of("off")))

        response = client.get("/me", headers=KEY.headers("GET", URL, TOKEN))

        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")

    def test_required_refuses_bearer_tokens_and_not_api_keys(self, registry):
        """A key of a machine has no proof; leave AUTH_API_KEYS out if that is not wanted."""
        entry = {"name": "billing", "hash": hash_api_key(API_KEY)}
        client = TestClient(service(auth_of("required", registry=registry, api_keys=[entry])))

        bearer = client.get("/me", headers={"Authorization": f"Bearer {secret_token()}"})
        machine = client.get("/me", headers={"X-API-Key": API_KEY})

        assert bearer.headers["www-authenticate"] == dpop_error("invalid_token", "The token has to be bound to a key.")
        assert refusals(registry) == {"not_bound"}
        assert machine.json() == "billing"

    def test_two_schemes_are_refused(self, client):
        """A token twice is two credentials."""
        headers = [*KEY.headers("GET", URL, TOKEN).items(), ("Authorization", f"Bearer {secret_token()}")]

        assert client.get("/me", headers=headers).status_code == 400


class TestChallenges:
    @pytest.mark.parametrize(
        ("mode", "keys", "expected"),
        [
            ("off", False, "Bearer"),
            ("allowed", False, f"Bearer, DPoP {ALGS}"),
            ("allowed", True, f"Bearer, DPoP {ALGS}, ApiKey"),
            ("required", False, f"DPoP {ALGS}"),
            ("required", True, f"DPoP {ALGS}, ApiKey"),
        ],
    )
    def test_client_without_credentials_is_told_what_is_accepted(self, mode, keys, expected):
        """RFC 9449 section 7.1: with the algorithms of proofs."""
        entries = [{"name": "billing", "hash": hash_api_key(API_KEY)}] if keys else []

        response = TestClient(service(auth_of(mode, api_keys=entries))).get("/me")

        assert (response.status_code, response.headers["www-authenticate"]) == (401, expected)

    def test_client_with_a_wrong_bearer_token_is_told_both(self, client):
        """RFC 9449 section 7.2."""
        response = client.get("/me", headers={"Authorization": "Bearer x.y.z"})

        invalid = 'error="invalid_token", error_description="The token or key is not valid."'
        assert response.headers["www-authenticate"] == f"Bearer {invalid}, DPoP {ALGS}"


class TestReplay:
    def test_proof_is_accepted_once(self, client, registry):
        """With the same token, and then never again."""
        headers = KEY.headers("GET", URL, TOKEN)

        first, *others = [client.get("/me", headers=headers) for _ in range(3)]

        assert first.status_code == 200
        assert {answer.headers["www-authenticate"] for answer in others} == {
            dpop_error("invalid_dpop_proof", "The DPoP proof was used before.")
        }
        assert refusals(registry) == {"proof_replayed"}

    def test_same_jti_in_another_proof_is_a_replay(self, client):
        """A second signature of an ECDSA key is easily made of the first one, and says nothing new."""
        statuses = [
            client.get("/me", headers=KEY.headers("GET", URL, TOKEN, jti="a", iat=int(time.time()) - age)).status_code
            for age in (0, 1)
        ]

        assert statuses == [200, 401]

    def test_same_jti_of_another_client_is_none(self, client):
        """Nobody can use up the proofs of others."""
        token = secret_token(cnf={"jkt": OTHER.thumbprint})

        statuses = [
            client.get("/me", headers=key.headers("GET", URL, each, jti="a")).status_code
            for key, each in ((KEY, TOKEN), (OTHER, token))
        ]

        assert statuses == [200, 200]

    @pytest.mark.parametrize("refused", [{"aud": "other"}, {"cnf": {"jkt": "x"}}, {"cnf": None}])
    def test_proof_of_a_refused_request_is_not_remembered(self, refused):
        """Whoever has no valid token cannot fill the store."""
        store = MemoryStore()
        client = TestClient(service(auth_of(store=store)))
        token = secret_token(**{"cnf": {"jkt": KEY.thumbprint}, **refused})

        client.get("/me", headers=KEY.headers("GET", URL, token))

        assert not store._once._slices

    @pytest.mark.parametrize("leeway", [0, 60, 300])
    def test_proof_is_remembered_as_long_as_it_is_valid(self, leeway):
        """On the servers' clocks, too, one of which may be behind by the leeway."""
        clock = Clock()
        clock.now = float(NOW)
        store = MemoryStore(clock=clock)
        behind = Clock()
        apps = [service(auth_of(store=store, leeway=leeway, clock=each)) for each in (clock, behind)]
        clients = [TestClient(app) for app in apps]
        token = secret_token(cnf={"jkt": KEY.thumbprint}, iat=NOW)
        headers = KEY.headers("GET", URL, token, iat=NOW + leeway)
        assert clients[0].get("/me", headers=headers).status_code == 200

        answers = []
        for seconds in (leeway, 30, 30, leeway, leeway, 1, 1):
            clock.now += seconds
            behind.now = clock.now - leeway
            answers.append(clients[1].get("/me", headers=headers).json()["detail"])

        assert answers == ["The DPoP proof was used before."] * 5 + ["The DPoP proof is not valid."] * 2

    def test_request_is_authenticated_twice(self):
        """By the guard and by a dependency: it is one request, which uses up its proof once."""
        auth = auth_of()
        app = service(auth)
        guard_routes(app, auth)

        @app.get("/both")
        async def both(request: Request, user: CurrentUser):
            again = await auth.authenticate(request)
            return [user.id, again.id]

        client = TestClient(app)
        headers = [KEY.headers("GET", f"http://testserver{path}", TOKEN) for path in ("/me", "/both")]

        assert client.get("/me", headers=headers[0]).status_code == 200
        assert client.get("/both", headers=headers[1]).json() == ["alice", "alice"]
        assert client.get("/both", headers=headers[1]).status_code == 401

    async def test_concurrent_requests_with_one_proof(self):
        """One of them is served."""
        auth = auth_of()
        headers = KEY.headers("GET", URL, TOKEN)
        lines = [(b"host", b"testserver"), *((k.lower().encode(), v.encode()) for k, v in headers.items())]

        async def send():
            scope = {"type": "http", "method": "GET", "path": "/me", "headers": lines, "client": ("1.2.3.4", 1)}
            try:
                return (await auth.authenticate(Request(scope))).id
            except ProblemError as problem:
                return problem.status_code

        results = await asyncio.gather(*[send() for _ in range(10)])

        assert sorted(map(str, results)) == ["401"] * 9 + ["alice"]

    def test_full_memory_refuses(self, client, monkeypatch):
        """No proof is forgotten for another one: the client would have to send many, and could replay the first."""
        monkeypatch.setattr(once, "MAX_KEYS", 2)

        statuses = [client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code for _ in range(4)]

        assert statuses == [200, 200, 503, 503]


class TestStore:
    def test_store_is_required(self):
        """As a keyword of `Auth`."""
        with pytest.raises(ConfigurationError, match=re.escape("give Auth(store=MemoryStore())")):
            Auth(AuthSettings(secret=SECRET, dpop="allowed"))

    def test_store_has_to_remember(self):
        """A store that only counts cannot."""

        class Counting:
            async def hit(self, *_):
                return []

        with pytest.raises(ConfigurationError, match="a Counting needs the members shared and add_once"):
            Auth(AuthSettings(secret=SECRET, dpop="allowed"), store=Counting())

    def test_memory_of_several_workers_is_refused(self, monkeypatch):
        """Each would accept the proof once, in every environment."""
        monkeypatch.setattr(dpop, "is_one_of_several_workers", lambda: True)
        with pytest.raises(ConfigurationError, match="each worker process would accept a proof that another one has"):
            auth_of()

        settings = RateLimitSettings(storage_url="redis://127.0.0.1:1")
        auth_of(store=SharedStore(settings, registry=CollectorRegistry()))
        auth_of("off")

    def test_store_is_not_needed_without_dpop(self):
        """And not used."""
        assert Auth(AuthSettings(secret=SECRET)).known_user({"headers": []}) is None

    @pytest.mark.parametrize("policy", ["memory", "allow", "deny"])
    def test_store_that_fails_refuses_proofs_and_not_tokens(self, policy):
        """Whatever RATE_LIMIT_ON_STORAGE_ERROR says: nobody knows whether the proof was used."""
        settings = RateLimitSettings(storage_url="redis://127.0.0.1:1", on_storage_error=policy)
        client = TestClient(service(auth_of(store=SharedStore(settings, registry=CollectorRegistry()))))

        bound = client.get("/me", headers=KEY.headers("GET", URL, TOKEN))
        bearer = client.get("/me", headers={"Authorization": f"Bearer {secret_token()}"})

        assert (bound.status_code, bound.headers["retry-after"]) == (503, "1")
        assert bearer.status_code == 200


class TestNonce:
    @pytest.fixture
    def clock(self):
        clock = Clock()
        clock.now = (time.time() // SECONDS + 1) * SECONDS
        return clock

    @pytest.fixture
    def client(self, clock, registry):
        app = service(auth_of(dpop_nonce=True, clock=clock, registry=registry))
        app.add_middleware(RequestIDMiddleware)
        return TestClient(app)

    def get(self, client, clock, nonce):
        return client.get("/me", headers=KEY.headers("GET", URL, TOKEN, nonce=nonce, iat=clock.now))

    @pytest.mark.parametrize("nonce", [None, "", "x", 1])
    def test_client_is_told_the_nonce(self, nonce, client, clock, registry):
        """RFC 9449 section 9; with it the client tries again."""
        refusal = self.get(client, clock, nonce)
        answer = self.get(client, clock, refusal.headers["dpop-nonce"])

        assert refusal.status_code == 401
        assert refusal.headers["cache-control"] == "no-store"
        assert refusal.headers["www-authenticate"] == dpop_error(
            "use_dpop_nonce", "The DPoP proof needs the nonce in DPoP-Nonce."
        )
        assert refusals(registry) == {"proof_nonce"}
        assert answer.status_code == 200
        assert "dpop-nonce" not in answer.headers

    def test_new_nonce_comes_before_the_old_one_ends(self, client, clock):
        """So a client that calls now and then never has to try again."""
        first = self.get(client, clock, None).headers["dpop-nonce"]
        clock.now += SECONDS
        answer = self.get(client, clock, first)
        second = answer.headers["dpop-nonce"]
        clock.now += SECONDS

        assert answer.status_code == 200
        assert second != first
        assert self.get(client, clock, first).status_code == 401
        assert self.get(client, clock, second).status_code == 200

    def test_auth_without_any_layer_sends_it_with_refusals_only(self, clock):
        """A dependency cannot add headers to every response."""
        client = TestClient(service(auth_of(dpop_nonce=True, clock=clock)))
        first = self.get(client, clock, None).headers["dpop-nonce"]
        clock.now += SECONDS

        answer = self.get(client, clock, first)

        assert answer.status_code == 200
        assert "dpop-nonce" not in answer.headers

    def test_refused_nonce_uses_up_nothing(self, client, clock):
        """The client may keep the jti, though it should not."""
        nonce = self.get(client, clock, None).headers["dpop-nonce"]
        sent = [KEY.headers("GET", URL, TOKEN, nonce=each, jti="a", iat=clock.now) for each in (None, nonce)]

        assert [client.get("/me", headers=headers).status_code for headers in sent] == [401, 200]

    @pytest.mark.parametrize("shared", [False, True])
    def test_processes_share_the_secret(self, shared, clock):
        """AUTH_DPOP_NONCE_SECRET, which is required if they share a store; one process needs none."""
        settings = RateLimitSettings(storage_url="redis://127.0.0.1:1" if shared else "memory://")
        store = SharedStore(settings, registry=CollectorRegistry()) if shared else MemoryStore()
        secret = "n" * 32 if shared else None
        with Issuer() as issuer:
            fields = {"dpop": "allowed", "dpop_nonce": True, "dpop_nonce_secret": secret}
            auths = [Auth(issuer.settings(**fields), store=store, clock=clock) for _ in range(2)]
            if shared:
                with pytest.raises(ConfigurationError, match="AUTH_DPOP_NONCE needs AUTH_DPOP_NONCE_SECRET"):
                    Auth(issuer.settings(**(fields | {"dpop_nonce_secret": None})), store=store)

        one, other = (self.get(TestClient(service(auth)), clock, None) for auth in auths)

        assert (one.headers["dpop-nonce"] == other.headers["dpop-nonce"]) is shared

    def test_nonce_is_not_asked_for_by_default(self, client):
        """And no DPoP-Nonce is sent."""
        plain = TestClient(service(auth_of()))

        assert "dpop-nonce" not in plain.get("/me", headers={"Authorization": "DPoP x"}).headers


class TestCreateApp:
    def app(self, **fields):
        values = {"secret": SECRET, "audience": ["orders"], "dpop": "allowed", **fields.pop("auth", {})}
        app = create_app(Settings(environment="test", auth=values, **fields), registry=CollectorRegistry())

        @app.get("/me")
        async def me(user: CurrentUser) -> str:
            return user.id

        @app.websocket("/events")
        async def events(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.close()

        return app

    def test_guard_verifies_every_proof(self):
        """Its fast path for known credentials knows no bound token."""
        client = TestClient(self.app())
        headers = KEY.headers("GET", URL, TOKEN)

        statuses = [client.get("/me", headers=headers).status_code for _ in range(2)]
        statuses.append(client.get("/me", headers={"Authorization": f"DPoP {TOKEN}"}).status_code)
        statuses.append(client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code)

        assert statuses == [200, 401, 401, 200]

    def test_url_is_the_one_in_front_of_the_proxy(self):
        """The scheme that a trusted proxy sends, and the prefix that it removes."""
        client = TestClient(self.app(proxy={"trusted": ["*"]}), root_path="/v1")
        proxied = {"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Proto": "https"}

        statuses = [
            client.get("/me", headers={**KEY.headers("GET", url, TOKEN), **proxied}).status_code
            for url in ("https://testserver/v1/me", "http://testserver/v1/me", "https://testserver/me")
        ]

        assert statuses == [200, 401, 401]

    def test_header_of_a_proxy_that_is_not_trusted_changes_nothing(self):
        """A client cannot choose the URL that its proof is compared with."""
        client = TestClient(self.app())
        headers = KEY.headers("GET", "https://testserver/me", TOKEN)

        assert client.get("/me", headers={**headers, "X-Forwarded-Proto": "https"}).status_code == 401

    def test_mounted_app(self):
        """Its URL is the whole one."""
        app, inner = self.app(), FastAPI()
        inner.add_api_route("/me", lambda: "inner")
        app.mount("/sub", inner)
        client = TestClient(app)

        statuses = [
            client.get("/sub/me", headers=KEY.headers("GET", url, TOKEN)).status_code
            for url in ("http://testserver/sub/me", URL)
        ]

        assert statuses == [200, 401]

    def test_handshake_of_a_websocket(self):
        """It is a GET of its URL with http in place of ws."""
        client = TestClient(self.app())
        headers = KEY.headers("GET", "http://testserver/events", TOKEN)

        with client.websocket_connect("/events", headers=headers) as websocket, pytest.raises(WebSocketDisconnect):
            websocket.receive_text()
        with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/events", headers=headers):
            pass

        assert caught.value.status_code == 401

    def test_fresh_nonce_is_on_a_successful_response(self, monkeypatch):
        """The edge adds it."""
        app = self.app(auth={"dpop_nonce": True})
        client = TestClient(app)
        nonce = client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).headers["dpop-nonce"]
        auth, later = app.state.auth, time.time() + SECONDS
        monkeypatch.setattr(auth._dpop.nonces, "_clock", lambda: later)

        answer = client.get("/me", headers=KEY.headers("GET", URL, TOKEN, nonce=nonce))

        assert answer.status_code == 200
        assert answer.headers["dpop-nonce"] != nonce

    def test_reason_and_no_secret_is_logged(self, capsys):
        """On the access line: neither the proof nor the token."""
        headers = KEY.headers("GET", URL, TOKEN, htm="POST")

        TestClient(self.app()).get("/me", headers=headers)

        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        reasons = [(line["reason"], line.get("refusal")) for line in lines if line.get("http_path") == "/me"] or lines
        assert "the DPoP proof's htm is not the method of the request" in json.dumps(reasons)
        assert not any(part in json.dumps(lines) for header in headers.values() for part in header.split(".")[1:])

    def test_url_that_the_service_sees_is_logged(self, capsys):
        """So that a proxy which changes it is found; not the query, and not all of a long path."""
        app = self.app()
        app.add_api_route("/{any}", lambda: None)
        path = f"/{'x' * 300}"
        for each in ("/me?secret=1", path):
            TestClient(app).get(each, headers=KEY.headers("GET", "https://api.example.com/me", TOKEN))

        written = capsys.readouterr().out
        assert "the URL of the request, which is http://testserver/me for this service" in written
        assert f"which is {f'http://testserver{path}'[:200]} for this service" in written

    def test_headers_of_a_request_are_masked(self, capsys):
        """If an app logs them."""
        app = self.app()

        @app.get("/logged")
        async def logged(request: Request, user: CurrentUser) -> None:
            logging.getLogger("app").warning("headers", extra={"headers": dict(request.headers)})
            logging.getLogger("app").warning("DPoP: %s", request.headers["dpop"])
            logging.getLogger("app").warning("%s", request.headers.items())

        headers = KEY.headers("GET", "http://testserver/logged", TOKEN)
        assert TestClient(app).get("/logged", headers=headers).status_code == 200

        written = capsys.readouterr().out
        assert "headers" in written
        assert not any(part in written for part in headers["DPoP"].split("."))

    def test_browsers_may_send_a_proof(self):
        """CORS: the proof in a request, the nonce and the challenge of a response."""
        client = TestClient(self.app(cors={"origins": ["https://a.example"]}))
        origin = {"Origin": "https://a.example"}
        asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization,dpop"}

        preflight = client.options("/me", headers={**origin, **asked})
        answer = client.get("/me", headers=origin)

        assert (preflight.status_code, preflight.headers["access-control-allow-headers"]) == (
            204,
            "Authorization, Content-Type, X-Request-ID, DPoP",
        )
        assert answer.headers["access-control-expose-headers"].endswith("Retry-After, DPoP-Nonce, WWW-Authenticate")

    @pytest.mark.parametrize("auth", [{"dpop": "off"}, None])
    def test_browsers_may_not_send_a_proof_without_dpop(self, auth):
        """The preflight is as before."""
        settings = {"secret": SECRET, **auth} if auth else None
        app = create_app(
            Settings(environment="test", auth=settings, cors={"origins": ["https://a.example"]}),
            registry=CollectorRegistry(),
        )
        asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "dpop"}

        assert TestClient(app).options("/", headers={"Origin": "https://a.example", **asked}).status_code == 403

    def test_rate_limit_cannot_be_switched_off(self):
        """Its store remembers the proofs; no limit is needed for that."""
        with pytest.raises(ConfigurationError, match="leave out RATE_LIMIT_ENABLED=false"):
            self.app(rate_limit=None)

        client = TestClient(self.app(rate_limit={"default": None}))

        assert client.get("/me", headers=KEY.headers("GET", URL, TOKEN)).status_code == 200


@pytest.fixture(scope="module")
def redis():
    with redis_or_skip() as server:
        yield server


SERVICE = """
import sys
from fastapi.testclient import TestClient
from fastapi_prodkit import Settings, create_app

settings = Settings(
    environment="test",
    auth={"secret": sys.argv[2], "audience": ["orders"], "dpop": "required"},
    rate_limit={"storage_url": sys.argv[1], "storage_timeout": 5},
)
app = create_app(settings)
app.add_api_route("/me", lambda: "ok")
with TestClient(app) as client:
    for line in sys.stdin:
        token, proof = line.split()
        print(client.get("/me", headers={"Authorization": f"DPoP {token}", "DPoP": proof}).status_code, file=sys.stderr)
        sys.stderr.flush()
"""


@pytest.mark.system
def test_dpop_two_processes_refuse_a_replay(redis, tmp_path):
    """The store is a real Redis; when it is gone, both refuse everything."""
    import subprocess
    import sys

    (tmp_path / "service.py").write_text(SERVICE)
    command = [sys.executable, "service.py", redis.url(), SECRET]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]

    def send(index, proof):
        processes[index].stdin.write(f"{TOKEN} {proof}\n")
        processes[index].stdin.flush()
        return int(processes[index].stderr.readline())

    try:
        proofs = [KEY.proof("GET", URL, TOKEN) for _ in range(3)]
        statuses = [send(index, proof) for proof in proofs[:2] for index in (0, 1, 0)]
        redis.kill()
        failing = [send(index, proofs[2]) for index in (0, 1)]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(10)
            process.stderr.close()

    assert statuses == [200, 401, 401] * 2
    assert failing == [503, 503]
