"""No server takes more memory or time than a request is given, whatever it sends."""

from __future__ import annotations

import functools
import gzip
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import requests

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.server.connections import ANSWER_BYTES
from qitos_mlflow.mlflow_plugin.server.http import Request, SessionRequester
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import Oversized, Unanswered
from tests.fakes.raw_server import KEPT, RawServer, http, raw_server

MIB = 1024 * 1024
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
TIMEOUT_S = 1.0
HANG_S = 20.0
"""Many times what a request is given."""
FOUND = b'{"experiment": {"experiment_id": "7"}}'
RUN = RunRef("r", "7", "n", "mlflow-artifacts:/7/r", 0)

Server = Iterator[RawServer]


@pytest.fixture
def server() -> Server:
    with raw_server(lambda request: [http(FOUND), KEPT]) as server:
        yield server


def ask(server: RawServer) -> str:
    """Ask for an experiment, within `TIMEOUT_S`."""
    transport = RestTransport(server.uri)
    try:
        return transport.experiment_id("name", TIMEOUT_S)
    finally:
        transport.close()


def endless(head: bytes, piece: Callable[[int], bytes]) -> Iterable[bytes]:
    return itertools.chain([head], map(piece, itertools.count()))


MUCH = b" " * MIB


@functools.cache
def bomb(compress: Callable[..., bytes]) -> bytes:
    return compress(bytes(128 * MIB), 1)


TOO_MUCH: dict[str, Callable[[], Iterable[bytes]]] = {
    "no end": lambda: endless(HEAD + b"\r\n", lambda n: MUCH),
    "chunks": lambda: endless(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", lambda n: b"100000\r\n" + MUCH + b"\r\n"
    ),
    "one chunk": lambda: endless(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n", lambda n: MUCH
    ),
    "a chunk below nothing": lambda: endless(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", lambda n: MUCH
    ),
    "trailers": lambda: endless(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
        lambda n: b"A: " + b"b" * 60_000 + b"\r\n",
    ),
    "length": lambda: endless(HEAD + b"Content-Length: 99999999999\r\n\r\n", lambda n: MUCH),
    "gzip": lambda: [http(bomb(gzip.compress), "200 OK", "", "Content-Encoding: gzip")],
    "deflate": lambda: [http(bomb(zlib.compress), "200 OK", "", "Content-Encoding: deflate")],
    "an error": lambda: endless(b"HTTP/1.1 500 Oops\r\n\r\n", lambda n: MUCH),
    "a redirect": lambda: endless(b"HTTP/1.1 307 T\r\nLocation: /\r\n\r\n", lambda n: MUCH),
    "head": lambda: endless(HEAD, lambda n: b"A%d: " % n + b"b" * 60_000 + b"\r\n"),
    "a line": lambda: endless(HEAD + b"A: ", lambda n: MUCH),
    "100 Continue": lambda: endless(b"", lambda n: b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "parts": lambda: [http(b"[" + b"[]," * MIB + b"[]]")],
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_an_answer_without_an_end_takes_little_memory(server: RawServer, kind: str) -> None:
    """It is given up long before the time is over, and long before the memory is."""
    server.answer = lambda request: TOO_MUCH[kind]()
    TOO_MUCH[kind]()  # A bomb is made before memory is measured.
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = memory("VmRSS")
    with pytest.raises(RetryLater) as later:
        ask(server)
    assert not isinstance(later.value, Unanswered)
    # Of which the server's own part is in this process, too.
    assert memory("VmHWM") - before < 64 * MIB


def memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_only_what_was_asked_for_is_unpacked(server: RawServer, encoding: str) -> None:
    """Whatever libraries for other encodings are installed."""
    server.answer = lambda request: [http(FOUND, "200 OK", "", f"Content-Encoding: {encoding}")]
    with pytest.raises(RetryLater, match="encoding"):
        ask(server)
    assert server.requests[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("body", "encoding"),
    [(gzip.compress(FOUND), "gzip"), (zlib.compress(FOUND), "deflate")],
    ids=["gzip", "deflate"],
)
def test_a_packed_answer_is_unpacked(server: RawServer, body: bytes, encoding: str) -> None:
    """Proxies pack answers; one that is cut is none."""
    packed = f"Content-Encoding: {encoding}"
    server.answer = lambda request: [http(body, "200 OK", "application/json", packed), KEPT]
    assert ask(server) == "7"
    server.answer = lambda request: [http(body[:-5], "200 OK", "application/json", packed), KEPT]
    with pytest.raises(RetryLater):
        ask(server)


def test_the_longest_answer_is_taken(server: RawServer) -> None:
    """Up to the limit, in one piece or in chunks."""
    body = FOUND + b" " * (ANSWER_BYTES - len(FOUND))
    server.answer = lambda request: [http(body), KEPT]
    assert ask(server) == "7"
    chunk = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    server.answer = lambda request: [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk]
    assert ask(server) == "7"
    server.answer = lambda request: [http(body + b" "), KEPT]
    with pytest.raises(Oversized):
        ask(server)


DRIPS: dict[str, bytes] = {
    "head": HEAD + b"A: " + b"b" * 9999,
    "body": HEAD + b"Content-Length: 9999\r\n\r\n" + b" " * 9999,
    "chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 9999,
    "100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 999,
}


@pytest.mark.parametrize("kind", DRIPS)
def test_the_time_of_a_request_is_for_all_of_it(server: RawServer, kind: str) -> None:
    """A byte now and then keeps no request alive."""

    def drip(request: Request) -> Iterator[bytes]:
        for n in range(len(DRIPS[kind])):
            yield DRIPS[kind][n : n + 1]
            server.stopped.wait(0.05)

    server.answer = drip
    began = time.monotonic()
    with pytest.raises(Unanswered):
        ask(server)
    assert time.monotonic() - began < HANG_S


def test_redirects_share_the_time_of_their_request(server: RawServer) -> None:
    """A chain of them, each in time, ends with the time of the first one."""

    def slowly(request: Request) -> Iterator[bytes]:
        server.stopped.wait(0.3)
        yield http(b"", "307 Moved", "", f"Location: /{len(server.requests)}")
        yield KEPT

    server.answer = slowly
    with pytest.raises(Unanswered):
        ask(server)
    assert len(server.requests) < 10


def test_a_server_that_takes_a_body_too_slowly_is_given_up(
    server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes now and then does not keep an upload alive."""
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.server.http.SLOWEST", 2**40)
    monkeypatch.setattr("tests.fakes.raw_server.READ_PAUSE_S", 0.2)
    transport = RestTransport(server.uri)
    began = time.monotonic()
    with pytest.raises(RetryLater):
        transport.write_artifact(RUN, "file", bytes(64 * MIB), TIMEOUT_S)
    transport.close()
    assert time.monotonic() - began < HANG_S


def test_no_cookie_is_kept(server: RawServer) -> None:
    """A server could send new ones with each answer."""
    server.answer = lambda request: [http(FOUND, "200 OK", "", "Set-Cookie: a=b"), KEPT]
    with SessionRequester(server.uri) as send:
        for _ in range(2):
            send(Request("GET", "/", TIMEOUT_S))
        assert not send.cookies
    assert all("cookie" not in request.headers for request in server.requests)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize(
    "where",
    [
        *("http://localhost:{port}/a", "//localhost:{port}/a", "https://127.0.0.1:{port}/"),
        *("http://127.0.0.1:{port}@localhost:1/", "http://127.0.0.1:1/", "https://example.invalid"),
    ],
)
def test_a_redirect_to_another_place_is_not_followed(
    server: RawServer, where: str, status: int
) -> None:
    """Another host, port or scheme gets no record; the error says where it would have gone."""
    with raw_server(lambda request: [http(b"{}"), KEPT]) as other:
        place = where.format(port=other.port)
        server.answer = lambda request: [
            http(b"{}", f"{status} Moved", "application/json", f"Location: {place}"),
            KEPT,
        ]
        transport = RestTransport(server.uri)
        with pytest.raises(RetryLater, match=r"the server moved to http.*; .* set MLFLOW_TR"):
            transport.write_artifact(RUN, "file", b"a secret", TIMEOUT_S)
        transport.close()
        assert len(server.requests) == 1
        assert other.requests == []


def test_an_address_that_is_none_is_not_followed(server: RawServer) -> None:
    """It is not taken for an error of the tracking URI."""
    server.answer = lambda request: [http(b"", "307 Moved", "", "Location: http://[bad"), KEPT]
    with pytest.raises(RetryLater, match="moved to nowhere"):
        ask(server)


def test_a_proxys_answer_to_connect_is_limited(
    server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read before the first byte of the server."""
    monkeypatch.setenv("https_proxy", server.uri)
    server.answer = lambda request: endless(b"HTTP/1.1 200 OK\r\n", lambda n: b"A: b\r\n" * 1000)
    transport = RestTransport("https://server.invalid")
    began = time.monotonic()
    with pytest.raises(RetryLater):
        transport.experiment_id("name", TIMEOUT_S)
    transport.close()
    assert time.monotonic() - began < HANG_S


def test_connections_are_kept(server: RawServer) -> None:
    """An answer that is read to its end leaves its connection for the next request."""
    with SessionRequester(server.uri) as send:
        answers: list[requests.Response] = [send(Request("GET", "/", 5.0)) for _ in range(5)]
        assert {answer.content for answer in answers} == {FOUND}
    assert server.connections == 1
