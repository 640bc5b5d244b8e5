"""A small real server over http or https that keeps the head of each request."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.fakes.requester import MLFLOW


class RecordingServer(ThreadingHTTPServer):
    """Answers each request with `status` and `body`.

    Attributes:
        moved: to where the requests of a path are redirected.
        heads: the headers of each request.
        paths: its path.
    """

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.body = MLFLOW
        self.moved: dict[str, str] = {}
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.uri = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: RecordingServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heads.append({key.lower(): text for key, text in self.headers.items()})
        self.server.paths.append(self.path)
        moved = self.server.moved.get(self.path)
        self.send_response(307 if moved else self.server.status)
        if moved:
            self.send_header("Location", moved)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def recording_server(tls: ssl.SSLContext | None = None) -> Iterator[RecordingServer]:
    """A server for the length of a block."""
    server = RecordingServer(tls)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
