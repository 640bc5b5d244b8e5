"""Connections to a server: what it sends is limited, and a forked child closes them at once.

A timeout of a socket is for one piece of an answer, and a server may send pieces for ever. Here the
time for an answer is the time for all of it, and its size is limited as it arrives and as it is
unpacked. In a forked child nothing is sent: the connection, the request under way and TLS go on in
the parent.
"""

from __future__ import annotations

import io
import os
import socket
import time
import zlib
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import Any

from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InsecureRequestWarning

from qitos_mlflow._inheritance import check, disown_in_child
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.server.transport import Oversized

ANSWER_BYTES = 4 * 1024 * 1024
"""Longest answer, unpacked (bytes). The longest honest ones are pages of runs, of some 10 KiB each:
who asks for 200 runs and gets this asks for fewer."""
HEAD_BYTES = 64 * 1024
"""Longest head of an answer, all its lines together (bytes): eight times what servers allow in that
of a request. What a server says before it, such as "100 Continue", counts."""
PIECE_BYTES = 64 * 1024
"""How much of an answer is read at once."""

QUICKACK = getattr(socket, "TCP_QUICKACK", -1)  # Linux has it.
"""Has the system tell servers at once what has arrived, not with the next request or 40 ms later.
`mlflow server` with several workers keeps the second half of its answer until then."""


class _Limited(io.RawIOBase):
    """What a socket receives until it has sent too much or for too long.

    Args:
        received: unbuffered.
        sock: its timeout is the time for all that is read.
    """

    def __init__(self, received: Any, sock: Any) -> None:
        self._received, self._sock = received, sock
        self._deadline = time.monotonic() + sock.gettimeout()
        self.left = HEAD_BYTES
        """How many bytes may still come."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer takes too long")
        self._sock.settimeout(left_s)
        got: int | None = self._received.readinto(buffer)
        with suppress(OSError, AttributeError):  # What speaks TLS may have no options.
            self._sock.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
        self.left -= got or 0
        if self.left < 0:
            raise Oversized("the server sends more than any answer of MLflow's has")
        return got

    def close(self) -> None:
        self._received.close()
        super().close()


class _Answer(HTTPResponse):
    """An answer, also of a proxy that is asked for a tunnel, that is read from a `_Limited`."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._limited = _Limited(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._limited)

    def begin(self) -> None:
        super().begin()
        if self.msg.defects or self.msg.get_payload():  # urllib3 would log it, with a traceback.
            raise HTTPException("a malformed head")
        self._limited.left += 2 * ANSWER_BYTES  # With what frames it.


def _body_of(received: Any) -> bytes:
    """The whole body of an answer of urllib3's, unpacked.

    Raises:
        Oversized: it has no end, or none that is near.
        RetryLater: it is cut, or packed in a way that was not asked for.
    """
    packed = received.headers.get("Content-Encoding", "").strip().lower()
    if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise RetryLater("an answer in an encoding that was not asked for")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed not in ("", "identity") else None
    body, size = bytearray(), 0
    while piece := received.read(PIECE_BYTES, decode_content=False):
        size += len(piece)
        try:
            # At least 1: 0 would be without a limit.
            body += unpack.decompress(piece, ANSWER_BYTES + 1 - len(body)) if unpack else piece
        except zlib.error:
            raise RetryLater("an answer that cannot be unpacked") from None
        if len(body) > ANSWER_BYTES:
            raise Oversized(f"the server answers with more than {ANSWER_BYTES >> 20} MiB")
    if received.length_remaining or (unpack and size and not unpack.eof):
        raise RetryLater("a truncated answer")
    return bytes(body)


class _Watched:
    """Mixed into a urllib3 connection. While it connects, a child cannot close it."""

    sock: Any
    response_class = _Answer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        disown_in_child(self)

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        check()

    def disown(self) -> None:
        sock, self.sock = self.sock, None
        # It may be within an object that speaks TLS: through a proxy, or with pyOpenSSL.
        if sock is not None and (descriptor := getattr(sock, "socket", sock).detach()) >= 0:
            os.close(descriptor)


class _Tolerant:
    """Mixed into a urllib3 pool. Its warning of unverified requests may be raised as an error."""

    def _validate_conn(self, connection: Any) -> None:
        with suppress(InsecureRequestWarning):
            super()._validate_conn(connection)  # type: ignore[misc]


class WatchedAdapter(HTTPAdapter):
    """What `requests` connects with. Versions before 2.32 call `get_connection`."""

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        """Send `request`; the answer is read, unless it says to go elsewhere."""
        response = super().send(request, *args, **{**options, "stream": True})
        try:
            body = _body_of(response.raw)
        except BaseException:
            response.close()
            raise
        kept: Any = response  # What requests has for `content` has no limit.
        kept._content, kept._content_consumed = b"" if response.is_redirect else body, True
        return response

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        return _watched(super().get_connection_with_tls_context(*args, **options))

    def get_connection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        return _watched(super().get_connection(*args, **options))

    def close(self) -> None:
        """Close connections also while the interpreter ends: urllib3 no longer does then."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for pool in list(manager.pools._container.values()):
                pool.close()
        super().close()


def _watched(pool: Any) -> Any:
    kind = pool.ConnectionCls
    if not issubclass(kind, _Watched):
        pool.ConnectionCls = type(kind.__name__, (_Watched, kind), {})
        pool.__class__ = type(type(pool).__name__, (_Tolerant, type(pool)), {})
    return pool
