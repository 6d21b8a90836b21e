"""Nonces of DPoP: made of the time and a secret, and stored nowhere."""

import re

import pytest
from clock import Clock

from fastapi_prodkit.auth.nonces import SECONDS, Nonces
from fastapi_prodkit.auth.refusal import Refused

SECRET = b"s" * 32


@pytest.fixture
def clock():
    clock = Clock()
    clock.now = SECONDS * 1_000_000.0
    return clock


@pytest.fixture
def nonces(clock):
    return Nonces(SECRET, clock)


def code_of(nonces, nonce):
    with pytest.raises(Refused) as caught:
        nonces.check(nonce)
    return caught.value.code


def test_nonce_is_valid_for_two_windows(nonces, clock):
    """In the second one it is old, and the client gets the next one."""
    nonce = nonces.current()
    found = [nonces.check(nonce)]
    for seconds in (SECONDS - 0.1, 0.1, SECONDS - 0.1):
        clock.now += seconds
        found.append(nonces.check(nonce))
    clock.now += 0.1

    assert found == [True, True, False, False]
    assert code_of(nonces, nonce) == "proof_nonce"


def test_nonce_of_a_process_whose_clock_is_ahead_is_valid(nonces, clock):
    """By one window, and not by two."""
    ahead = Clock()
    ahead.now = clock.now + SECONDS
    assert nonces.check(Nonces(SECRET, ahead).current()) is True

    ahead.now += SECONDS

    assert code_of(nonces, Nonces(SECRET, ahead).current()) == "proof_nonce"


@pytest.mark.parametrize("nonce", [None, "", "x", 1, True, [], {}, "\ud800", "\u00e9", "A" * 22])
def test_other_nonce_is_refused(nonce, nonces):
    """Whatever a client sends."""
    assert code_of(nonces, nonce) == "proof_nonce"


def test_nonce_of_another_secret_is_refused(nonces, clock):
    """It cannot be guessed, and says nothing about the secret."""
    assert code_of(nonces, Nonces(b"t" * 32, clock).current()) == "proof_nonce"


def test_nonce_is_text_for_a_header(nonces):
    """RFC 9449 section 8.1: no spaces, quotes or backslashes; 128 bits."""
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", nonces.current())
