"""The section of authentication: what can be configured, and which combinations are refused."""

import os
from datetime import UTC, datetime

import pytest

from fastapi_prodkit import Settings
from fastapi_prodkit._config import variables
from fastapi_prodkit.auth import new_api_key
from fastapi_prodkit.exceptions import SettingsError
from fastapi_prodkit.sections import AuthSettings
from fastapi_prodkit.sections.auth import ApiKey

HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
ISSUER = {"AUTH_ISSUER": "https://login.example.com/", "AUTH_AUDIENCE": "orders"}
SECRET = "correct-horse-battery-staple-012"


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    """Start in an empty directory, without any of our variables."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper() in variables.variables(Settings):
            monkeypatch.delenv(name)


@pytest.fixture
def load(monkeypatch):
    """Return the section with these variables in the environment."""

    def load(**given):
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return Settings().auth

    return load


@pytest.fixture
def refused(load):
    """Return the problems of loading with these variables."""

    def refused(**given):
        with pytest.raises(SettingsError) as caught:
            load(**given)
        return caught.value.problems

    return refused


def test_section_is_none_unless_something_is_configured(load):
    """An issuer, a secret or a key."""
    assert load() is None
    assert load(**ISSUER).issuer == ("https://login.example.com/",)
    assert load(AUTH_ENABLED="false") is None


@pytest.mark.parametrize("given", [{"AUTH_SECRET": SECRET}, {"AUTH_API_KEYS": f"billing {HASH}"}])
def test_secret_or_keys_are_enough(given, load):
    """Without an issuer and an audience."""
    assert load(**given) is not None


@pytest.mark.parametrize("tokens", [ISSUER, {"AUTH_SECRET": SECRET}])
def test_dpop_is_off_unless_it_is_switched_on(tokens, load):
    """With nonces if they are wanted."""
    assert load(**tokens).dpop == "off"

    given = {"AUTH_DPOP": "required", "AUTH_DPOP_NONCE": "true", "AUTH_DPOP_NONCE_SECRET": SECRET}
    settings = load(**tokens, **given)

    assert (settings.dpop, settings.dpop_nonce, SECRET in repr(settings)) == ("required", True, False)


@pytest.mark.parametrize(
    "given", [{"AUTH_AUDIENCE": "orders"}, {"AUTH_LEEWAY": "5"}, {"AUTH_ENABLED": "true"}, {"AUTH_ISSUER": ""}]
)
def test_other_variables_alone_are_an_error(given, refused):
    """One, which names what could be set."""
    assert refused(**given) == {
        "AUTH_ISSUER": "is required, or AUTH_SECRET or AUTH_API_KEYS: set one, or remove the others of the section "
        "(URLs of the OpenID issuers, exactly as in the `iss` of a token)"
    }


@pytest.mark.parametrize(
    ("given", "variable", "text"),
    [
        ({"AUTH_ISSUER": "https://a.example"}, "AUTH_AUDIENCE", "is required with AUTH_ISSUER"),
        ({**ISSUER, "AUTH_SECRET": SECRET}, "AUTH_SECRET", "cannot be used with AUTH_ISSUER"),
        ({**ISSUER, "AUTH_ALGORITHMS": "HS256"}, "AUTH_ALGORITHMS", "item 1 must be 'RS256'"),
        ({**ISSUER, "AUTH_ALGORITHMS": "none"}, "AUTH_ALGORITHMS", "item 1 must be 'RS256'"),
        ({**ISSUER, "AUTH_ALGORITHMS": ""}, "AUTH_ALGORITHMS", "must have at least 1 item"),
        ({**ISSUER, "AUTH_PRESET": "okta"}, "AUTH_PRESET", "item 1 must be 'standard'"),
        ({**ISSUER, "AUTH_PRESET": "auth0, cognito"}, "AUTH_PRESET", "must be one for all issuers, or as many"),
        ({**ISSUER, "AUTH_JWKS_URL": "https://a.example, https://b.example"}, "AUTH_JWKS_URL", "must have as many"),
        ({**ISSUER, "AUTH_JWKS_URL": "http://127.0.0.1/keys"}, "AUTH_JWKS_URL", "must be https, like its issuer"),
        ({**ISSUER, "AUTH_LEEWAY": "301"}, "AUTH_LEEWAY", "must be less than or equal to 300"),
        ({**ISSUER, "AUTH_LEEWAY": "-1"}, "AUTH_LEEWAY", "must be greater than or equal to 0"),
        ({**ISSUER, "AUTH_ROLES_CLAIM": '["roles", ""]'}, "AUTH_ROLES_CLAIM", "must not have an empty item"),
        ({"AUTH_SECRET": SECRET[:-1]}, "AUTH_SECRET", "must have at least 32 characters, not 31"),
        ({"AUTH_SECRET": SECRET, "AUTH_PRESET": "auth0"}, "AUTH_PRESET", "has no effect without AUTH_ISSUER"),
        ({"AUTH_SECRET": SECRET, "AUTH_ALGORITHMS": "RS256"}, "AUTH_ALGORITHMS", "has no effect without AUTH_ISSUER"),
        ({"AUTH_SECRET": SECRET, "AUTH_JWKS_URL": "https://a.example"}, "AUTH_JWKS_URL", "has no effect"),
        ({"AUTH_API_KEYS": f"x {HASH}", "AUTH_AUDIENCE": "orders"}, "AUTH_AUDIENCE", "has no effect without"),
        ({"AUTH_API_KEYS": f"x {HASH}", "AUTH_DPOP": "allowed"}, "AUTH_DPOP", "has no effect without AUTH_ISSUER or"),
        ({**ISSUER, "AUTH_DPOP": "on"}, "AUTH_DPOP", "must be 'off', 'allowed' or 'required'"),
        ({**ISSUER, "AUTH_DPOP_NONCE": "true"}, "AUTH_DPOP_NONCE", "has no effect without AUTH_DPOP"),
        ({**ISSUER, "AUTH_DPOP_NONCE_SECRET": SECRET}, "AUTH_DPOP_NONCE_SECRET", "has no effect without AUTH_DPOP"),
        (
            {**ISSUER, "AUTH_DPOP": "allowed", "AUTH_DPOP_NONCE_SECRET": SECRET},
            "AUTH_DPOP_NONCE_SECRET",
            "has no effect without AUTH_DPOP_NONCE",
        ),
        (
            {**ISSUER, "AUTH_DPOP": "allowed", "AUTH_DPOP_NONCE": "1", "AUTH_DPOP_NONCE_SECRET": SECRET[:-1]},
            "AUTH_DPOP_NONCE_SECRET",
            "must have at least 32 characters, not 31",
        ),
    ],
)
def test_impossible_combination_is_one_error(given, variable, text, refused):
    """Under the name of the variable that is wrong, with the remedy."""
    problems = refused(**given)

    assert list(problems) == [variable]
    assert problems[variable].startswith(text)
    assert SECRET[:-1] not in problems[variable]


@pytest.mark.parametrize(
    "url",
    [
        "login.example.com",
        "http://login.example.com",
        "http://10.0.0.1",
        "http://127.0.0.1.example.com",
        "http://localhost@login.example.com",
        "ftp://localhost",
        "https://",
        "https:///path",
        "https://user:password@login.example.com",
        "https://login.example.com?tenant=1",
        "https://login.example.com#a",
        "https://login.example.com/a b",
        "https://login.example.com:port",
        "https://[::1",
        "HTTPS://login.example.com\\a",
    ],
)
def test_url_without_tls_is_refused(url, refused):
    """Http is for an issuer on this machine; there is no user, query or fragment (OpenID Connect Discovery 3)."""
    problems = refused(AUTH_ISSUER=f'["{url}"]'.replace("\\", "\\\\"), AUTH_AUDIENCE="orders")

    assert list(problems) == ["AUTH_ISSUER"]
    assert problems["AUTH_ISSUER"].startswith("must have https, a host, and no user, query or fragment; http only")
    assert "password" not in problems["AUTH_ISSUER"]


@pytest.mark.parametrize(
    "url", ["http://localhost:8080/realms/a", "http://127.0.0.1:1", "http://[::1]:1", "https://a.example:8443/x"]
)
def test_url_with_tls_or_of_this_machine_is_accepted(url, load):
    """It is kept exactly as it is."""
    assert load(AUTH_ISSUER=url, AUTH_AUDIENCE="orders").issuer == (url,)


@pytest.mark.parametrize("environment", ["staging", "prod"])
def test_issuer_without_tls_is_refused_in_production(environment, refused, load):
    """Even on this machine."""
    safe = {"ENVIRONMENT": environment, "HOSTS_ALLOWED": "api.example.com", "AUTH_AUDIENCE": "orders"}

    problems = refused(**safe, AUTH_ISSUER="http://localhost:8080")

    assert problems == {"AUTH_ISSUER": "is an issuer for development, without TLS: use the https URL of a real one"}
    assert load(**safe, AUTH_ISSUER="https://login.example.com") is not None


def test_issuer_is_not_repeated(refused):
    """One of the two would have no effect."""
    problems = refused(AUTH_ISSUER="https://a.example,https://a.example", AUTH_AUDIENCE="orders")

    assert problems["AUTH_ISSUER"].startswith("must not repeat a URL")


def test_several_issuers_have_presets_and_urls_in_their_order(load):
    """One preset for all, or one for each."""
    auth = load(
        AUTH_ISSUER="https://a.example,https://b.example",
        AUTH_AUDIENCE="orders,client-1",
        AUTH_PRESET="auth0,cognito",
        AUTH_JWKS_URL="https://a.example/keys,https://b.example/keys",
    )

    assert auth.preset == ("auth0", "cognito")
    assert auth.jwks_url == ("https://a.example/keys", "https://b.example/keys")
    assert load(AUTH_PRESET="auth0").preset == ("auth0",)


def test_role_hierarchy_has_chains(load):
    """With commas between them."""
    section = load(**ISSUER, AUTH_ROLE_HIERARCHY="admin > editor>viewer,owner>editor")

    assert section.role_hierarchy == ("admin > editor>viewer", "owner>editor")


@pytest.mark.parametrize("hierarchy", ["admin", "admin>", "admin>a>admin", "x>a,a>b,b>a"])
def test_impossible_role_hierarchy_is_an_error(hierarchy, refused):
    """Under the name of its variable."""
    assert list(refused(**ISSUER, AUTH_ROLE_HIERARCHY=hierarchy)) == ["AUTH_ROLE_HIERARCHY"]


def test_api_keys_are_words(load):
    """Name, hash, and options; several are separated by commas. A date is midnight in UTC."""
    options = "scope=reports:read scope=reports:write role=auditor expires=2027-01-31"

    auth = load(AUTH_API_KEYS=f"billing {HASH} {options}, ci  {HASH}")

    assert auth.api_keys == (
        ApiKey(
            name="billing",
            hash=HASH,
            scopes={"reports:read", "reports:write"},
            roles={"auditor"},
            expires=datetime(2027, 1, 31, tzinfo=UTC),
        ),
        ApiKey(name="ci", hash=HASH),
    )


def test_api_keys_may_be_json(load):
    """With the names of the fields; a time may have a zone."""
    auth = load(AUTH_API_KEYS=f'[{{"name": "ci", "hash": "{HASH}", "expires": "2027-01-31T12:00:00+02:00"}}]')

    assert auth.api_keys[0].expires == datetime(2027, 1, 31, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("billing", "must be a name, a hash, and any of"),
        (f"billing {HASH} reports:read", "must be a name, a hash, and any of"),
        (f"billing {HASH} scopes=reports:read", "must be a name, a hash, and any of"),
        (f"billing {HASH[:-1]}", "must have the hash of a key"),
        (f"billing {HASH.upper()}", "must have the hash of a key"),
        (f"bill/ing {HASH}", "must match pattern"),
        (f"billing {HASH} expires=2099-01-31 expires=2027-01-31", "must not have two dates"),
        (f"billing {HASH} expires=soon", "must be a valid datetime"),
    ],
)
def test_invalid_api_key_is_an_error_with_its_position(text, reason, refused):
    """Without its text: somebody may have put the key itself where the hash belongs."""
    problems = refused(AUTH_API_KEYS=f"ci {HASH}, {text}")

    assert list(problems) == ["AUTH_API_KEYS"]
    assert problems["AUTH_API_KEYS"].startswith(f"item 2 {reason}")
    assert HASH[:20] not in problems["AUTH_API_KEYS"]


def test_key_in_place_of_its_hash_is_not_shown(refused):
    """It is a mistake that is easily made."""
    key = new_api_key()

    problems = refused(AUTH_API_KEYS=f"billing {key}")

    assert "must have the hash of a key" in problems["AUTH_API_KEYS"]
    assert key not in str(problems)


def test_secret_is_not_shown(load):
    """In repr and dumps."""
    auth = load(AUTH_SECRET=SECRET)

    assert SECRET not in f"{auth!r} {auth.model_dump()} {auth.model_dump_json()}"


def test_section_in_code_is_checked():
    """As the variables are."""
    with pytest.raises(ValueError, match="is required with AUTH_ISSUER"):
        AuthSettings(issuer=["https://login.example.com"])
