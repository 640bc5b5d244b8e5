"""A forked child closes its copies of connections, and the parent's go on."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import sys
import threading
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from qitos_mlflow.mlflow_plugin.server.http import Request, SessionRequester

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Forking with threads.
]

WAIT_S = 30.0


class Server(ThreadingHTTPServer):
    """Answers ``{}``; the path ``/wait`` when `go_on` is set."""

    daemon_threads = True

    def __init__(self, certificate: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        scheme = "http" if certificate is None else "https"
        self.uri = f"{scheme}://127.0.0.1:{self.server_port}"
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.ports: set[int] = set()
        """The clients' ports: one for each connection."""
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.ports.add(self.client_address[1])
        if self.path == "/wait":
            self.server.asked.set()
            self.server.go_on.wait(WAIT_S)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: object) -> None:
        pass


def make_certificate(path: Path) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(params=["http", "https"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    certificate = None
    if request.param == "https":
        certificate = make_certificate(tmp_path / "certificate.pem")
        for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(name, str(certificate))
    with Server(certificate) as server:
        yield server
        server.shutdown()


def descriptors(port: int) -> list[int]:
    """The descriptors of this process for the socket with this port."""
    found = []
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        try:
            with socket.socket(fileno=os.dup(number)) as copy:
                if copy.getsockname()[1] == port and copy.getpeername():
                    found.append(number)
        except OSError:  # It is something else.
            pass
    return found


@pytest.mark.parametrize("in_use", [False, True], ids=["idle", "in-use"])
def test_a_forked_child_has_no_connection(server: Server, in_use: bool, tmp_path: Path) -> None:
    """Its number is free for a file that nothing closes; the parent's request goes on over it."""
    requester = SessionRequester(server.uri)
    answers = [requester(Request("GET", "/", WAIT_S)).content]
    [port] = server.ports
    [number] = descriptors(port)

    def wait() -> None:
        answers.append(requester(Request("GET", "/wait", WAIT_S)).content)

    waiting = threading.Thread(target=wait)
    if in_use:
        waiting.start()
        assert server.asked.wait(WAIT_S)
    child = os.fork()
    if child == 0:
        try:
            left = descriptors(port)
            file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, number)  # As a program's own file that happens to get it.
            weakref.finalize._exitfunc()  # type: ignore[attr-defined]
            requester.close()
            os.write(number, b"content")
            os._exit(bool(left))
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "file").read_text() == "content"
    server.go_on.set()
    if in_use:
        waiting.join()
    answers.append(requester(Request("GET", "/", WAIT_S)).content)
    requester.close()
    assert answers == [b"{}"] * (3 if in_use else 2)
    assert server.ports == {port}  # All of it over one connection.


def test_what_has_arrived_is_acknowledged_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends an answer in two pieces keeps the second one until then, up to 40 ms.

    Whether the system has done so cannot be asked, and the time depends on the machine.
    """
    options: list[object] = []
    set_option = socket.socket.setsockopt
    spy = lambda sock, *what: (options.append(what), set_option(sock, *what))[1]  # noqa: E731
    monkeypatch.setattr(socket.socket, "setsockopt", spy)
    requester = SessionRequester(server.uri)
    requester(Request("GET", "/", WAIT_S))
    requester.close()
    assert (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1) in options
