"""Verification of whole tokens: real keys of real issuers, and forged tokens of every kind."""

import time

import pytest
from forging import SECRET, base64url, claims, hs256, secret_token, token

jwt = pytest.importorskip("jwt", reason="the extra auth is not installed")
pytest.importorskip("httpx2", reason="the extra auth is not installed")

from cryptography.hazmat.primitives import serialization

from fastapi_prodkit.auth import User
from fastapi_prodkit.auth.presets import PRESETS
from fastapi_prodkit.auth.refusal import Refused
from fastapi_prodkit.auth.tokens import TokenVerifier
from fastapi_prodkit.sections import AuthSettings
from fastapi_prodkit.testing import Issuer


@pytest.fixture(scope="module")
def issuer():
    with Issuer() as issuer:
        yield issuer


@pytest.fixture(scope="module")
def rsa_issuer():
    with Issuer(algorithm="RS256") as issuer:
        yield issuer


def verifier(settings, ssl_context=None):
    return TokenVerifier(settings, user=User, ssl_context=ssl_context, clock=time.time)


def of(issuer, **fields):
    return verifier(issuer.settings(**fields), issuer.ssl_context)


async def code_of(verifier, sent):
    """Return the code with which a token is refused."""
    with pytest.raises(Refused) as caught:
        await verifier.verify(sent if isinstance(sent, bytes) else sent.encode())
    return caught.value.code


@pytest.mark.parametrize("preset", PRESETS)
async def test_token_of_every_preset_is_verified(preset):
    """With roles and scopes, where tokens of that kind have them."""
    with Issuer(preset) as issuer:
        sent = issuer.token("alice", roles=["admin"], scopes=["read", "write"])

        user, key = await of(issuer).verify(sent.encode())

    assert (user.id, user.kind, user.issuer) == ("alice", "user", issuer.url)
    assert user.roles == (set() if preset == "google" else {"admin"})
    assert user.scopes == (set() if preset == "google" else {"read", "write"})
    assert not key.withdrawn


async def test_issuer_without_its_scheme_is_google():
    """The user has the issuer of the settings, so a person is one user under both names."""
    with Issuer("google") as issuer:
        sent = issuer.token(iss=issuer.url.removeprefix("https://"))

        user, _ = await of(issuer).verify(sent.encode())

    assert (user.id, user.issuer) == ("alice", issuer.url)


async def test_issuer_without_its_scheme_is_refused(issuer):
    """By every other preset."""
    assert await code_of(of(issuer), issuer.token(iss=issuer.url.removeprefix("https://"))) == "issuer"


@pytest.mark.parametrize("preset", ["standard", "auth0", "cognito", "entra", "google", "keycloak"])
async def test_token_of_a_client_is_verified(preset):
    """Its id is the client id."""
    with Issuer(preset) as issuer:
        user, _ = await of(issuer).verify(issuer.token(client="billing", is_client=True).encode())

    assert user.kind == "client"
    assert user.id == ("test-api" if preset == "cognito" else "billing")


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES384", "ES512", "EdDSA"])
async def test_token_of_every_algorithm_is_verified(algorithm):
    """That is in AUTH_ALGORITHMS."""
    with Issuer(algorithm=algorithm) as issuer:
        user, _ = await of(issuer).verify(issuer.token().encode())

    assert user.id == "alice"


async def test_algorithm_that_is_not_configured_is_refused(issuer):
    """Even if the issuer has the key."""
    assert await code_of(of(issuer, algorithms=["RS256"]), issuer.token()) == "algorithm"


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "nOnE", ""])
@pytest.mark.parametrize("signature", [b"", b"x"])
async def test_token_without_a_signature_is_refused(algorithm, signature, issuer):
    """In every spelling of `none`; an empty signature is no part of a token."""
    parts = issuer.token().encode().split(b".")
    header = base64url(b'{"alg":"%s","kid":"%s","typ":"at+jwt"}' % (algorithm.encode(), issuer.key_id.encode()))

    sent = b".".join([header, parts[1], base64url(signature)])

    assert await code_of(of(issuer), sent) == ("algorithm" if signature else "malformed")


async def test_public_key_is_no_secret(rsa_issuer):
    """Algorithm confusion: HS256 with the published RSA key, in each of its forms, as the secret."""
    public = rsa_issuer.private_key.public_key()
    forms = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).strip(),
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    ]
    body = claims(iss=rsa_issuer.url, aud=rsa_issuer.audience)
    strict = of(rsa_issuer)

    for form in forms:
        for algorithm, code in (("HS256", "algorithm"), ("RS256", "signature")):
            sent = token({"alg": algorithm, "kid": rsa_issuer.key_id, "typ": "at+jwt"}, body, hs256(form))
            assert await code_of(strict, sent) == code
    assert (await strict.verify(rsa_issuer.token().encode()))[0].id == "alice"


async def test_signature_of_another_key_is_refused(issuer):
    """With the right key id, and with that of a key which is not published."""
    with Issuer() as other:
        header = {"alg": "ES256", "kid": issuer.key_id, "typ": "at+jwt"}
        stranger = other.sign(header, claims(iss=issuer.url, aud="test-api"))
    parts = issuer.token().split(".")

    assert await code_of(of(issuer), stranger) == "signature"
    assert await code_of(of(issuer), issuer.token(headers={"kid": "key-9"})) == "unknown_key"
    assert await code_of(of(issuer), issuer.token(headers={"kid": None})) == "malformed"
    assert await code_of(of(issuer), ".".join([*parts[:2], base64url(bytes(64)).decode()])) == "signature"


async def test_unknown_keys_cause_one_fetch_a_minute():
    """On a real server: a thousand tokens, of as many keys that do not exist."""
    with Issuer() as issuer:
        strict = of(issuer)
        await strict.verify(issuer.token().encode())
        guesses = [issuer.token(headers={"kid": f"guess-{number}"}) for number in range(1000)]
        codes = [await code_of(strict, guess) for guess in guesses]
        before = len(issuer.requests)
        strict.issuers[0]._clock = lambda: time.monotonic() + 60
        codes += [await code_of(strict, guess) for guess in guesses[:100]]
        after = len(issuer.requests)

    assert set(codes) == {"unknown_key"}
    assert (before, after) == (2, 4)  # discovery and key set


async def test_claims_that_were_changed_are_refused(issuer):
    """The signature is of another payload."""
    mine, hers = issuer.token("mallory").split("."), issuer.token("alice").split(".")

    assert await code_of(of(issuer), f"{mine[0]}.{hers[1]}.{mine[2]}") == "signature"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"iss": "https://login.evil.example"}, "issuer"),
        ({"iss": None}, "issuer"),
        ({"aud": "other"}, "audience"),
        ({"aud": None}, "audience"),
        ({"exp": 1}, "claims"),
        ({"exp": None}, "claims"),
        ({"exp": int(time.time()) - 61}, "expired"),
        ({"nbf": int(time.time()) + 3600}, "not_yet_valid"),
        ({"iat": int(time.time()) + 3600}, "not_yet_valid"),
        ({"iat": int(time.time()) * 1000}, "claims"),
        ({"sub": None}, "claims"),
        ({"cnf": {"jkt": "x"}}, "sender_constrained"),
        ({"headers": {"typ": "logout+jwt"}}, "header"),
        ({"headers": {"typ": "JWT"}, "client_id": None, "scope": None}, "not_access_token"),
        ({"headers": {"jku": "https://login.evil.example/keys"}}, "header"),
        ({"headers": {"x5u": "https://login.evil.example/cert"}}, "header"),
        ({"headers": {"jwk": {"kty": "EC"}}}, "header"),
        ({"headers": {"crit": ["exp"]}}, "header"),
    ],
)
async def test_token_that_is_signed_and_wrong_is_refused(changes, code, issuer):
    """With the issuer's own key: no claim and no header is optional because the signature is right."""
    assert await code_of(of(issuer), issuer.token(**changes)) == code


async def test_typ_is_checked_before_keys_are_fetched(issuer):
    """Nothing is fetched for a token that cannot be accepted."""
    before = len(issuer.requests)
    strict = of(issuer)

    codes = [
        await code_of(strict, issuer.token(**changes))
        for changes in ({"headers": {"typ": "x"}}, {"iss": "https://a.example"}, {"headers": {"alg": "RS256"}})
    ]

    assert codes == ["header", "issuer", "algorithm"]
    assert len(issuer.requests) == before


@pytest.mark.parametrize("name", [["x"], {"x": 1}, 1, True])
async def test_issuer_that_is_no_text_is_refused(name, issuer):
    """It cannot be looked up."""
    assert await code_of(of(issuer), issuer.token(iss=name)) == "issuer"


async def test_issuer_is_chosen_by_the_token():
    """Each with its own preset; the key of one issuer signs no token of another one."""
    with Issuer("auth0") as one, Issuer("cognito", audience="client-1") as two:
        two_settings = two.settings()
        both = AuthSettings(
            issuer=(one.url, two.url),
            audience=("test-api", "client-1"),
            preset=("auth0", "cognito"),
            algorithms=["ES256"],
        )
        one.ssl_context.load_verify_locations(cadata=two.certificate)
        strict = verifier(both, one.ssl_context)

        users = [(await strict.verify(issuer.token().encode()))[0] for issuer in (one, two)]

        assert [user.issuer for user in users] == [one.url, two.url]
        assert await code_of(strict, one.token(iss=two.url, headers={"kid": two.key_id})) == "signature"
        assert await code_of(strict, two.token(iss=one.url, headers={"kid": one.key_id})) == "signature"
        assert await code_of(strict, one.token(iss=one.url.rstrip("/"))) == "issuer"
        assert await code_of(verifier(two_settings), one.token()) == "issuer"


async def test_secret_verifies_hs256_only():
    """Whatever key id a token has; there is no issuer."""
    strict = verifier(AuthSettings(secret=SECRET, audience=["orders"]))

    user, _ = await strict.verify(secret_token({"kid": "any"}, roles=["admin"], scope="read").encode())

    assert user == User(
        "alice", roles=frozenset({"admin"}), scopes=frozenset({"read"}), issuer=None, expires_at=user.expires_at
    )
    body = claims()
    assert await code_of(strict, token({"alg": "HS512"}, body, hs256())) == "algorithm"
    assert await code_of(strict, token({"alg": "none"}, body)) == "algorithm"
    assert await code_of(strict, token({"alg": "HS256"}, body, hs256("y" * 32))) == "signature"
    assert await code_of(strict, token({"alg": "HS256"}, body, lambda signed: b"")) == "malformed"
    assert await code_of(strict, secret_token(aud="other")) == "audience"
    assert await code_of(strict, secret_token(exp=None)) == "claims"


async def test_tokens_of_pyjwt_are_accepted():
    """As a small service makes them, without an audience and without `iat`."""
    strict = verifier(AuthSettings(secret=SECRET))
    sent = jwt.encode({"sub": "alice", "exp": int(time.time()) + 60}, SECRET, algorithm="HS256")

    assert (await strict.verify(sent.encode()))[0].id == "alice"
