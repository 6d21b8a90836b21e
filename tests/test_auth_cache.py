"""The cache of verified credentials: by hash, bounded, and no longer than they are valid."""

import hashlib
import tracemalloc

import pytest
from clock import Clock
from forging import claims, secret_token

from fastapi_prodkit.auth import User, cache
from fastapi_prodkit.auth.cache import VerifiedCredentials
from fastapi_prodkit.auth.claims import ClaimRules
from fastapi_prodkit.auth.jose import parse
from fastapi_prodkit.auth.keys import Key
from fastapi_prodkit.auth.presets import SHARED_SECRET

ALICE = User("alice", expires_at=1100.0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def verified(clock):
    return VerifiedCredentials(clock)


def test_user_is_found_until_the_token_expires(verified, clock):
    """And not at the second at which it expires."""
    verified.add(b"Bearer a", ALICE)

    before = verified.get(b"Bearer a"), verified.get(b"Bearer b")
    clock.now = 1099.9
    at_last = verified.get(b"Bearer a")
    clock.now = 1100.0

    assert before == (ALICE, None)
    assert at_last is ALICE
    assert verified.get(b"Bearer a") is None


@pytest.mark.parametrize("expires_at", [None, 1e9])
def test_entry_lasts_an_hour_at_most(expires_at, verified, clock):
    """Then the token is verified anew."""
    verified.add(b"Bearer a", User("alice", expires_at=expires_at))
    clock.now += 3599
    assert verified.get(b"Bearer a") is not None

    clock.now += 1

    assert verified.get(b"Bearer a") is None


def test_entry_that_has_to_be_asked_again_is_only_known(verified, clock):
    """Even if the clock is set back; until it is forgotten."""
    verified.add(b"ApiKey a", User("bot"), ask_again=True)
    clock.now -= 10

    assert verified.get(b"ApiKey a") is None
    assert (verified.knows(b"ApiKey a"), verified.knows(b"ApiKey b")) == (True, False)
    verified.forget(b"ApiKey a")
    assert not verified.knows(b"ApiKey a")


def test_entry_of_a_withdrawn_key_ends(verified):
    """The issuer does not vouch for its tokens any more."""
    pytest.importorskip("jwt")
    key = Key("HS256", b"x" * 32)
    verified.add(b"Bearer a", ALICE, key)
    assert verified.get(b"Bearer a") is ALICE

    key.withdrawn = True

    assert verified.get(b"Bearer a") is None


def test_token_is_not_kept(verified):
    """Neither as a key nor as a value: only its hash."""
    verified.add(b"Bearer s3cret", ALICE)

    assert b"s3cret" not in repr(verified._entries).encode()
    assert [len(digest) for digest in verified._entries] == [32]


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError])
def test_hash_is_sha256_where_another_is_forbidden(error, clock, monkeypatch):
    """As in FIPS mode, in which each distribution refuses BLAKE2 in its own way."""

    def forbidden(*_arguments, **_keywords):
        raise error

    monkeypatch.setattr(hashlib, "blake2b", forbidden)
    verified = VerifiedCredentials(clock)

    verified.add(b"Bearer a", ALICE)

    assert verified.get(b"Bearer a") is ALICE
    assert list(verified._entries) == [hashlib.sha256(b"Bearer a").digest()]


def test_number_of_entries_is_bounded(verified, monkeypatch):
    """The oldest make room."""
    monkeypatch.setattr(cache, "MOST_ENTRIES", 3)

    for name in (b"a", b"b", b"c", b"d", b"e"):
        verified.add(name, ALICE)

    assert [name for name in (b"a", b"b", b"c", b"d", b"e") if verified.get(name)] == [b"c", b"d", b"e"]


def test_same_credentials_are_counted_once(verified):
    """After they have expired and were verified again, for example."""
    verified.add(b"a" * 100, ALICE)
    size = verified._size

    verified.add(b"a" * 100, ALICE)

    assert verified._size == size


CLAIMS = {
    "few": {},
    "typical": {"email": "alice@example.com", "roles": ["admin", "editor"], "azp": "web", "sid": "8f0e2c6a", "v": 1.5},
    "long": {"email": "a" * 4000},
    "many": {f"c{number}": number for number in range(400)},
    "a list": {"groups": [f"g{number}" for number in range(400)]},
    "nested": {"a": [[[{"b": {"c": ["d"] * 10}}] * 3] * 3]},
}


@pytest.mark.parametrize("more", CLAIMS.values(), ids=CLAIMS)
def test_size_is_estimated(more, clock):
    """What entries take is between a third of the estimate and all of it, whatever the claims are."""
    verified = VerifiedCredentials(clock)
    rules = ClaimRules(SHARED_SECRET, issuer=None, audience=["orders"], leeway=60, user=User)
    sent = [secret_token(sub=f"alice-{number}", **more).encode() for number in range(40)]
    now = claims()["iat"]

    tracemalloc.start()
    for each in sent:
        verified.add(each, rules.user(parse(each), now))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(verified._entries) == 40
    assert 0.33 < taken / verified._size < 1


def test_size_is_bounded(verified, monkeypatch):
    """Large users leave room for fewer, and the newest stay."""
    monkeypatch.setattr(cache, "LARGEST", 100_000)
    large = User("alice", claims={"text": "x" * 20_000}, expires_at=1100.0)

    for number in range(10):
        verified.add(b"%d" % number, large)

    assert verified._size <= 100_000
    assert [number for number in range(10) if verified.get(b"%d" % number)] == [6, 7, 8, 9]
