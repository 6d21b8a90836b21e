"""The key in the header of a DPoP proof: public, of a reasonable size, and named by its thumbprint."""

import base64

import pytest

pytest.importorskip("jwt", reason="the extra auth is not installed")

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fastapi_prodkit.auth.proof_keys import ALGORITHMS, ProofKeys
from fastapi_prodkit.auth.refusal import Refused
from fastapi_prodkit.testing import DPoPKey
from fastapi_prodkit.testing.signing import public_jwk

ES256 = DPoPKey()
RS256 = DPoPKey("RS256")


@pytest.fixture
def keys():
    return ProofKeys()


def code_of(keys, algorithm, jwk):
    with pytest.raises(Refused) as caught:
        keys.read(algorithm, jwk)
    return caught.value.code


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_key_verifies_what_its_client_has_signed(algorithm, keys):
    """For each of the algorithms that challenges name."""
    client = DPoPKey(algorithm)
    proof = client.proof("GET", "https://a/", "token").encode()
    signed, _, signature = proof.rpartition(b".")

    key, thumbprint = keys.read(algorithm, client.jwk)
    key.verify(signed, base64.urlsafe_b64decode(signature + b"=="))

    assert thumbprint == client.thumbprint
    assert len(thumbprint) == 43


def test_thumbprint_is_that_of_the_standard(keys):
    """The example of RFC 7638 section 3.1, whose further members do not count."""
    jwk = {
        "kty": "RSA",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjB"
        "ZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8"
        "KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_"
        "xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
        "e": "AQAB",
        "alg": "RS256",
        "kid": "2011-04-29",
    }

    _, thumbprint = keys.read("RS256", jwk)

    assert thumbprint == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_key_is_parsed_once(keys):
    """Clients use one key for many proofs; as a key of another algorithm it is another one."""
    first, again, other = (keys.read(name, RS256.jwk)[0] for name in ("RS256", "RS256", "PS256"))

    assert first is again
    assert other is not first


@pytest.mark.parametrize("algorithm", ["none", "", "HS256", "RS384", "PS512", "ES256K", "EdDSA448", "es256"])
def test_other_algorithm_is_refused(algorithm, keys):
    """Above all the symmetric ones, with which anybody could sign who knows the public key."""
    assert code_of(keys, algorithm, ES256.jwk) == "algorithm"


@pytest.mark.parametrize("name", ["d", "p", "q", "dp", "dq", "qi", "oth", "k"])
def test_private_key_is_refused(name, keys):
    """It is known to everybody who has seen the proof."""
    assert code_of(keys, "ES256", {**ES256.jwk, name: "AQAB"}) == "header"


@pytest.mark.parametrize(
    ("algorithm", "jwk"),
    [
        ("ES256", None),
        ("ES256", "text"),
        ("ES256", []),
        ("ES256", {}),
        ("ES256", {"kty": []}),
        ("ES256", {"kty": "oct", "k": "AQAB"}),
        ("ES384", ES256.jwk),
        ("RS256", ES256.jwk),
        ("EdDSA", ES256.jwk),
        ("ES256", RS256.jwk),
        ("ES256", {**ES256.jwk, "alg": "ES384"}),
        ("ES256", {**ES256.jwk, "use": "enc"}),
        ("ES256", {**ES256.jwk, "key_ops": ["sign"]}),
        ("ES256", {**ES256.jwk, "x": 1}),
        ("ES256", {**ES256.jwk, "x": ""}),
        ("ES256", {**ES256.jwk, "x": f"{ES256.jwk['x']}="}),
        ("ES256", {**ES256.jwk, "x": f"{ES256.jwk['x']}\n"}),
        ("ES256", {**ES256.jwk, "x": ES256.jwk["x"][:-4]}),
        ("ES256", {**ES256.jwk, "x": "A" * 89}),
        ("ES256", {**ES256.jwk, "y": ES256.jwk["x"]}),  # not on the curve
        ("ES256", {**ES256.jwk, "crv": "secp256k1"}),
        ("ES256", {name: value for name, value in ES256.jwk.items() if name != "y"}),
        ("RS256", {**RS256.jwk, "crv": "P-256"}),
        ("RS256", {**RS256.jwk, "e": "AQAAAAAAAAAB"}),
        ("RS256", {**RS256.jwk, "e": "AQ"}),
    ],
)
def test_key_that_does_not_fit_is_refused(algorithm, jwk, keys):
    """Of another type, curve or purpose, incomplete, or written in another way."""
    assert code_of(keys, algorithm, jwk) == "header"


@pytest.mark.parametrize("bits", [1024, 5120])
def test_rsa_key_of_another_size_is_refused(bits, keys):
    """A small one can be factored, and a large one takes milliseconds for each proof."""
    jwk = public_jwk("RS256", rsa.generate_private_key(public_exponent=65537, key_size=1024))
    if bits > 1024:
        jwk["n"] = base64.urlsafe_b64encode(b"\xff" * (bits // 8)).rstrip(b"=").decode()

    assert code_of(keys, "RS256", jwk) == "header"


def test_key_of_another_curve_is_refused(keys):
    """PyJWT knows more curves than these."""
    jwk = {**ES256.jwk, **public_jwk("ES256", ec.generate_private_key(ec.SECP256K1()))}

    assert code_of(keys, "ES256", jwk) == "header"


def test_number_of_parsed_keys_is_bounded(keys):
    """A client can send any number of keys."""
    assert keys._parsed.cache_info().maxsize == 1024
