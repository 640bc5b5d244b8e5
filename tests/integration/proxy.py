"""A TCP proxy before a server, made to fail on command: it reads HTTP, request by request.

The test's thread sets a fault and reads what came by; one thread of the proxy's own serves. Each
request meets the fault that is set when it has arrived in full.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.integration.server import free_port

COMMAND_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True)
class Refuse:
    """The port is closed, and connections that were open are reset."""


@dataclass(frozen=True)
class Hang:
    """Connections are accepted and requests read, nothing is answered until the fault ends.

    What hung then is closed unanswered, and was never forwarded.
    """


@dataclass(frozen=True)
class Status:
    """Answer with this HTTP status; nothing is forwarded."""

    code: int
    retry_after: str | None = None
    body: bytes = b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "on command"}'
    content_type: str = "application/json"
    above_bytes: int = -1
    """Only requests with a larger body are answered so; the others are forwarded."""


@dataclass(frozen=True)
class Cut:
    """Forward the request, then close the connection after so many bytes of the response.

    The server has done what it was asked; the client cannot know.
    """

    after_bytes: int = 0


@dataclass(frozen=True)
class Latency:
    """Delay each response by this long."""

    ms: float


Fault = Refuse | Hang | Status | Cut | Latency


@dataclass
class Request:
    """One request that reached the proxy in full."""

    method: str
    path: str
    arrived_s: float
    """`time.monotonic()`."""
    fault: Fault | None = None
    """What it met."""
    status: int | None = None
    """What the client was answered, None when nothing, or not yet, or not in full."""
    raw: bytes = field(default=b"", repr=False)
    """Head and body, when the proxy keeps them."""


class Proxy:
    """Listens on a port of its own from construction until `close`.

    Args:
        upstream_port: port of 127.0.0.1 that requests are forwarded to; None when the test sets
            only faults that forward nothing.
        keep_raw: keep the bytes of every request.
    """

    def __init__(self, upstream_port: int | None = None, *, keep_raw: bool = False) -> None:
        self.upstream_port = upstream_port
        self.keep_raw = keep_raw
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.connections = 0
        self.requests: list[Request] = []
        self._changed = threading.Condition()
        self._fault: Fault | None = None
        self._only = ""
        self._times: int | None = None
        self._every, self._counted = 1, 0
        self._listener: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._fault_ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())

    def set(
        self, fault: Fault | None, *, only: str = "", times: int | None = None, every: int = 1
    ) -> None:
        """From now on requests meet `fault`; None lets them pass.

        Args:
            fault: replaces the one that was set.
            only: a part of the path; other requests pass. `Refuse` concerns all.
            times: so many requests meet it, those after them pass.
            every: only each n-th request meets it; 2 is every second one.
        """
        self._run(self._set(fault, only, times, every))

    def wait_for(
        self, seen: Callable[[list[Request]], object], timeout_s: float = 30.0
    ) -> list[Request]:
        """Block until `seen` holds of the requests so far; returns them.

        Raises:
            TimeoutError: it did not within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: seen(self.requests), timeout_s):
                raise TimeoutError(f"after {timeout_s} s the proxy had seen {self.requests}")
            return list(self.requests)

    def wait_for_requests(self, count: int = 1, path: str = "", timeout_s: float = 30.0) -> None:
        """Block until `count` requests with `path` in their path have arrived, answered or not."""
        self.wait_for(lambda seen: sum(path in one.path for one in seen) >= count, timeout_s)

    def forget(self) -> None:
        """Set the counters back to nothing seen."""
        with self._changed:
            self.connections = 0
            self.requests.clear()

    def close(self) -> None:
        """Close every connection and end the thread."""
        if not self._loop.is_closed():
            self._run(self._set(Refuse(), "", None, 1))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(COMMAND_TIMEOUT_S)
            self._loop.close()

    def _run(self, command: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(command, self._loop).result(COMMAND_TIMEOUT_S)

    # Below: on the proxy's thread only.

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, limit=MAX_HEAD_BYTES, reuse_address=True
            )

    async def _set(self, fault: Fault | None, only: str, times: int | None, every: int) -> None:
        self._fault, self._only, self._times, self._every = fault, only, times, every
        self._counted = 0
        self._fault_ended.set()
        self._fault_ended = asyncio.Event()
        if not isinstance(fault, Refuse):
            await self._listen()
        elif self._listener is not None:
            # What is accepted and has no handler yet, asyncio would leave open for ever.
            while asyncio.all_tasks() - self._handlers - {asyncio.current_task()}:
                await asyncio.sleep(0)
            self._listener.close()
            self._listener = None
            handlers = list(self._handlers)
            for handler in handlers:
                handler.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)

    def _meet(self, request: Request, size: int) -> Fault | None:
        if self._fault is None or self._only not in request.path:
            return None
        if isinstance(self._fault, Status) and size <= self._fault.above_bytes:
            return None
        self._counted += 1
        if self._counted % self._every:
            return None
        if self._times is not None:
            if self._times <= 0:
                return None
            self._times -= 1
        return self._fault

    def _note(self, request: Request | None = None, status: int | None = None) -> None:
        with self._changed:
            if request is None:
                self.connections += 1
            elif status is None:
                self.requests.append(request)
            else:
                request.status = status
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        self._note()
        client = _Peer(reader, writer)
        upstream: _Peer | None = None
        try:
            while head := await client.read_head():
                body = await client.read_body(head)
                raw = head + body
                method, path = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")[:2]
                request = Request(method, path, time.monotonic())
                request.fault = fault = self._meet(request, len(body))
                request.raw = raw if self.keep_raw else b""
                ended = self._fault_ended
                self._note(request)
                if isinstance(fault, Hang):
                    await ended.wait()
                    return
                if isinstance(fault, Status):
                    await client.write(_answer(fault))
                    self._note(request, fault.code)
                    return
                if upstream is not None and upstream.has_left:
                    upstream.close()  # A server closes connections that are idle for a while.
                    upstream = None
                if upstream is None:
                    upstream = await _Peer.connect(self.upstream_port)
                await upstream.write(raw)
                answer = await upstream.read_head()
                status = int(answer.split(b" ", 2)[1])
                answer += await upstream.read_body(answer, bodiless=method == "HEAD")
                if isinstance(fault, Cut):
                    await client.write(answer[: fault.after_bytes])
                    return
                if isinstance(fault, Latency):
                    await asyncio.sleep(fault.ms / 1000)
                await client.write(answer)
                self._note(request, status)
                if b"connection: close" in answer.lower().split(b"\r\n\r\n", 1)[0]:
                    return
        except asyncio.CancelledError:
            client.reset()
        except (OSError, asyncio.IncompleteReadError):
            client.reset()
        finally:
            self._handlers.discard(handler)
            client.close()
            if upstream is not None:
                upstream.close()


class _Peer:
    """One side of a connection: HTTP/1.1 messages as bytes, framed but not otherwise understood."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    async def connect(cls, port: int | None) -> _Peer:
        assert port is not None, "this proxy has nothing to forward to"
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=MAX_HEAD_BYTES))

    @property
    def has_left(self) -> bool:
        """Whether it has closed the connection."""
        return self._reader.at_eof()

    async def read_head(self) -> bytes:
        """Start line and headers; empty when the peer has nothing more to say."""
        try:
            return await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return b""

    async def read_body(self, head: bytes, *, bodiless: bool = False) -> bytes:
        start, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        response = start.startswith("HTTP/")
        if bodiless or (response and start.split(" ")[1] in {"204", "304"}):
            return b""
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return await self._read_chunks()
        if "content-length" in headers:
            return await self._reader.readexactly(int(headers["content-length"]))
        return await self._reader.read() if response else b""

    async def _read_chunks(self) -> bytes:
        parts = []
        while True:
            size = await self._reader.readuntil(b"\r\n")
            chunk = await self._reader.readexactly(int(size.split(b";")[0], 16) + 2)
            parts += [size, chunk]
            if chunk == b"\r\n":  # The last chunk is empty; trailers are not supported.
                return b"".join(parts)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def reset(self) -> None:
        """Make `close` send a reset, as the kernel does for a process that died."""
        connection: socket.socket = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self._writer.close()


def _answer(fault: Status) -> bytes:
    lines = [
        f"HTTP/1.1 {fault.code} On command",
        f"Content-Type: {fault.content_type}",
        f"Content-Length: {len(fault.body)}",
        "Connection: close",
    ]
    if fault.retry_after is not None:
        lines.append(f"Retry-After: {fault.retry_after}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + fault.body
