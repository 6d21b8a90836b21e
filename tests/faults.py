"""A TCP proxy between a client and a server that injects network faults."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Forward bytes, with a delay of `latency` seconds each way, or not at all if `broken`.

    Attributes:
        port: Where it listens on 127.0.0.1.
        latency: Seconds that each piece of data takes longer.
        broken: New and open connections are reset.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.latency = 0.0
        self.broken = False
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def close(self) -> None:
        """Close all connections."""
        for writer in self._open:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # transports close in the next turns of the loop

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        if self.broken:
            writer.transport.abort()
            return
        try:
            upstream, down = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open.add(down)
        await asyncio.gather(self._pump(reader, down, writer), self._pump(upstream, writer, down))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, back: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await asyncio.sleep(self.latency)
                if self.broken:
                    back.transport.abort()
                    break
                sink.write(data)
                await sink.drain()
        sink.close()


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    """Run a proxy to a port of 127.0.0.1 in a thread."""
    made = Proxy(target)
    ready, stop = threading.Event(), []

    async def run() -> None:
        server = await made.listen()
        done = asyncio.Event()
        stop.append(lambda loop=asyncio.get_running_loop(): loop.call_soon_threadsafe(done.set))
        ready.set()
        await done.wait()
        server.close()
        await made.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10), "the proxy does not listen"
    try:
        yield made
    finally:
        stop[0]()
        thread.join(10)
