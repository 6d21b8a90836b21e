"""The issuer for tests: a real server with TLS, tokens of every shape, rotation and faults."""

import json
import ssl
import sys
import urllib.request

import pytest

jwt = pytest.importorskip("jwt", reason="the extra auth is not installed")

from fastapi_prodkit.auth.jose import parse
from fastapi_prodkit.auth.presets import PRESETS
from fastapi_prodkit.exceptions import MissingExtraError
from fastapi_prodkit.testing import DPoPKey, Issuer
from fastapi_prodkit.testing.token_shapes import SHAPES


def fetch(issuer, path, context=None):
    with urllib.request.urlopen(f"{issuer.url.rstrip('/')}{path}", context=context or issuer.ssl_context) as answer:
        return answer.headers, json.load(answer)


def claims_of(token):
    return parse(token.encode()).claims


def test_documents_are_served_over_tls():
    """Also to clients that check certificates strictly, as those of Python 3.13 do."""
    with Issuer(max_age=60) as issuer:
        strict = ssl.create_default_context(cadata=issuer.certificate)
        strict.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
        headers, keys = fetch(issuer, "/jwks", strict)
        _, discovery = fetch(issuer, "/.well-known/openid-configuration")

    assert headers["cache-control"] == "public, max-age=60"
    assert [(key["kid"], key["alg"], key["use"], "d" in key) for key in keys["keys"]] == [
        (issuer.key_id, "ES256", "sig", False)
    ]
    assert (discovery["issuer"], discovery["jwks_uri"]) == (issuer.url, f"{issuer.url}/jwks")
    assert issuer.requests == ["/jwks", "/.well-known/openid-configuration"]


def test_every_preset_has_a_shape():
    """So that a new preset gets one, too."""
    assert set(SHAPES) == set(PRESETS)


def test_tokens_are_signed():
    """As another library sees it."""
    with Issuer() as issuer:
        key = issuer.private_key.public_key()
        claims = jwt.decode(issuer.token("bob"), key, algorithms=["ES256"], audience="test-api", issuer=issuer.url)

    assert claims["sub"] == "bob"
    assert claims["exp"] - claims["iat"] == 3600


def test_claims_and_headers_can_be_changed():
    """None leaves one out."""
    with Issuer() as issuer:
        token = issuer.token(email="alice@example.com", scope=None, headers={"kid": None, "x": 1})

    assert jwt.get_unverified_header(token) == {"alg": "ES256", "typ": "at+jwt", "x": 1}
    assert claims_of(token)["email"] == "alice@example.com"
    assert "scope" not in claims_of(token)


def test_keys_rotate():
    """The earlier keys stay published, unless they are withdrawn."""
    with Issuer() as issuer:
        first = issuer.key_id
        issuer.rotate()
        second = issuer.key_id
        both = fetch(issuer, "/jwks")[1]["keys"]
        issuer.rotate(withdraw=True)
        one = fetch(issuer, "/jwks")[1]["keys"]
        token = issuer.token()

    assert [key["kid"] for key in both] == [first, second]
    assert [key["kid"] for key in one] == [issuer.key_id]
    assert parse(token.encode()).key_id == issuer.key_id


def test_issuer_that_starts_again_has_a_key_with_another_id():
    """So that a service, which has cached the first one, fetches it."""
    assert Issuer().key_id != Issuer().key_id


def test_issuer_keeps_its_address_after_a_fault():
    """So that the settings of a service stay right."""
    with Issuer() as issuer:
        url = issuer.url
        with issuer.fault("refused"), pytest.raises(OSError, match="refused"):
            fetch(issuer, "/jwks")

        assert fetch(issuer, "/jwks")
        assert issuer.url == url


def test_settings_accept_the_tokens_of_the_issuer():
    """With further fields."""
    with Issuer("keycloak", audience="orders") as issuer:
        settings = issuer.settings(leeway=5)

    assert (settings.issuer, settings.audience, settings.preset) == ((issuer.url,), ("orders",), ("keycloak",))
    assert (settings.algorithms, settings.leeway) == (("ES256",), 5)


def test_issuer_serves_http_at_a_fixed_port():
    """For services in development."""
    with Issuer() as free:
        port = int(free.url.rpartition(":")[2])
    with Issuer("auth0", tls=False, port=port) as issuer, urllib.request.urlopen(f"{issuer.url}jwks") as answer:
        keys = json.load(answer)["keys"]

    assert issuer.url == f"http://127.0.0.1:{port}/"
    assert len(keys) == 1


def test_missing_extra_is_an_error(monkeypatch):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "jwt", None)

    with pytest.raises(MissingExtraError, match=r"fastapi-prodkit\[auth\]"):
        Issuer()


def test_proof_is_that_of_the_standard():
    """As another library sees it; RFC 9449 section 4.2. None leaves a member out."""
    key = DPoPKey("EdDSA")
    proof = key.proof("GET", "https://a.example/me", "token", nonce="n", jti=None, headers={"kid": "a"})

    header = jwt.get_unverified_header(proof)
    claims = jwt.decode(proof, jwt.PyJWK(header["jwk"], "EdDSA"), algorithms=["EdDSA"])

    assert header == {"typ": "dpop+jwt", "alg": "EdDSA", "jwk": key.jwk, "kid": "a"}
    assert key.jwk.keys() == {"kty", "crv", "x"}
    assert claims == {
        "htm": "GET",
        "htu": "https://a.example/me",
        "ath": "PEaenWxYddN6Q_NT1PiOYfz4EsZu7jRXRlpAsNpBU-A",
        "nonce": "n",
        "iat": claims["iat"],
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_token_is_bound_to_a_key(preset):
    """With the thumbprint of the key; every proof is another one."""
    key = DPoPKey()
    with Issuer(preset) as issuer:
        bound, plain = issuer.token(bound_to=key), issuer.token()

    assert claims_of(bound)["cnf"] == {"jkt": key.thumbprint}
    assert "cnf" not in claims_of(plain)
    assert key.proof("GET", "https://a.example/", bound) != key.proof("GET", "https://a.example/", bound)


def test_headers_of_one_request_are_made():
    """The token and its proof."""
    headers = DPoPKey().headers("GET", "https://a.example/", "token")

    assert headers["Authorization"] == "DPoP token"
    assert headers["DPoP"].count(".") == 2
