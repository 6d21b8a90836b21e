"""Detect that a client disconnects while its request is being served."""

import asyncio
from asyncio import Queue, Task
from collections.abc import Callable

from starlette.types import Message, Receive

__all__ = ["DisconnectListener"]


class DisconnectListener:
    """Pass the messages of a request to its app, and listen for `http.disconnect` while the app does not receive.

    Some servers return `http.disconnect` to one caller only, so the app must receive its messages from the listener.
    The listener does not receive a body before the app does, except the first part of a body that was not announced.

    Args:
        receive: Returns the next message of the server.
        on_disconnect: Called once, from the event loop, when the client has disconnected.
    """

    def __init__(self, receive: Receive, on_disconnect: Callable[[], None]) -> None:
        self._receive = receive
        self._on_disconnect = on_disconnect
        self._received: Queue[Message] = Queue()  # messages that the app has not received yet
        self._listening: Task[None] | None = None

    def listen(self) -> None:
        """Start listening. To be called when the app has received the body, or if no body was announced."""
        self._listening = asyncio.create_task(self._listen())

    async def receive(self) -> Message:
        """Return the app's next message."""
        if self._listening is None:
            message = await self._receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self.listen()
            return message
        message = await self._received.get()
        if message["type"] == "http.disconnect":
            self._received.put_nowait(message)  # every further call returns it again
        elif message.get("more_body"):
            self._listening = None  # the app receives the rest
        return message

    def close(self) -> None:
        """Stop listening."""
        if self._listening is not None:
            self._listening.cancel()
            self._listening = None  # breaks a cycle: the traceback of the task's exception refers to this object

    async def _listen(self) -> None:
        message = await self._receive()
        if message["type"] == "http.request":  # every request has one, which is empty without a body
            self._received.put_nowait(message)
            if message.get("more_body"):
                return
            message = await self._receive()
        self._received.put_nowait(message)
        if message["type"] == "http.disconnect":  # some test clients send other messages here, against ASGI
            self._on_disconnect()
