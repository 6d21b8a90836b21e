"""The keys of an issuer over time: cached, refreshed, throttled, and kept while the issuer is down."""

import asyncio
import logging

import pytest
from clock import Clock

pytest.importorskip("jwt", reason="the extra auth is not installed")

from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from fastapi_prodkit import _context
from fastapi_prodkit.auth import issuers
from fastapi_prodkit.auth.fetching import Document, FetchError
from fastapi_prodkit.auth.issuers import IssuerKeys, NoKeysError
from fastapi_prodkit.auth.jose import Token
from fastapi_prodkit.auth.refusal import Refused

URL = "https://login.example.com"
JWKS = {
    name: {**ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True), "kid": name}
    for name in ("k1", "k2")
}


class Source:
    """An issuer: the keys it publishes, or the error that fetching them raises; each fetch waits for `gate`."""

    def __init__(self):
        self.published = ["k1"]
        self.max_age = None
        self.error = None
        self.fetches = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def key_set(self):
        self.fetches += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Document({"keys": [JWKS[name] for name in self.published]}, self.max_age)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def keys(source, clock):
    return IssuerKeys(URL, source, ["ES256"], clock=clock)


def token(key_id="k1", algorithm="ES256"):
    return Token(algorithm, key_id, "at+jwt", {}, b"", b"")


async def code_of(keys, *given):
    """Return the code with which a token is refused."""
    with pytest.raises(Refused) as caught:
        await keys.key_of(token(*given))
    return caught.value.code


async def settled():
    """Let tasks in the background end."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_first_token_waits_for_the_keys(keys, source):
    """Later ones do not."""
    first = await keys.key_of(token())

    second = await keys.key_of(token())

    assert first is second
    assert source.fetches == 1


async def test_tokens_at_the_same_time_share_one_fetch(keys, source):
    """However many there are."""
    source.gate.clear()
    waiting = [asyncio.create_task(keys.key_of(token())) for _ in range(50)]
    await settled()

    source.gate.set()

    assert len(set(await asyncio.gather(*waiting))) == 1
    assert source.fetches == 1


async def test_fetch_belongs_to_no_request(keys, source, monkeypatch):
    """Its log lines have no request id, although a request has started it."""
    contexts = []
    fetch = source.key_set

    async def key_set():
        contexts.append(_context.request_id())
        return await fetch()

    monkeypatch.setattr(source, "key_set", key_set)
    opened = _context.begin({"request_id": "abc"})
    try:
        await keys.key_of(token())
    finally:
        _context.end(opened)

    assert contexts == [None]


async def test_client_that_disconnects_does_not_end_the_fetch(keys, source):
    """Others wait for it."""
    source.gate.clear()
    leaving, staying = (asyncio.create_task(keys.key_of(token())) for _ in range(2))
    await settled()

    leaving.cancel()
    await settled()
    source.gate.set()

    assert await staying
    assert source.fetches == 1


@pytest.mark.parametrize("given", [("k1", "none"), ("k1", "HS256"), ("k1", "RS256"), ("k1", "es256"), ("k1", "")])
async def test_other_algorithm_is_refused_without_a_fetch(given, keys, source):
    """The settings name the algorithms, and not the token."""
    assert await code_of(keys, *given) == "algorithm"
    assert source.fetches == 0


async def test_token_without_a_key_id_is_refused(keys, source):
    """Nothing is tried out."""
    assert await code_of(keys, None) == "malformed"
    assert source.fetches == 0


@pytest.mark.parametrize(
    ("max_age", "lifetime"), [(None, 3600), (0, 300), (299, 300), (900, 900), (86_400, 86_400), (1e9, 86_400)]
)
async def test_keys_are_refreshed_before_they_expire(max_age, lifetime, keys, source, clock):
    """At 80 % of their lifetime, in the background; Cache-Control decides, between 5 minutes and 24 hours."""
    source.max_age = max_age
    key = await keys.key_of(token())
    clock.now += lifetime * 0.8 - 0.1
    await keys.key_of(token())
    await settled()
    before = source.fetches
    source.gate.clear()

    clock.now += 0.1
    during = await keys.key_of(token())
    source.gate.set()
    await settled()

    assert before == 1
    assert source.fetches == 2
    assert during is key
    assert await keys.key_of(token()) is key
    assert keys.warning() is None


async def test_rotated_key_is_found_at_once(keys, source, clock):
    """By the first token that has it, and the tokens of the earlier key go on working."""
    await keys.key_of(token())
    clock.now += 60
    source.published = ["k1", "k2"]

    found = await asyncio.gather(*[keys.key_of(token(name)) for name in ("k2", "k1", "k2")])

    assert found[0] is found[2]
    assert found[0] is not found[1]
    assert source.fetches == 2


async def test_withdrawn_key_is_refused_after_the_next_refresh(keys, source, clock):
    """And is marked, so that tokens that were verified with it are refused, too."""
    key = await keys.key_of(token())
    source.published = ["k2"]
    clock.now += 60

    other = await keys.key_of(token("k2"))

    assert key.withdrawn
    assert not other.withdrawn
    assert await code_of(keys) == "unknown_key"


async def test_unknown_keys_cause_one_fetch_a_minute(keys, source, clock):
    """A thousand a second."""
    await keys.key_of(token())
    started, fetches = clock.now, {}

    for second in (0, 1, 59, 60, 61, 119, 120):
        clock.now = started + second
        for number in range(1000):
            with pytest.raises(Refused):
                await keys.key_of(token(f"guess-{number}"))
        fetches[second] = source.fetches

    assert fetches == {0: 1, 1: 1, 59: 1, 60: 2, 61: 2, 119: 2, 120: 3}


async def test_unknown_keys_cause_one_fetch_a_minute_of_an_issuer_that_fails(keys, source, clock):
    """The keys that are known go on serving meanwhile."""
    key = await keys.key_of(token())
    source.error = FetchError("down")

    for _ in range(300):
        assert await code_of(keys, "guess") == "unknown_key"
        assert await keys.key_of(token()) is key
        clock.now += 1

    assert source.fetches == 5


async def test_unknown_key_waits_for_a_fetch_that_is_running(keys, source, clock):
    """Which may bring it."""
    await keys.key_of(token())
    source.published = ["k1", "k2"]
    clock.now += 3600
    source.gate.clear()
    await keys.key_of(token())
    await settled()

    waiting = asyncio.create_task(keys.key_of(token("k2")))
    await settled()
    source.gate.set()

    assert await waiting
    assert source.fetches == 2


async def test_issuer_that_is_down_at_start_is_asked_less_and_less_often(keys, source, clock):
    """After 1, 2, 4, ... 60 seconds; tokens are neither valid nor invalid meanwhile, and do not wait."""
    source.error = FetchError("https://login.example.com cannot be reached")
    started, times, waits = clock.now, [], []

    for _ in range(200):
        fetches = source.fetches
        with pytest.raises(NoKeysError) as caught:
            await keys.key_of(token())
        if source.fetches > fetches:
            times.append(clock.now - started)
            waits.append(caught.value.retry_after)
        clock.now += 1

    assert times == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert caught.value.text == "no token can be verified: https://login.example.com cannot be reached"


async def test_issuer_that_is_back_is_used(keys, source, clock, caplog):
    """Within the time until the next attempt, without a restart; each change is one line."""
    caplog.set_level(logging.INFO, "fastapi_prodkit.auth")
    source.error = FetchError("down")
    for _ in range(20):
        with pytest.raises(NoKeysError):
            await keys.key_of(token())
        clock.now += 1

    source.error = None
    clock.now += 15

    assert await keys.key_of(token())
    assert caplog.messages == [
        f"the keys of {URL} cannot be fetched: down",
        f"the keys of {URL} are fetched again",
    ]


async def test_keys_serve_for_a_day_while_the_issuer_is_down(keys, source, clock):
    """After their lifetime of an hour. Then the issuer could have withdrawn them long ago."""
    key = await keys.key_of(token())
    source.error = FetchError("down")

    async def after(seconds):
        clock.now = 1000.0 + seconds
        await keys.key_of(token())
        await settled()

    await after(3600)
    warning = keys.warning()
    await after(3600 + 86_399)
    served = not key.withdrawn
    await after(3600 + 86_400 + 60)

    assert warning is not None
    assert served
    assert key.withdrawn
    with pytest.raises(NoKeysError):
        await keys.key_of(token())
    assert keys.warning() == f"{URL}: no token can be verified: down"


async def test_warning_says_what_is_wrong(keys, source, clock):
    """Before the first fetch, after a failed one, and when the keys have expired; it names the issuer."""
    before = keys.warning()
    source.error = FetchError("down")
    with pytest.raises(NoKeysError):
        await keys.key_of(token())
    failed = keys.warning()
    source.error = None
    clock.now += 60
    await keys.key_of(token())
    good = keys.warning()
    source.error = FetchError("answered 500")
    clock.now += 3600 + 120
    await keys.key_of(token())
    await settled()

    assert before == f"{URL}: no token can be verified: its keys have not been fetched yet"
    assert failed == f"{URL}: no token can be verified: down"
    assert good is None
    assert keys.warning() == f"{URL}: its keys expired 2 minutes ago: answered 500"


@pytest.mark.parametrize(
    ("published", "error"),
    [
        ([], "has no key for an algorithm of AUTH_ALGORITHMS"),
        (None, "not a set of at most 100 keys"),
    ],
)
async def test_key_set_without_a_usable_key_is_a_failure(published, error, keys, source, clock, monkeypatch):
    """The keys that are known go on serving."""
    key = await keys.key_of(token())

    async def key_set():
        return Document({"keys": published}, None)

    monkeypatch.setattr(source, "key_set", key_set)
    clock.now += 3600
    await keys.key_of(token())
    await settled()

    assert error in keys.warning()
    assert await keys.key_of(token()) is key


async def test_unexpected_error_is_logged_with_its_traceback(keys, source, caplog):
    """It is a failure like any other."""
    source.error = RuntimeError("unforeseen")

    with pytest.raises(NoKeysError, match="RuntimeError"):
        await keys.key_of(token())

    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [source.error]


async def test_keys_are_kept_fresh_without_requests(source, clock):
    """Fetched at once, then before they expire; a failure is tried again."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        clock.now += seconds
        if len(slept) == 2:
            source.error = FetchError("down")
        if len(slept) == 5:
            source.error = None
        if len(slept) == 8:
            raise asyncio.CancelledError

    keys = IssuerKeys(URL, source, ["ES256"], clock=clock, sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        await keys.keep_fresh()

    assert slept == [2880, 2880, 60, 60, 60, 2880, 2880, 2880]
    assert source.fetches == 8


async def test_refresh_by_a_request_delays_the_next_one(source, clock):
    """The keys are not fetched twice."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            raise asyncio.CancelledError
        clock.now += 60
        source.published = ["k1", "k2"]
        await keys.key_of(token("k2"))
        clock.now += seconds - 60

    keys = IssuerKeys(URL, source, ["ES256"], clock=clock, sleep=sleep)
    with pytest.raises(asyncio.CancelledError):
        await keys.keep_fresh()

    assert slept == [2880, 60]
    assert source.fetches == 2


async def test_closing_cancels_a_fetch(keys, source):
    """And does nothing if there is none."""
    await keys.close()
    source.gate.clear()
    waiting = asyncio.create_task(keys.key_of(token()))
    await settled()

    await keys.close()

    with pytest.raises(NoKeysError):
        await waiting
    assert source.fetches == 1


def test_fetch_of_an_event_loop_that_has_ended_is_forgotten(source, clock):
    """Each `TestClient` without a context has a loop for each request."""
    keys = IssuerKeys(URL, source, ["ES256"], clock=clock)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    source.gate.clear()

    async def begin():
        task = asyncio.create_task(keys.key_of(token()))
        await settled()
        return task

    begun = loops[0].run_until_complete(begin())
    source.gate = asyncio.Event()
    source.gate.set()
    key = loops[1].run_until_complete(keys.key_of(token()))

    assert key
    assert source.fetches == 2
    for task in (begun, *asyncio.all_tasks(loops[0])):
        task.cancel()
    loops[0].run_until_complete(asyncio.gather(begun, *asyncio.all_tasks(loops[0]), return_exceptions=True))
    for loop in loops:
        loop.close()


def test_bounds_are_those_of_the_documentation():
    """An hour by default, from 5 minutes to 24 hours; a day longer while the issuer is down."""
    bounds = issuers._LIFETIME, issuers._SHORTEST_LIFETIME, issuers._LONGEST_LIFETIME, issuers._STALE

    assert bounds == (3600, 300, 86_400, 86_400)
