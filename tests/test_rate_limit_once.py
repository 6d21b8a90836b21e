"""Keys that may be used once, in memory: never forgotten before their time."""

import pytest
from clock import Clock

from fastapi_prodkit._counting import clear_counts
from fastapi_prodkit.exceptions import ProblemError
from fastapi_prodkit.rate_limit import MemoryStore, once


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return MemoryStore(clock=clock)


async def test_key_is_accepted_once(store):
    """And another key as well."""
    assert [await store.add_once(key, 60) for key in ("a", "b", "a", "b", "a")] == [True, True, False, False, False]


@pytest.mark.parametrize("later", [0, 0.1, 14.9, 15, 30, 59.9])
@pytest.mark.parametrize("before", [0, 14.9, 15.1, 100])
async def test_key_is_remembered_for_its_time(store, clock, later, before):
    """Whenever it comes: there is no window at whose end all keys are forgotten."""
    await store.add_once("first", 60)
    clock.now += before
    await store.add_once("a", 60)
    clock.now += later
    await store.add_once("other", 60)

    assert await store.add_once("a", 60) is False


async def test_key_is_forgotten_in_the_end(store, clock):
    """After a quarter of its time at most, so that memory is free again."""
    await store.add_once("a", 60)
    clock.now += 75

    assert await store.add_once("a", 60) is True


async def test_key_with_a_longer_time_is_remembered_for_it(store, clock):
    """Beside keys with a shorter one."""
    await store.add_once("short", 10)
    await store.add_once("long", 100)
    await store.add_once("short too", 10)
    clock.now += 99

    assert await store.add_once("long", 100) is False


async def test_no_key_is_forgotten_for_lack_of_memory(store, clock, monkeypatch):
    """A client that may send many could have one forgotten, and use it again."""
    monkeypatch.setattr(once, "MAX_KEYS", 3)
    for key in ("a", "b", "c"):
        await store.add_once(key, 60)
        clock.now += 10

    with pytest.raises(ProblemError) as caught:
        await store.add_once("d", 60)

    assert (caught.value.status_code, caught.value.headers) == (503, {"Retry-After": "1"})
    assert await store.add_once("c", 60) is False
    clock.now += 40
    assert await store.add_once("d", 60) is True


async def test_tests_begin_without_keys(store):
    """As with all counts in memory."""
    await store.add_once("a", 60)

    clear_counts()

    assert await store.add_once("a", 60) is True


def test_memory_is_not_shared(store):
    """Each process has its own."""
    assert store.shared is False
