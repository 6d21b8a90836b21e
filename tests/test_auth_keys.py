"""Keys of issuers: which are used, for which algorithm, and that no other signature passes."""

import hashlib
import hmac
import logging

import pytest

jwt = pytest.importorskip("jwt", reason="the extra auth is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from fastapi_prodkit.auth.keys import Key, read_keys, secret_key
from fastapi_prodkit.auth.refusal import Refused

ALL = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PRIVATE = {
    **dict.fromkeys(ALL[:6], RSA),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
SIGNED = b"header.payload"


def jwk(algorithm, key=None, **members):
    public = (key or PRIVATE[algorithm]).public_key()
    return {**jwt.get_algorithm_by_name(algorithm).to_jwk(public, as_dict=True), "kid": "k1", **members}


def usable(*entries, algorithms=ALL, known=None):
    return read_keys({"keys": list(entries)}, algorithms, "https://login.example.com", known or {})


def sign(algorithm, key=None):
    return jwt.get_algorithm_by_name(algorithm).sign(SIGNED, key or PRIVATE[algorithm])


@pytest.mark.parametrize("algorithm", ALL)
def test_key_verifies_its_own_signature_only(algorithm):
    """Of every algorithm; one byte changed in what is signed, or in the signature, is refused."""
    key = usable(jwk(algorithm))["k1", algorithm]
    signature = sign(algorithm)

    key.verify(SIGNED, signature)

    changed = bytes([signature[0] ^ 1]) + signature[1:]
    for signed, given in ((SIGNED + b"x", signature), (SIGNED, changed), (SIGNED, b""), (SIGNED, signature[:-1])):
        with pytest.raises(Refused) as caught:
            key.verify(signed, given)
        assert caught.value.code == "signature"


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512"])
def test_signature_of_zeros_is_refused(algorithm):
    """CVE-2022-21449: r and s of 0 satisfy the equation of ECDSA unless they are checked."""
    length = {"ES256": 64, "ES384": 96, "ES512": 132}[algorithm]
    order = {"ES256": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551}.get(algorithm, 0)
    key = usable(jwk(algorithm))["k1", algorithm]
    half = length // 2

    for r, s in ((0, 0), (0, 1), (1, 0), (order, order)):
        with pytest.raises(Refused):
            key.verify(SIGNED, r.to_bytes(half, "big") + s.to_bytes(half, "big"))


def test_public_key_is_no_secret():
    """Algorithm confusion: a public key as the secret of an HMAC, in every form in which it is published."""
    entry = jwk("RS256")
    public = RSA.public_key()
    forms = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
        entry["n"].encode(),
    ]
    keys = usable(entry)

    assert ("k1", "HS256") not in keys
    for form in forms:
        for key in keys.values():
            with pytest.raises(Refused):
                key.verify(SIGNED, hmac.new(form, SIGNED, hashlib.sha256).digest())


def test_key_serves_the_accepted_algorithms_of_its_kind():
    """By type, by curve, and by its own `alg` if it has one."""
    assert set(usable(jwk("RS256"))) == {("k1", name) for name in ALL[:6]}
    assert set(usable(jwk("RS256"), algorithms=("RS256", "ES256"))) == {("k1", "RS256")}
    assert set(usable(jwk("RS256", alg="PS256"))) == {("k1", "PS256")}
    assert set(usable(jwk("ES384"))) == {("k1", "ES384")}
    assert set(usable(jwk("EdDSA"), jwk("ES256", kid="k2"))) == {("k1", "EdDSA"), ("k2", "ES256")}


UNUSABLE = {
    "no object": "text",
    "no key id": {**jwk("ES256"), "kid": None},
    "for encryption": jwk("RS256", use="enc"),
    "for signing": jwk("ES256", key_ops=["sign"]),
    "with operations that are no list": jwk("ES256", key_ops="verify"),
    "for another algorithm": jwk("ES256", alg="ES384"),
    "for ECDH": jwk("ES256", alg="ECDH-ES"),
    "symmetric": {"kty": "oct", "k": "c2VjcmV0", "kid": "k1"},
    "symmetric, in disguise": {**jwk("ES256"), "k": "c2VjcmV0"},
    "private": {**jwk("ES256"), "d": jwk("ES256")["x"]},
    "RSA of 1024 bits": jwk("RS256", rsa.generate_private_key(public_exponent=65537, key_size=1024)),
    "RSA with exponent 1": {**jwk("RS256"), "e": "AQ"},
    "RSA without modulus": {"kty": "RSA", "e": "AQAB", "kid": "k1"},
    "RSA of 16384 bits": {**jwk("RS256"), "n": "_" * 2731},
    "RSA with a curve": jwk("RS256", crv="P-256"),
    "secp256k1": jwk("ES256K", ec.generate_private_key(ec.SECP256K1())),
    "Ed448": jwk("EdDSA", ed448.Ed448PrivateKey.generate()),
    "a point that is not on the curve": {**jwk("ES256"), "x": jwk("ES256")["y"]},
    "with a wrong length": {**jwk("ES256"), "x": "AA"},
    "of an unknown type": {"kty": "AKP", "kid": "k1"},
    "with a kty that is no text": {"kty": ["EC"], "crv": "P-256", "kid": "k1"},
}


@pytest.mark.parametrize("entry", UNUSABLE.values(), ids=UNUSABLE)
def test_key_that_cannot_be_used_is_left_out(entry, caplog):
    """The others are used, and one line says that there was one."""
    caplog.set_level(logging.INFO, "fastapi_prodkit.auth")

    keys = usable(entry, jwk("ES256", kid="good"))

    assert set(keys) == {("good", "ES256")}
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["https"]


def test_line_about_unusable_keys_is_written_once(caplog):
    """With the types, which are cut, and no other member."""
    caplog.set_level(logging.INFO, "fastapi_prodkit.auth")

    usable("x", {"kty": "oct", "k": "s3cret"}, {"kty": "oct"}, {"kty": "y" * 1000})

    (line,) = caplog.messages
    assert line.startswith("https://login.example.com has keys that verify no token here: no object, oct, yyy")
    assert len(line) < 300
    assert "s3cret" not in line


@pytest.mark.parametrize("document", [None, [], {}, {"keys": None}, {"keys": {}}, {"keys": [{}] * 101}, "keys"])
def test_document_that_is_no_key_set_is_an_error(document):
    """And so is a set of more than 100 keys."""
    with pytest.raises(ValueError, match="not a set of at most 100 keys"):
        read_keys(document, ALL, "https://login.example.com", {})


def test_key_that_has_not_changed_is_kept():
    """So that tokens that were verified with it stay verified; a key with the same id and other material is new."""
    before = usable(jwk("ES256"), jwk("EdDSA", kid="k2"))

    after = usable(jwk("ES256"), jwk("EdDSA", ed25519.Ed25519PrivateKey.generate(), kid="k2"), known=before)

    assert after["k1", "ES256"] is before["k1", "ES256"]
    assert after["k2", "EdDSA"] is not before["k2", "EdDSA"]


def test_shared_secret_verifies_hs256():
    """And nothing that was signed with another secret."""
    key = secret_key("x" * 32)

    key.verify(SIGNED, hmac.new(b"x" * 32, SIGNED, hashlib.sha256).digest())

    with pytest.raises(Refused):
        key.verify(SIGNED, hmac.new(b"y" * 32, SIGNED, hashlib.sha256).digest())


def test_key_of_the_wrong_type_cannot_be_made():
    """PyJWT checks the type of a key and its curve for the algorithm."""
    for algorithm, other in (("RS256", "ES256"), ("ES256", "RS256"), ("ES256", "ES384"), ("EdDSA", "ES256")):
        with pytest.raises((TypeError, jwt.InvalidKeyError)):
            Key(algorithm, PRIVATE[other].public_key())
