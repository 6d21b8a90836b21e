"""API keys: their form, and whose they are."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from clock import Clock

from fastapi_prodkit.auth import ApiKey, hash_api_key, new_api_key
from fastapi_prodkit.auth.api_keys import ApiKeys
from fastapi_prodkit.auth.refusal import Refused

KEY, OTHER = new_api_key(), new_api_key()


def stored(key=KEY, name="billing", **fields):
    return ApiKey(name=name, hash=hash_api_key(key), **fields)


@pytest.fixture
def clock():
    return Clock()


async def refusal(keys, sent):
    with pytest.raises(Refused) as caught:
        await keys.find(sent if isinstance(sent, bytes) else sent.encode())
    return caught.value


def test_key_can_be_recognised():
    """By its prefix; it has 32 random bytes and a checksum, and no two are alike."""
    assert all(re.fullmatch("prodkit_[0-9a-f]{72}", key) for key in (KEY, OTHER))
    assert KEY != OTHER
    assert re.fullmatch("[0-9a-f]{64}", hash_api_key(KEY))
    assert hash_api_key(KEY) not in KEY


async def test_configured_key_is_found(clock):
    """One of several; the key of the settings never changes."""
    keys = ApiKeys([stored(OTHER, "other"), stored()], None, clock)

    assert await keys.find(KEY.encode()) == (stored(), True)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"abc",
        KEY[:-1],
        KEY + "0",
        KEY.upper(),
        KEY.replace("prodkit_", "pk_"),
        KEY.replace(KEY[10], "g", 1),
        f"{KEY[:-1]}{'0' if KEY[-1] != '0' else '1'}",
        f"{KEY[:10]}{'0' if KEY[10] != '0' else '1'}{KEY[11:]}",
        f" {KEY}",
        f"{KEY}\n",
        b"\xff" * 80,
    ],
    ids=[
        "empty",
        "short",
        "cut",
        "long",
        "upper",
        "prefix",
        "letter",
        "checksum",
        "digit",
        "space",
        "line break",
        "bytes",
    ],
)
async def test_other_form_is_refused_without_a_search(sent, clock):
    """A key that was cut or mistyped: the checksum tells."""
    asked = []
    keys = ApiKeys([stored()], asked.append, clock)

    refused = await refusal(keys, sent)

    assert refused.code == "malformed"
    assert refused.is_forgery
    assert asked == []


async def test_unknown_key_is_refused(clock):
    """It has the right form, and nobody has it."""
    refused = await refusal(ApiKeys([stored()], None, clock), OTHER)

    assert refused.code == "api_key"
    assert refused.is_forgery
    assert OTHER not in refused.text


async def test_key_expires(clock):
    """At that second; the reason names the key, and a client that had it has not guessed."""
    expires = datetime.fromtimestamp(clock.now, UTC) + timedelta(days=1)
    keys = ApiKeys([stored(expires=expires)], None, clock)
    clock.now += 86_399
    assert await keys.find(KEY.encode())

    clock.now += 1
    refused = await refusal(keys, KEY)

    assert (refused.code, refused.text) == ("expired", "the API key of billing has expired")
    assert not refused.is_forgery


async def test_key_is_replaced_without_an_interruption(clock):
    """Two keys of one name are valid at a time."""
    keys = ApiKeys([stored(KEY), stored(OTHER)], None, clock)

    names = [(await keys.find(key.encode()))[0].name for key in (KEY, OTHER)]

    assert names == ["billing", "billing"]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_key_is_looked_up_by_its_hash(kind, clock):
    """By a function of the user's, for each request: a key that was removed is refused."""
    table = {hash_api_key(KEY): stored(scopes=frozenset({"reports:read"}))}

    async def find(hashed):
        return table.get(hashed)

    keys = ApiKeys([], find if kind == "async" else table.get, clock)
    found = await keys.find(KEY.encode())
    table.clear()

    assert found == (stored(scopes=frozenset({"reports:read"})), False)
    assert (await refusal(keys, KEY)).code == "api_key"


async def test_key_that_was_looked_up_expires(clock):
    """The function does not have to compare dates."""
    expired = stored(expires=datetime.fromtimestamp(clock.now, UTC))

    assert (await refusal(ApiKeys([], lambda hashed: expired, clock), KEY)).code == "expired"


async def test_answer_for_another_hash_is_refused(clock):
    """A database may compare text without case, or cut it."""
    keys = ApiKeys([], lambda hashed: stored(OTHER), clock)

    assert (await refusal(keys, KEY)).code == "api_key"


async def test_key_of_the_settings_is_not_looked_up(clock):
    """It is found first."""
    asked = []

    await ApiKeys([stored()], asked.append, clock).find(KEY.encode())

    assert asked == []
