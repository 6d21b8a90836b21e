"""A coroutine up to where it waits for the first time, if it ever does.

`await` does not tell, and whatever watches over a request has nothing to do for one that never waits: nobody else runs
meanwhile. So the first step is made by hand, `next(coroutine.__await__(), FINISHED)`, and `go_on` makes the others.
"""

from collections.abc import Generator
from types import coroutine
from typing import Any, Final, TypeVar

_Result = TypeVar("_Result")

FINISHED: Final = object()  # instead of something to wait for


@coroutine
def go_on(steps: Generator[Any, Any, _Result], awaited: Any) -> Generator[Any, Any, _Result]:
    """Do what `await` does, from the second step on: whoever has made the first knows that there is one."""
    while True:
        thrown = None
        try:
            sent = yield awaited
        except BaseException as error:  # noqa: BLE001 - it is handed on, outside of this block
            thrown = error
        try:
            if thrown is not None:
                awaited = steps.throw(thrown)
            elif sent is not None:
                awaited = steps.send(sent)
            else:
                return (yield from steps)
        except StopIteration as end:
            result: _Result = end.value
            return result
        finally:
            thrown = None  # or it refers, through its traceback, to a frame that refers to it
