"""The cache of verified credentials: by hash, bounded, and no longer than they are valid."""

import tracemalloc

import pytest
from clock import Clock
from forging import claims, secret_token

from fastapi_prodkit.auth import User, cache
from fastapi_prodkit.auth.cache import VerifiedCredentials
from fastapi_prodkit.auth.keys import Key
from fastapi_prodkit.auth.user import User as UserClass

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


def test_entry_of_a_withdrawn_key_ends(verified):
    """The issuer does not vouch for its tokens any more."""
    pytest.importorskip("jwt")
    key = Key("HS256", b"x" * 32)
    verified.add(b"Bearer a", ALICE, key)
    assert verified.get(b"Bearer a") is ALICE

    key.withdrawn = True

    assert verified.get(b"Bearer a") is None


def test_token_is_not_kept(verified):
    """Neither as a key nor as a value: only its SHA-256."""
    verified.add(b"Bearer s3cret", ALICE)

    assert b"s3cret" not in repr(verified._entries).encode()
    assert [len(digest) for digest in verified._entries] == [32]


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


@pytest.mark.parametrize("length", [0, 3000])
def test_memory_is_bounded(length):
    """The estimate of what an entry takes is not less than what it takes: 10 MB hold."""
    from fastapi_prodkit.auth.claims import ClaimRules
    from fastapi_prodkit.auth.jose import parse
    from fastapi_prodkit.auth.presets import SHARED_SECRET

    verified = VerifiedCredentials(lambda: 0.0)
    rules = ClaimRules(SHARED_SECRET, issuer=None, audience=["orders"], leeway=60, user=UserClass)
    tokens = [
        secret_token(
            email=f"alice{n}@example.com", roles=["admin", "editor"], groups=[f"{n}-{m}" for m in range(length // 20)]
        )
        for n in range(40)
    ]
    parsed = [token.encode() for token in tokens]
    now = claims()["iat"]

    tracemalloc.start()
    for token in parsed:
        verified.add(token, rules.user(parse(token), now))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(verified._entries) == 40
    assert 0.2 < taken / verified._size < 1


def test_size_is_bounded(verified):
    """Long tokens leave room for fewer."""
    for number in range(300):
        verified.add(b"%d" % number + b"x" * 8000, ALICE)

    assert verified._size <= cache.LARGEST
    assert len(verified._entries) == cache.LARGEST // (1200 + 6 * 8003)
