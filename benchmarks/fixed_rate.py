"""Send requests at a fixed rate over plain sockets, and measure latencies as the clients of a real service see them.

wrk sends the next request when the last answer has arrived, so it stops to ask while a server pauses, and what others
would have waited is not counted ("coordinated omission"). Here each request has its time; its latency counts from then
until the answer is complete, whether the request had to wait for a connection or for the server.
"""

import re
import select
import socket
import time
from collections import deque
from contextlib import ExitStack

__all__ = ["latencies", "percentile"]

CONNECTIONS = 16
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class _Connection:
    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self._request = request
        self._received = b""

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, due: float) -> None:
        self.due, self._received = due, b""
        self.socket.sendall(self._request)

    def is_complete(self) -> bool:
        """Receive what is there; return whether that was the end of the answer."""
        self._received += self.socket.recv(65_536)
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return False
        if not head.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"the server answered {head!r}")
        return len(body) == int(_LENGTH.search(head + b"\r\n")[1])


def latencies(port: int, request: bytes, rate: float, seconds: float) -> list[float]:
    """Return the seconds that each of `rate` x `seconds` requests took, counted from when it was due."""
    times: list[float] = []
    with ExitStack() as stack:
        idle = deque(_Connection(port, request) for _ in range(CONNECTIONS))
        for connection in idle:
            stack.enter_context(connection.socket)
        busy: set[_Connection] = set()
        start = time.perf_counter()
        dues = deque(start + number / rate for number in range(int(rate * seconds)))
        while dues or busy:
            while dues and idle and dues[0] <= time.perf_counter():
                connection = idle.popleft()
                connection.send(dues.popleft())
                busy.add(connection)
            pause = max(0.0, dues[0] - time.perf_counter()) if dues and idle else None
            for connection in select.select(busy, (), (), pause)[0]:
                if connection.is_complete():
                    times.append(time.perf_counter() - connection.due)
                    busy.remove(connection)
                    idle.append(connection)
    return times


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]
