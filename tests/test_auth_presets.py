"""Presets, with tokens in the shape in which each vendor documents them: access tokens pass, ID tokens do not.

Sources of the shapes, beside those of `auth.presets`; the values are invented:

    auth0      https://auth0.com/docs/secure/tokens/access-tokens/access-token-profiles
    clerk      https://clerk.com/docs/guides/sessions/session-tokens
               https://clerk.com/docs/guides/sessions/jwt-templates
    cognito    https://docs.aws.amazon.com/cognito/latest/developerguide/amazon-cognito-user-pools-using-the-access-token.html
               https://docs.aws.amazon.com/cognito/latest/developerguide/cognito-user-pools-define-resource-servers.html
    entra      https://learn.microsoft.com/entra/identity-platform/access-token-claims-reference
               https://learn.microsoft.com/entra/identity-platform/optional-claims-reference
    google     https://developers.google.com/identity/gsi/web/guides/verify-google-id-token
               https://cloud.google.com/docs/authentication/token-types
    keycloak   https://www.keycloak.org/docs/latest/server_admin
    okta       https://developer.okta.com/docs/reference/api/oidc
"""

import pytest

from fastapi_prodkit.auth import User
from fastapi_prodkit.auth.claims import ClaimRules
from fastapi_prodkit.auth.jose import Token
from fastapi_prodkit.auth.presets import PRESETS, claim_at
from fastapi_prodkit.auth.refusal import Refused

NOW = 1_800_000_000
DATES = {"iat": NOW - 10, "exp": NOW + 3600}
AUTH0 = "https://example.eu.auth0.com/"
COGNITO = "https://cognito-idp.eu-central-1.amazonaws.com/eu-central-1_Example"
ENTRA = "https://login.microsoftonline.com/11112222-bbbb-3333-cccc-4444dddd5555/v2.0"
KEYCLOAK = "https://sso.example.com/realms/shop"
GOOGLE = "https://accounts.google.com"
CLERK = "https://clerk.example.com"
STANDARD = "https://login.example.com"

# preset, AUTH_AUDIENCE, header's typ, claims, and the user.
ACCESS = {
    # RFC 9068 figure 2
    "RFC 9068": (
        "standard",
        "https://rs.example.com/",
        "at+jwt",
        {
            "iss": STANDARD,
            "aud": "https://rs.example.com/",
            "sub": "5ba552d67",
            "client_id": "s6BhdRkqt3",
            "scope": "openid profile reademail",
            "jti": "dbe39bf3a3ba4238a513f51d6e1691c4",
        },
        User("5ba552d67", scopes=frozenset({"openid", "profile", "reademail"}), issuer=STANDARD),
    ),
    # Okta, custom authorization server: neither typ nor client_id, but cid and a list in scp
    "Okta": (
        "standard",
        "api://default",
        "",
        {
            "ver": 1,
            "jti": "AT.0mP4JKAZX1iACIT4vbEDF7LpvDVjxypPMf0D7uX39RE",
            "iss": STANDARD,
            "aud": "api://default",
            "cid": "nmdP1fcyvdVO11AL7ECm",
            "uid": "00ugrenMeqvYla4HW0g3",
            "scp": ["openid", "email"],
            "sub": "john@example.com",
        },
        User("john@example.com", scopes=frozenset({"openid", "email"}), issuer=STANDARD),
    ),
    "Okta for a client": (
        "standard",
        "api://default",
        "",
        {"ver": 1, "iss": STANDARD, "aud": "api://default", "cid": "0oa1", "scp": ["customScope"], "sub": "0oa1"},
        User("0oa1", kind="client", scopes=frozenset({"customScope"}), issuer=STANDARD),
    ),
    "Auth0": (
        "auth0",
        "https://api.example.com",
        "jwt",
        {
            "iss": AUTH0,
            "sub": "auth0|62f3a1",
            "aud": ["https://api.example.com", f"{AUTH0}userinfo"],
            "azp": "my_client_id",
            "scope": "openid read:reports",
            "permissions": ["read:reports", "delete:reports"],
        },
        User(
            "auth0|62f3a1",
            roles=frozenset({"read:reports", "delete:reports"}),
            scopes=frozenset({"openid", "read:reports"}),
            issuer=AUTH0,
        ),
    ),
    "Auth0 for a client": (
        "auth0",
        "https://api.example.com",
        "jwt",
        {
            "iss": AUTH0,
            "sub": "my_client_id@clients",
            "aud": "https://api.example.com",
            "azp": "my_client_id",
            "gty": "client-credentials",
            "scope": "read:reports",
        },
        User("my_client_id", kind="client", scopes=frozenset({"read:reports"}), issuer=AUTH0),
    ),
    # Without `gty`, which the profile has "only for password and refresh_token".
    "Auth0 for a client, by its subject": (
        "auth0",
        "https://api.example.com",
        "jwt",
        {"iss": AUTH0, "sub": "my_client_id@clients", "aud": "https://api.example.com", "azp": "my_client_id"},
        User("my_client_id", kind="client", issuer=AUTH0),
    ),
    "Auth0 for a client with the profile of RFC 9068": (
        "auth0",
        "https://api.example.com",
        "at+jwt",
        {
            "iss": AUTH0,
            "sub": "my_client_id@clients",
            "aud": "https://api.example.com",
            "client_id": "my_client_id",
            "jti": "73WakrfVbNJBaAmhQtEeDv",
            "scope": "read:reports",
            "permissions": ["read:reports"],
        },
        User(
            "my_client_id",
            kind="client",
            roles=frozenset({"read:reports"}),
            scopes=frozenset({"read:reports"}),
            issuer=AUTH0,
        ),
    ),
    "Auth0 with the profile of RFC 9068": (
        "auth0",
        "https://api.example.com",
        "at+jwt",
        {
            "iss": AUTH0,
            "sub": "auth0|62f3a1",
            "aud": "https://api.example.com",
            "client_id": "my_client_id",
            "jti": "73WakrfVbNJBaAmhQtEeDv",
            "scope": "read:reports",
        },
        User("auth0|62f3a1", scopes=frozenset({"read:reports"}), issuer=AUTH0),
    ),
    "Cognito": (
        "cognito",
        "xxxxxxxxxxxxexample",
        "",
        {
            "sub": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "device_key": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "cognito:groups": ["admin"],
            "iss": COGNITO,
            "version": 2,
            "client_id": "xxxxxxxxxxxxexample",
            "origin_jti": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "event_id": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "token_use": "access",
            "scope": "phone openid profile email",
            "auth_time": NOW - 10,
            "jti": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "username": "my-test-user",
        },
        User(
            "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            roles=frozenset({"admin"}),
            scopes=frozenset({"phone", "openid", "profile", "email"}),
            issuer=COGNITO,
        ),
    ),
    # The app has asked for `resource=https://orders.example.com`.
    "Cognito with resource binding": (
        "cognito",
        ["xxxxxxxxxxxxexample", "https://orders.example.com"],
        "",
        {
            "sub": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "iss": COGNITO,
            "version": 2,
            "client_id": "xxxxxxxxxxxxexample",
            "aud": "https://orders.example.com",
            "origin_jti": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "token_use": "access",
            "scope": "https://orders.example.com/read",
            "username": "my-test-user",
        },
        User(
            "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            scopes=frozenset({"https://orders.example.com/read"}),
            issuer=COGNITO,
        ),
    ),
    "Cognito for a client": (
        "cognito",
        "xxxxxxxxxxxxexample",
        "",
        {
            "sub": "xxxxxxxxxxxxexample",
            "token_use": "access",
            "scope": "reports/read",
            "auth_time": NOW - 10,
            "iss": COGNITO,
            "version": 2,
            "jti": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "client_id": "xxxxxxxxxxxxexample",
        },
        User("xxxxxxxxxxxxexample", kind="client", scopes=frozenset({"reports/read"}), issuer=COGNITO),
    ),
    # The same app registration is the client and the API, as in many small tenants.
    "Entra ID": (
        "entra",
        "00001111-aaaa-2222-bbbb-3333cccc4444",
        "jwt",
        {
            "aud": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "iss": ENTRA,
            "nbf": NOW - 10,
            "aio": "AXQAi/8IAAAAFm+E/QTG+gFnVxLjWdw8K+61AGrSOuMMF6ebaMj7XO3I",
            "azp": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "azpacr": "0",
            "name": "Abe Lincoln",
            "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
            "preferred_username": "abeli@microsoft.com",
            "rh": "I",
            "roles": ["Reports.Author"],
            "scp": "access_as_user",
            "sub": "HKZpfaHyWadeOouYlitjrI-KffTm222X5rrV3xDqfKQ",
            "tid": "11112222-bbbb-3333-cccc-4444dddd5555",
            "uti": "fqiBqXLPj0eQa82S-IYFAA",
            "ver": "2.0",
        },
        User(
            "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
            roles=frozenset({"Reports.Author"}),
            scopes=frozenset({"access_as_user"}),
            issuer=ENTRA,
        ),
    ),
    "Entra ID for a client": (
        "entra",
        "00001111-aaaa-2222-bbbb-3333cccc4444",
        "jwt",
        {
            "aud": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "iss": ENTRA,
            "nbf": NOW - 10,
            "azp": "22223333-cccc-4444-dddd-5555eeee6666",
            "azpacr": "1",
            "oid": "bbbbbbbb-1111-2222-3333-cccccccccccc",
            "roles": ["Reports.Read.All"],
            "sub": "bbbbbbbb-1111-2222-3333-cccccccccccc",
            "tid": "11112222-bbbb-3333-cccc-4444dddd5555",
            "ver": "2.0",
        },
        User(
            "22223333-cccc-4444-dddd-5555eeee6666",
            kind="client",
            roles=frozenset({"Reports.Read.All"}),
            issuer=ENTRA,
        ),
    ),
    # With the optional claim `idtyp`, and roles of the directory and groups, which are no roles of the API.
    "Entra ID for a client, by its idtyp": (
        "entra",
        "00001111-aaaa-2222-bbbb-3333cccc4444",
        "jwt",
        {
            "aud": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "iss": ENTRA,
            "nbf": NOW - 10,
            "azp": "22223333-cccc-4444-dddd-5555eeee6666",
            "azpacr": "2",
            "idtyp": "app",
            "oid": "bbbbbbbb-1111-2222-3333-cccccccccccc",
            "sub": "bbbbbbbb-1111-2222-3333-cccccccccccc",
            "tid": "11112222-bbbb-3333-cccc-4444dddd5555",
            "wids": ["0997a1d0-0d1d-4acb-b408-d5ca73121e90"],
            "groups": ["cccccccc-2222-3333-4444-dddddddddddd"],
            "ver": "2.0",
        },
        User("22223333-cccc-4444-dddd-5555eeee6666", kind="client", issuer=ENTRA),
    ),
    "Entra ID for a person, by the idtyp": (
        "entra",
        "00001111-aaaa-2222-bbbb-3333cccc4444",
        "jwt",
        {
            "aud": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "iss": ENTRA,
            "azp": "22223333-cccc-4444-dddd-5555eeee6666",
            "idtyp": "user",
            "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
            "sub": "HKZpfaHyWadeOouYlitjrI-KffTm222X5rrV3xDqfKQ",
            "ver": "2.0",
        },
        User("aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb", issuer=ENTRA),
    ),
    "Keycloak": (
        "keycloak",
        "orders",
        "jwt",
        {
            "auth_time": NOW - 10,
            "jti": "onrtac:1c1d8aaf",
            "iss": KEYCLOAK,
            "aud": ["orders", "account"],
            "sub": "f:1c1d8aaf:alice",
            "typ": "Bearer",
            "azp": "web",
            "sid": "8f0e2c6a",
            "acr": "1",
            "allowed-origins": ["https://app.example.com"],
            "realm_access": {"roles": ["offline_access", "author"]},
            "resource_access": {"account": {"roles": ["manage-account"]}},
            "scope": "openid email profile",
            "email_verified": True,
            "preferred_username": "alice",
        },
        User(
            "f:1c1d8aaf:alice",
            roles=frozenset({"offline_access", "author"}),
            scopes=frozenset({"openid", "email", "profile"}),
            issuer=KEYCLOAK,
        ),
    ),
    "Keycloak for a service account": (
        "keycloak",
        "orders",
        "jwt",
        {
            "iss": KEYCLOAK,
            "aud": "orders",
            "sub": "c1b5a1c2",
            "typ": "Bearer",
            "azp": "billing",
            "realm_access": {"roles": ["author"]},
            "scope": "email profile",
            "clientHost": "10.0.0.1",
            "preferred_username": "service-account-billing",
            "clientAddress": "10.0.0.1",
            "client_id": "billing",
        },
        User(
            "billing",
            kind="client",
            roles=frozenset({"author"}),
            scopes=frozenset({"email", "profile"}),
            issuer=KEYCLOAK,
        ),
    ),
    # "Use at+jwt as access token header type", and a lightweight token, which has no roles unless a mapper adds them.
    "Keycloak, lightweight": (
        "keycloak",
        "orders",
        "at+jwt",
        {
            "jti": "onltac:1c1d8aaf",
            "iss": KEYCLOAK,
            "aud": "orders",
            "sub": "f:1c1d8aaf:alice",
            "typ": "Bearer",
            "azp": "web",
            "sid": "8f0e2c6a",
            "scope": "openid",
        },
        User("f:1c1d8aaf:alice", scopes=frozenset({"openid"}), issuer=KEYCLOAK),
    ),
    # The only one that is an ID token.
    "Google": (
        "google",
        "1234987819200.apps.googleusercontent.com",
        "jwt",
        {
            "iss": GOOGLE,
            "azp": "1234987819200.apps.googleusercontent.com",
            "aud": "1234987819200.apps.googleusercontent.com",
            "sub": "10769150350006150715113082367",
            "at_hash": "HK6E_P6Dh8Y93mRNtsDB1Q",
            "hd": "example.com",
            "email": "jsmith@example.com",
            "email_verified": True,
            "nonce": "0394852-3190485-2490358",
        },
        User("10769150350006150715113082367", issuer=GOOGLE),
    ),
    "Google for a service account": (
        "google",
        "https://orders.example.com",
        "jwt",
        {
            "iss": GOOGLE,
            "azp": "112010400000000710080",
            "aud": "https://orders.example.com",
            "sub": "112010400000000710080",
            "email": "billing@example.iam.gserviceaccount.com",
            "email_verified": True,
        },
        User("112010400000000710080", kind="client", issuer=GOOGLE),
    ),
    "Clerk, version 2": (
        "clerk",
        "orders",
        "jwt",
        {
            "azp": "https://app.example.com",
            "aud": "orders",
            "fva": [0, -1],
            "iss": CLERK,
            "nbf": NOW - 10,
            "sid": "sess_2GaMqUCB3Sc1WNAkWuNzsnYVVEy",
            "sub": "user_2GaMqUCB3Sc1WNAkWuNzsnYVVEy",
            "v": 2,
            "sts": "active",
            "pla": "u:free,o:pro",
            "o": {"id": "org_123", "rol": "admin", "slg": "org-slug", "per": "read,manage", "fpm": "3,2"},
        },
        User("user_2GaMqUCB3Sc1WNAkWuNzsnYVVEy", roles=frozenset({"admin"}), issuer=CLERK),
    ),
    # It is not of a session, and has what the template says: {"aud": "orders", "org_role": "{{org.role}}"}.
    "Clerk, JWT template": (
        "clerk",
        "orders",
        "jwt",
        {
            "azp": "https://app.example.com",
            "aud": "orders",
            "iss": CLERK,
            "jti": "10db7f531a90cb2faea4",
            "nbf": NOW - 10,
            "org_role": "org:admin",
            "sub": "user_2GaMqUCB3Sc1WNAkWuNzsnYVVEy",
        },
        User("user_2GaMqUCB3Sc1WNAkWuNzsnYVVEy", roles=frozenset({"org:admin"}), issuer=CLERK),
    ),
    "Clerk, version 1": (
        "clerk",
        "orders",
        "jwt",
        {
            "azp": "https://app.example.com",
            "aud": "orders",
            "iss": CLERK,
            "nbf": NOW - 10,
            "sid": "sess_2GaMqUCB3Sc1WNAkWuNzsnYVVEy",
            "sub": "user_2GaMqUCB3Sc1WNAkWuNzsnYVVEy",
            "org_id": "org_123",
            "org_role": "org:admin",
        },
        User("user_2GaMqUCB3Sc1WNAkWuNzsnYVVEy", roles=frozenset({"org:admin"}), issuer=CLERK),
    ),
}

# preset, AUTH_AUDIENCE, and the claims of an ID token that has this audience, because the client id is used as one.
ID = {
    "OpenID Connect Core": ("standard", "s6BhdRkqt3", {"iss": STANDARD, "sub": "248289761001", "aud": "s6BhdRkqt3"}),
    "OpenID Connect Core, hybrid flow": (
        "standard",
        "s6BhdRkqt3",
        {"iss": STANDARD, "sub": "248289761001", "aud": "s6BhdRkqt3", "c_hash": "LDktKdoQak3Pk0cnXxCltA", "scope": "x"},
    ),
    "Okta": (
        "standard",
        "uAaunofWkaDJxukCFeBx",
        {"iss": STANDARD, "sub": "00uid4BxXw6I6TV4m0g3", "aud": "uAaunofWkaDJxukCFeBx", "ver": 1, "amr": ["pwd"]},
    ),
    "Auth0": (
        "auth0",
        "my_client_id",
        {
            "iss": AUTH0,
            "sub": "auth0|62f3a1",
            "aud": "my_client_id",
            "sid": "u8",
            "name": "Jo",
            "email": "jo@a.example",
        },
    ),
    "Auth0 with a nonce": (
        "auth0",
        "my_client_id",
        {"iss": AUTH0, "sub": "auth0|62f3a1", "aud": "my_client_id", "azp": "my_client_id", "nonce": "n-0S6_WzA2Mj"},
    ),
    "Cognito": (
        "cognito",
        "xxxxxxxxxxxxexample",
        {
            "sub": "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
            "cognito:groups": ["admin"],
            "iss": COGNITO,
            "aud": "xxxxxxxxxxxxexample",
            "client_id": "xxxxxxxxxxxxexample",  # which a Lambda function may add
            "token_use": "id",
            "cognito:username": "my-test-user",
        },
    ),
    "Entra ID": (
        "entra",
        "00001111-aaaa-2222-bbbb-3333cccc4444",
        {
            "ver": "2.0",
            "iss": ENTRA,
            "sub": "AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ",
            "aud": "00001111-aaaa-2222-bbbb-3333cccc4444",
            "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb",
            "tid": "11112222-bbbb-3333-cccc-4444dddd5555",
            "roles": ["Reports.Author"],
        },
    ),
    "Keycloak": (
        "keycloak",
        "web",
        {"iss": KEYCLOAK, "aud": "web", "sub": "f:1c1d8aaf:alice", "typ": "ID", "azp": "web", "sid": "8f0e2c6a"},
    ),
    "Clerk": (
        "clerk",
        "client_1",
        {"iss": CLERK, "aud": "client_1", "sub": "user_2GaM", "nonce": "n-0S6_WzA2Mj", "at_hash": "a"},
    ),
}


def verify(preset, audience, typ, claims, thumbprint=None):
    """Return the user of a token, as a service with this preset does."""
    names = [audience] if isinstance(audience, str) else audience
    rules = ClaimRules(PRESETS[preset], issuer=claims["iss"], audience=names, leeway=60, user=User)
    token = Token("RS256", "k1", typ, {**DATES, **claims}, b"", b"")
    rules.check_type(token)
    return rules.user(token, NOW, thumbprint)


def refusal(preset, audience, typ, claims):
    with pytest.raises(Refused) as caught:
        verify(preset, audience, typ, claims)
    return caught.value.code


@pytest.mark.parametrize("name", ACCESS)
def test_documented_access_token_is_accepted(name):
    """With the id, the kind, the roles and the scopes of its caller."""
    preset, audience, typ, claims, expected = ACCESS[name]

    user = verify(preset, audience, typ, claims)

    assert user == User(
        expected.id,
        kind=expected.kind,
        roles=expected.roles,
        scopes=expected.scopes,
        issuer=expected.issuer,
        expires_at=DATES["exp"],
    )


@pytest.mark.parametrize("name", ID)
@pytest.mark.parametrize("typ", ["jwt", ""])
def test_documented_id_token_is_refused(name, typ):
    """Even if its audience is that of the API."""
    preset, audience, claims = ID[name]

    assert refusal(preset, audience, typ, claims) == "not_access_token"


@pytest.mark.parametrize("name", [name for name in ACCESS if ACCESS[name][0] != "google"])
@pytest.mark.parametrize("claim", ["nonce", "at_hash", "c_hash", "s_hash"])
def test_claim_of_id_tokens_is_refused(name, claim):
    """Unless the header says that it is an access token."""
    preset, audience, typ, claims, _ = ACCESS[name]
    claims = {**claims, claim: "x"}

    if typ == "at+jwt":
        assert verify(preset, audience, typ, claims).id
    else:
        assert refusal(preset, audience, typ, claims) == "not_access_token"


def test_exception_of_google_is_its_own():
    """No other preset accepts Google's ID token, and google accepts no `at+jwt` and no token for another app."""
    _, audience, typ, claims, _ = ACCESS["Google"]

    others = {
        preset: refusal(preset, audience, typ, claims) for preset in PRESETS if preset not in ("google", "cognito")
    }

    assert set(others.values()) == {"not_access_token"}
    assert refusal("cognito", audience, typ, claims) == "audience"
    assert refusal("google", "other.apps.googleusercontent.com", typ, claims) == "audience"
    assert refusal("google", audience, "at+jwt", claims) == "header"
    assert refusal("google", audience, "", claims) == "header"


def test_exception_of_cognito_is_its_own():
    """No other preset accepts a token without `aud`, and cognito accepts no other client and no `aud` in its place."""
    _, audience, typ, claims, _ = ACCESS["Cognito"]

    others = {preset: refusal(preset, audience, "jwt", claims) for preset in PRESETS if preset != "cognito"}

    assert set(others.values()) == {"audience"}
    assert refusal("cognito", "other", typ, claims) == "audience"
    without = {name: value for name, value in claims.items() if name != "client_id"}
    assert refusal("cognito", audience, typ, {**without, "aud": audience}) == "audience"


@pytest.mark.parametrize("name", [name for name in ACCESS if ACCESS[name][0] not in ("cognito", "standard")])
def test_other_presets_require_the_audience(name):
    """Clerk's session tokens have none unless a template adds it: they are refused."""
    preset, audience, typ, claims, _ = ACCESS[name]

    assert refusal(preset, audience, typ, {key: value for key, value in claims.items() if key != "aud"}) == "audience"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Cognito", {"token_use": "id"}),
        ("Cognito", {"token_use": None}),
        ("Entra ID", {"ver": "1.0"}),
        ("Keycloak", {"typ": "Refresh"}),
        ("Keycloak", {"typ": "DPoP"}),
        ("Keycloak", {"typ": None}),
        ("Clerk, version 2", {"sts": "pending"}),
    ],
)
def test_other_kind_of_token_is_refused(name, change):
    """As the issuer's own claim says."""
    preset, audience, typ, claims, _ = ACCESS[name]

    assert refusal(preset, audience, typ, {**claims, **change}) == "not_access_token"


def test_keycloak_token_that_is_bound_to_a_key_is_an_access_token():
    """With a proof of its key; without one it is refused for that reason."""
    preset, audience, typ, claims, expected = ACCESS["Keycloak"]
    bound = {**claims, "typ": "DPoP", "cnf": {"jkt": "x"}}

    assert verify(preset, audience, typ, bound, "x").id == expected.id
    assert refusal(preset, audience, typ, bound) == "sender_constrained"


@pytest.mark.parametrize("name", ["Cognito", "Cognito for a client"])
def test_cognito_token_for_another_resource_is_refused(name):
    """Although its app is one of AUTH_AUDIENCE."""
    preset, audience, typ, claims, _ = ACCESS[name]

    assert refusal(preset, audience, typ, {**claims, "aud": "https://billing.example.com"}) == "audience"


def test_okta_token_for_okta_is_refused():
    """Those of the org authorization server are for Okta's own API, and have a type of their own."""
    preset, audience, _, claims, _ = ACCESS["Okta"]

    assert refusal(preset, audience, "okta-internal-at+jwt", claims) == "header"


def test_bare_host_is_a_name_of_google_only():
    """Google documents both forms of its `iss`."""
    names = {preset: PRESETS[preset].names_of("https://accounts.google.com") for preset in PRESETS}

    assert names.pop("google") == ("https://accounts.google.com", "accounts.google.com")
    assert set(names.values()) == {("https://accounts.google.com",)}


def test_path_of_a_claim():
    """A dot leads into an object; the name of a claim that is a URL is not a path, and a client id may have dots."""
    access = {"my.api": {"roles": 4}, "https://a.example": {"roles": 5}}
    claims = {"a": {"b": {"c": 1}}, "https://x.example/a.b": 2, "cognito:groups": 3, "d": "text", "access": access}
    paths = {
        "a.b.c": 1,
        "https://x.example/a.b": 2,
        "cognito:groups": 3,
        r"access.my\.api.roles": 4,
        r"access.https://a\.example.roles": 5,
        "access.my.api.roles": None,
        "d.e": None,
        "e": None,
        "a.x.c": None,
    }

    found = {path: claim_at(path)(claims) for path in paths}

    assert found == paths
