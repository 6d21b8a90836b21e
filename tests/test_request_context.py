"""The request context: fields that follow a request wherever its code runs."""

import asyncio

import anyio.to_thread

from fastapi_prodkit import _context


async def in_context(fields):
    """Run in a context of its own, as a request does, and return what is bound at the end."""
    token = _context.begin(fields)
    try:
        await asyncio.sleep(0)
        _context.bind(step="done")
        return _context.current()
    finally:
        _context.end(token)


async def test_begin_and_end():
    """A context is there between `begin` and `end`, and nowhere else."""
    fields = {"request_id": "a"}

    token = _context.begin(fields)
    within = _context.current()
    _context.end(token)

    assert within is fields
    assert _context.current() is None


async def test_nested():
    """An inner context hides the outer one, which is back afterwards."""
    outer = _context.begin({"request_id": "outer"})

    inner = await in_context({"request_id": "inner"})
    after = _context.current()
    _context.end(outer)

    assert inner == {"request_id": "inner", "step": "done"}
    assert after == {"request_id": "outer"}


async def test_bind_reaches_up_from_a_thread():
    """What is bound in a worker thread is there in the request that waits for it."""
    token = _context.begin({})

    await anyio.to_thread.run_sync(lambda: _context.bind(user_id="u1"))
    bound = _context.current()
    _context.end(token)

    assert bound == {"user_id": "u1"}


async def test_bind_reaches_up_from_a_task():
    """What is bound in a task is there in the request that started it."""
    token = _context.begin({})

    async def task():
        _context.bind(user_id="u1")

    await asyncio.create_task(task())
    bound = _context.current()
    _context.end(token)

    assert bound == {"user_id": "u1"}


async def test_later_values_win():
    """Binding a name again replaces its value."""
    token = _context.begin({"step": "first"})

    _context.bind(step="second", other=1)
    bound = _context.current()
    _context.end(token)

    assert bound == {"step": "second", "other": 1}


async def test_bind_outside_of_a_request():
    """A background job can bind, too; its fields are its own task's."""

    async def job(name):
        _context.bind(job=name)
        await asyncio.sleep(0)
        _context.bind(state="ran")
        return _context.current()

    found = await asyncio.gather(job("a"), job("b"))

    assert found == [{"job": "a", "state": "ran"}, {"job": "b", "state": "ran"}]
    assert _context.current() is None


async def test_many_at_once():
    """Contexts of requests that run at the same time do not mix."""
    found = await asyncio.gather(*[in_context({"request_id": number}) for number in range(200)])

    assert found == [{"request_id": number, "step": "done"} for number in range(200)]
