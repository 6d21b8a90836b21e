"""Claims of a token whose signature is right: when it is valid, for whom, and whose it is."""

import pytest

from fastapi_prodkit.auth import User
from fastapi_prodkit.auth.claims import ClaimRules
from fastapi_prodkit.auth.jose import Token
from fastapi_prodkit.auth.presets import PRESETS, SHARED_SECRET
from fastapi_prodkit.auth.refusal import Refused

NOW = 1_800_000_000.0
ISSUER = "https://login.example.com"
CLAIMS = {
    "iss": ISSUER,
    "sub": "alice",
    "aud": "orders",
    "client_id": "web",
    "iat": NOW - 10,
    "exp": NOW + 600,
    "scope": "read write",
    "roles": ["admin"],
}


def rules(preset=PRESETS["standard"], issuer=ISSUER, audience=("orders",), leeway=60, user=User, **more):
    return ClaimRules(preset, issuer=issuer, audience=audience, leeway=leeway, user=user, **more)


def token(typ="at+jwt", **claims):
    """Return a token with these claims changed; None leaves one out."""
    found = {name: value for name, value in (CLAIMS | claims).items() if value is not None}
    return Token("RS256", "k1", typ, found, b"", b"")


@pytest.fixture
def refused():
    """Return the code with which a token is refused."""

    def refused(sent, given=None):
        with pytest.raises(Refused) as caught:
            (given or rules()).user(sent, NOW)
        assert caught.value.is_forgery == (caught.value.code in {"issuer", "header"})
        return caught.value.code

    return refused


def test_user_has_what_the_token_says():
    """Id, kind, roles, scopes, issuer, expiry, and all claims."""
    user = rules().user(token(), NOW)

    assert user == User(
        "alice",
        roles=frozenset({"admin"}),
        scopes=frozenset({"read", "write"}),
        issuer=ISSUER,
        expires_at=NOW + 600,
    )
    assert dict(user.claims) == CLAIMS


def test_user_is_of_the_given_class():
    """A subclass reads further claims."""

    class Employee(User):
        @property
        def email(self):
            return self.claims["email"]

    user = rules(user=Employee).user(token(email="alice@example.com"), NOW)

    assert type(user) is Employee
    assert user.email == "alice@example.com"


@pytest.mark.parametrize(
    "issuer", [None, "", ISSUER + "/", ISSUER.upper(), "https://login.example.com.evil", 1, [ISSUER]]
)
def test_other_issuer_is_refused(issuer, refused):
    """The `iss` is compared exactly."""
    assert refused(token(iss=issuer)) == "issuer"


@pytest.mark.parametrize("audience", ["orders", ["orders"], ["other", "orders"]])
def test_audience_is_text_or_a_list(audience):
    """RFC 7519 section 4.1.3."""
    assert rules(audience=("billing", "orders")).user(token(aud=audience), NOW).id == "alice"


@pytest.mark.parametrize(
    "audience", [None, "", "order", "ORDERS", "orders ", ["other"], [], {"orders": 1}, 1, ["orders", 1], [["orders"]]]
)
def test_other_audience_is_refused(audience, refused):
    """Missing, wrong, or no text."""
    assert refused(token(aud=audience)) == "audience"


def test_secret_without_an_audience_accepts_tokens_without_one(refused):
    """A token for somebody else is refused even then (RFC 7519 section 4.1.3)."""
    without = rules(SHARED_SECRET, issuer=None, audience=())

    assert without.user(token("jwt", aud=None, iss=None), NOW).issuer is None
    assert refused(token("jwt", iss=None), without) == "audience"


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"exp": None}, "claims"),
        ({"exp": NOW - 60}, "expired"),
        ({"exp": NOW - 59}, None),
        ({"nbf": NOW + 60}, None),
        ({"nbf": NOW + 61}, "not_yet_valid"),
        ({"iat": NOW + 60}, None),
        ({"iat": NOW + 61}, "not_yet_valid"),
        ({"iat": None}, None),
        ({"nbf": NOW - 1e6, "iat": NOW - 1e6}, None),
        ({"exp": NOW + 599.5}, None),
    ],
)
def test_dates_are_checked_with_a_leeway(claims, code, refused):
    """Expired is at `exp` plus 60 s; `nbf` and `iat` may be 60 s in the future."""
    if code is None:
        assert rules().user(token(**claims), NOW).id == "alice"
    else:
        assert refused(token(**claims)) == code


def test_leeway_can_be_none(refused):
    """With AUTH_LEEWAY=0 the dates are exact."""
    exact = rules(leeway=0)

    assert exact.user(token(exp=NOW + 0.1, nbf=NOW, iat=NOW), NOW).id == "alice"
    assert refused(token(exp=NOW), exact) == "expired"
    assert refused(token(nbf=NOW + 0.1), exact) == "not_yet_valid"


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize(
    "value", [True, False, "1800000600", [], {}, NOW * 1000, 0, -1, NOW - 4e8, NOW + 4e8, 10**400, -(10**400)]
)
def test_absurd_date_is_refused(name, value, refused):
    """Booleans, text, milliseconds, zero, and more than ten years away."""
    assert refused(token(**{name: value})) == "claims"


def test_null_date_is_refused(refused):
    """It is not the same as none."""
    sent = token()
    sent.claims["nbf"] = None

    assert refused(sent) == "claims"


@pytest.mark.parametrize(
    "subject", [None, "", 1, ["alice"], "a" * 256, "alice\nlevel=ERROR", "\ud800", "alice\x1b[31m"]
)
def test_subject_that_is_no_plain_text_is_refused(subject, refused):
    """It is written into logs."""
    assert refused(token(sub=subject)) == "claims"


def test_token_that_is_bound_to_a_key_is_refused(refused):
    """RFC 9449 section 7.1: as a bearer token it would be worth stealing."""
    assert refused(token(cnf={"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"})) == "sender_constrained"


JKT = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"


def test_token_that_is_bound_to_the_key_of_its_proof_is_accepted():
    """RFC 9449 section 6.1."""
    assert rules().user(token(cnf={"jkt": JKT}), NOW, JKT).id == "alice"


@pytest.mark.parametrize(
    ("cnf", "code"),
    [
        (None, "not_bound"),
        ({"jkt": JKT[::-1]}, "proof_key"),
        ({"x5t#S256": JKT}, "sender_constrained"),
        ({"jkt": JKT, "x5t#S256": JKT}, "sender_constrained"),
        (JKT, "sender_constrained"),
    ],
)
def test_proof_of_another_key_than_the_tokens_is_refused(cnf, code):
    """And a proof for a token that is not bound, or that needs a proof of another kind as well."""
    with pytest.raises(Refused) as caught:
        rules().user(token(**({} if cnf is None else {"cnf": cnf})), NOW, JKT)

    assert caught.value.code == code


def test_client_is_known_by_its_client_id():
    """RFC 9068 section 2.2: the subject of a client's own token is the client."""
    user = rules().user(token(sub="web"), NOW)

    assert (user.kind, user.id) == ("client", "web")


@pytest.mark.parametrize(
    ("claims", "more", "roles"),
    [
        ({"roles": "admin"}, {}, {"admin"}),
        ({"roles": "admin editor"}, {}, {"admin editor"}),  # one role, exactly as it is written
        ({"roles": ["admin", 1, None, ["x"], {"y": 1}]}, {}, {"admin"}),
        ({"roles": {"admin": True}}, {}, set()),
        ({"roles": None}, {}, set()),
        ({"realm": {"roles": ["a"]}}, {"roles": ("realm.roles",)}, {"a"}),
        ({"realm": ["a"]}, {"roles": ("realm.roles",)}, set()),
        ({"realm": {"roles": ["a"]}}, {"roles": ("realm.roles", "roles")}, {"a", "admin"}),
        ({"https://a.example/roles": ["a"]}, {"roles": ("https://a.example/roles",)}, {"a"}),
    ],
)
def test_roles_are_read_from_claims(claims, more, roles):
    """A list, or one text; a dot leads into an object, except in a URL. Other values are no roles."""
    assert rules(**more).user(token(**claims), NOW).roles == roles


@pytest.mark.parametrize(
    ("claims", "more", "scopes"),
    [
        ({"scope": "read  write"}, {}, {"read", "write"}),
        ({"scope": ["read", "write"]}, {}, {"read", "write"}),
        ({"scope": None, "scp": ["read"]}, {}, {"read"}),
        ({"scope": 1}, {}, set()),
        ({"permissions": ["read"]}, {"scopes": ("permissions",)}, {"read"}),
    ],
)
def test_scopes_are_read_from_claims(claims, more, scopes):
    """Words with spaces between them, or a list."""
    assert rules(**more).user(token(**claims), NOW).scopes == scopes


@pytest.mark.parametrize(
    ("typ", "accepted"),
    [("at+jwt", True), ("jwt", True), ("", True), ("dpop+jwt", False), ("logout+jwt", False), ("jws", False)],
)
def test_type_of_another_kind_of_token_is_refused(typ, accepted):
    """RFC 8725 section 3.11."""
    if accepted:
        rules().check_type(token(typ))
        return
    with pytest.raises(Refused) as caught:
        rules().check_type(token(typ))
    assert caught.value.code == "header"


def test_claims_cannot_be_changed():
    """The same user is given to every request with its token."""
    user = rules().user(token(), NOW)

    with pytest.raises(TypeError):
        user.claims["sub"] = "bob"
