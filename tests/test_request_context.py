"""The request context: its fields are available in all code of a request."""

import asyncio

import anyio.to_thread

from fastapi_prodkit import _context


async def in_context(fields):
    """Run in a new context, as a request does, and return its fields at the end."""
    token = _context.begin(fields)
    try:
        await asyncio.sleep(0)
        _context.bind(step="done")
        return _context.current()
    finally:
        _context.end(token)


async def test_context_exists_between_begin_and_end():
    """`current` returns the fields between `begin` and `end`, and None after `end`."""
    fields = {"request_id": "a"}

    token = _context.begin(fields)
    within = _context.current()
    _context.end(token)

    assert within is fields
    assert _context.current() is None


async def test_inner_context_hides_the_outer():
    """An inner context hides the outer context, which is current again after the inner one ends."""
    outer = _context.begin({"request_id": "outer"})

    inner = await in_context({"request_id": "inner"})
    after = _context.current()
    _context.end(outer)

    assert inner == {"request_id": "inner", "step": "done"}
    assert after == {"request_id": "outer"}


async def test_bind_in_a_thread_changes_the_request():
    """A field bound in a worker thread is visible in the request that waits for the thread."""
    token = _context.begin({})

    await anyio.to_thread.run_sync(lambda: _context.bind(user_id="u1"))
    bound = _context.current()
    _context.end(token)

    assert bound == {"user_id": "u1"}


async def test_bind_in_a_task_changes_the_request():
    """A field bound in a child task is visible in the request that started the task."""
    token = _context.begin({})

    async def task():
        _context.bind(user_id="u1")

    await asyncio.create_task(task())
    bound = _context.current()
    _context.end(token)

    assert bound == {"user_id": "u1"}


async def test_bind_replaces_a_value():
    """`bind` with an existing name replaces the value and keeps the other fields."""
    token = _context.begin({"step": "first"})

    _context.bind(step="second", other=1)
    bound = _context.current()
    _context.end(token)

    assert bound == {"step": "second", "other": 1}


async def test_bind_outside_of_a_request_is_per_task():
    """Fields that a background job binds outside of a request are visible in its own task only."""

    async def job(name):
        _context.bind(job=name)
        await asyncio.sleep(0)
        _context.bind(state="ran")
        return _context.current()

    found = await asyncio.gather(job("a"), job("b"))

    assert found == [{"job": "a", "state": "ran"}, {"job": "b", "state": "ran"}]
    assert _context.current() is None


async def test_concurrent_contexts_are_separate():
    """The fields of 200 concurrent contexts do not mix."""
    found = await asyncio.gather(*[in_context({"request_id": number}) for number in range(200)])

    assert found == [{"request_id": number, "step": "done"} for number in range(200)]
