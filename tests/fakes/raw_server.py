"""A server on a real socket whose answers are bytes: whole, cut, endless or no HTTP at all."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from qitos_mlflow.mlflow_plugin.server.http import Request

Answer = Callable[[Request], Iterable[bytes]]
"""The pieces of an answer, each sent at once. After the last one the connection is closed, unless
the answer ends with `KEPT`."""

KEPT = b""
"""As the last piece: the connection takes another request."""

READ_PAUSE_S = 0.0
"""Before each piece of a body that is read."""


class RawServer:
    """Hands each request to `answer` and sends what that returns, until the client has enough."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = 0
        self.stopped = threading.Event()
        """Set when the block ends; an answer that waits should wait for this."""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()
        self._connections: set[socket.socket] = set()

    def _serve(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self._connections.add(connection)
            self._threads.append(
                threading.Thread(target=self._talk, args=(connection,), daemon=True)
            )
            self._threads[-1].start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection, connection.makefile("rb") as file:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kept = True
            while kept and (request := _read(file)) is not None:
                self.requests.append(request)
                kept = False
                for piece in self.answer(request):
                    kept = piece == KEPT
                    if piece:
                        connection.sendall(piece)
        self._connections.discard(connection)

    def close(self) -> None:
        """End all threads and connections."""
        self.stopped.set()
        for one in (self._socket, *list(self._connections)):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)


def _read(file: object) -> Request | None:
    """The next request; None if there is none."""
    line = file.readline(65536).split()  # type: ignore[attr-defined]
    if len(line) != 3:
        return None
    headers: dict[str, str] = {}
    while text := file.readline(65536).strip():  # type: ignore[attr-defined]
        name, _, value = text.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    body, length = b"", int(headers.get("content-length", 0))
    while len(body) < length:
        time.sleep(READ_PAUSE_S)
        if not (piece := file.read(min(65536, length - len(body)))):  # type: ignore[attr-defined]
            return None
        body += piece
    path = re.sub("^https?://[^/]+", "", line[1].decode())
    return Request(line[0].decode(), path, 0.0, body or None, headers)


def http(
    body: bytes, status: str = "200 OK", kind: str = "application/json", *headers: str
) -> bytes:
    """A whole answer as a server sends it."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
    if not any(line.lower().startswith("content-length") for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@contextmanager
def raw_server(answer: Answer) -> Iterator[RawServer]:
    """A server for the length of a block."""
    server = RawServer(answer)
    try:
        yield server
    finally:
        server.close()
