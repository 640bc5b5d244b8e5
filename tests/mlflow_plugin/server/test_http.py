"""What an answer means: MLflow alone can refuse something; all else is tried again."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
import requests
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunData, RunRef
from qitos_mlflow.mlflow_plugin.server.http import SMALL_BYTES, Request, SessionRequester
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import NotThere, Poisoned, Refused, TooLarge
from qitos_mlflow.mlflow_plugin.server.verdict import NEVER_TOO_LARGE, PROTOBUF, json_object
from tests.fakes.requester import MLFLOW, SECRET, FakeRequester

PATH = "/api/2.0/mlflow/runs/log-batch"
NOT_FOUND = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}'
PAGE = b"<html>default backend</html>"
RUN = RunRef("r", "0", "n", "mlflow-artifacts:/0/r", 0)
UNUSABLE = (
    "ftp2://{}h",
    "http://{}a..b:5000",
    "http://{}[bad:5000",
    "http://{}h:999999",
    "http://{}/",
)


def outcome(server: FakeRequester) -> BaseException | None:
    """What a call on `server` raises."""
    try:
        RestTransport(f"http://u:{SECRET}@host:5000", server).log_batch("r", RunData(), 1.0)
    except (RetryLater, Refused, Poisoned) as error:
        return error
    return None


def test_mlflows_word_is_final() -> None:
    """An error of MLflow's own below 500 is a refusal with its code, after one request."""
    server = FakeRequester(404, NOT_FOUND)
    refusal = outcome(server)
    assert isinstance(refusal, Refused)
    assert refusal.code == "RESOURCE_DOES_NOT_EXIST"
    assert server.paths == [PATH]


@pytest.mark.parametrize("status", [400, 404, 405, 409, 410, 418, 422, 501])
@pytest.mark.parametrize(
    "body",
    [
        PAGE,
        b"404 page not found",
        b"",
        b'{"message": "no route matched"}',
        b'{"detail": "Not Found"}',
        b'{"error": "not_found", "error_code": 404}',
    ],
)
def test_only_mlflow_refuses(status: int, body: bytes) -> None:
    """A router's page is none of MLflow's answers, whatever answered before: it is asked again."""
    server = FakeRequester(status, body)
    assert isinstance(outcome(server), RetryLater)
    assert set(server.paths) == {PATH}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_PARAMETER_VALUE", Refused),
        ("RESOURCE_DOES_NOT_EXIST", Refused),
        ("INVALID_STATE", Refused),
        ("PERMISSION_DENIED", RetryLater),
        ("CUSTOMER_UNAUTHORIZED", RetryLater),
        ("QUOTA_EXCEEDED", RetryLater),
        ("REQUEST_LIMIT_EXCEEDED", RetryLater),
        ("DEADLINE_EXCEEDED", RetryLater),
        ("ENDPOINT_NOT_FOUND", NotThere),
        ("A_CODE_OF_LATER", RetryLater),
        ("INTERNAL_ERROR", Poisoned),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 409, 500])
def test_an_error_code_says_what_is_blamed(status: int, code: str, kind: type[Exception]) -> None:
    """Only those that blame what was sent refuse it."""
    answer = orjson.dumps({"error_code": code, "message": "no"})
    assert type(outcome(FakeRequester(status, answer))) is kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Refused), (404, NotThere), (405, NotThere), (422, Poisoned), (500, RetryLater)],
)
def test_the_endpoint_for_spans_answers_in_its_own_form(status: int, kind: type[Exception]) -> None:
    """FastAPI's ``detail`` is MLflow's word about spans only where MLflow uses it."""
    with pytest.raises((RetryLater, Refused, Poisoned)) as raised:
        write(FakeRequester(status, b'{"detail": "Cannot convert OpenTelemetry span"}'))
    assert type(raised.value) is kind


@pytest.mark.parametrize("answer", [(500, b'{"message": "upstream"}'), (422, PAGE), (501, b"{}")])
def test_a_gateways_failure_is_not_mlflows(answer: tuple[int, bytes]) -> None:
    """Without an error code of MLflow's, what is in front of it does not blame the request."""
    assert isinstance(outcome(FakeRequester(*answer)), RetryLater)


@pytest.mark.parametrize("status", [413, 414, 431])
def test_a_proxy_may_find_a_request_too_large(status: int) -> None:
    """It may take smaller ones. What has no body, or too long a head, is not about records."""
    server = RestTransport("http://host", FakeRequester(status, PAGE))
    with pytest.raises((RetryLater, TooLarge)) as raised:
        server.log_batch("r", RunData(tags=[("note", "x" * NEVER_TOO_LARGE)]), 1.0)
    assert isinstance(raised.value, TooLarge) is (status == 413)
    with pytest.raises(RetryLater):
        server.experiment_id("name", 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda server: server.create_run(NewRun("0", "n", 0, [("k", "v")]), 1.0),
        lambda server: server.log_batch("r", RunData(tags=[("k", "v")]), 1.0),
        lambda server: server.write_spans("0", [Span()], 1.0),
        lambda server: server.write_artifact(RUN, "answer.txt", b"42", 1.0),
        lambda server: server.end_run("r", "FINISHED", 0, 1.0),
    ],
    ids=["runs/create", "runs/log-batch", "spans", "file", "runs/update"],
)
def test_a_small_request_is_not_too_large(call: Callable[[RestTransport], object]) -> None:
    """Whatever a proxy says: there is nothing to make smaller."""
    with pytest.raises(RetryLater, match="HTTP 413: no room"):
        call(RestTransport("http://host", FakeRequester(413, b"no room")))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, b"Invalid Host header - possible DNS rebinding attack detected"),
        (403, b"Permission denied"),
        (401, b"You are not authenticated. Please see the documentation"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "not your experiment"}'),
        (401, b'{"detail": "token expired"}'),
    ],
)
def test_who_is_not_let_in_reads_why(status: int, body: bytes) -> None:
    """The server's own words, without credentials and without pages."""
    answer = json_object(body) or {}
    words = answer.get("message") or answer.get("detail") or body.decode()
    assert str(words) in str(outcome(FakeRequester(status, body)))
    for hidden in (PAGE, f"Bearer {SECRET}".encode()):
        reason = str(outcome(FakeRequester(status, hidden, **{"Content-Type": "text/plain"})))
        assert "html" not in reason
        assert SECRET not in reason


@pytest.mark.parametrize("body", [b"", PAGE, b"[]", b'{"run'])
def test_an_answer_that_is_no_object_is_not_mlflows(body: bytes) -> None:
    """A success that does not look like MLflow's is none."""
    assert isinstance(outcome(FakeRequester(200, body)), RetryLater)
    assert outcome(FakeRequester(200, b"{}")) is None


@pytest.mark.parametrize(
    "body",
    [b'{"hello": "world"}', b'{"run": {}, "experiment": 1}', b'{"run": {"info": 1}}'],
)
def test_a_call_needs_what_mlflow_answers(body: bytes) -> None:
    """Another program's JSON on the port creates no run."""
    transport = RestTransport("http://host", FakeRequester(200, body))
    with pytest.raises(RetryLater):
        transport.create_run(NewRun("0", "name", 0), 1.0)
    with pytest.raises(RetryLater):
        transport.experiment_id("name", 1.0)


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_answer_cut_amid_its_headers_is_none(status: int) -> None:
    """Without a length and without a body, nothing is known of what the server did."""

    def cut(*request: object) -> requests.Response:
        response = requests.Response()
        response.status_code = status
        response._content = b""
        return response

    with pytest.raises(RetryLater):
        RestTransport("http://host", cut).write_spans("0", [], 1.0)


@pytest.mark.parametrize(
    "answer",
    [
        b'{"detail": "REST OTLP span logging is not supported by FileStore"}',
        b'{"error_code": "NOT_IMPLEMENTED", "message": "no"}',
    ],
)
def test_what_a_server_cannot_do_is_refused(answer: bytes) -> None:
    """A store without spans says so with 501."""
    with pytest.raises(Refused) as refusal:
        write(FakeRequester(501, answer))
    assert refusal.value.code == "NOT_IMPLEMENTED"


@pytest.mark.parametrize(
    "message",
    [
        "QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00",
        "(psycopg2.InterfaceError) connection already closed",
        "(pymysql.err.DataError) x (Background on this error at: https://sqlalche.me/e/20/9h9h)",
    ],
)
def test_a_database_that_fails_is_not_refusing(message: str) -> None:
    """MLflow calls most errors of its database a bad request."""
    body = orjson.dumps({"error_code": "BAD_REQUEST", "message": message})
    assert isinstance(outcome(FakeRequester(400, body)), Poisoned)
    body = orjson.dumps({"error_code": "BAD_REQUEST", "message": "no such field"})
    assert isinstance(outcome(FakeRequester(400, body)), Refused)


def write(server: FakeRequester, what: str = "span") -> None:
    """Write a span or a file, whose answers say nothing."""
    transport = RestTransport("http://host", server)
    if what == "span":
        transport.write_spans("0", [Span(name="a")], 1.0)
    else:
        transport.write_artifact(RUN, "a.txt", b"a", 1.0)


@pytest.mark.parametrize(
    ("what", "body", "kind"),
    [
        ("span", b"", PROTOBUF),  # From 3.8 on.
        ("span", b"\n\x00", PROTOBUF),
        ("span", b'{"partialSuccess":null}', "application/json"),  # 3.4 to 3.7.
        ("file", b"", ""),  # Of 3.17.
        ("file", b"{}", "application/json"),  # Of 3.12.
    ],
)
def test_what_mlflow_answers_to_spans_and_files(what: str, body: bytes, kind: str) -> None:
    """MLflow's own answers are successes, also behind a redirect that keeps the request."""
    server = FakeRequester(200, body, **{"Content-Type": kind})
    write(server, what)
    server.hops = (308, 307)
    write(server, what)


MAINTENANCE = b'{"status":"maintenance"}'

CALLS: dict[str, Callable[[RestTransport], Any]] = {
    "experiment": lambda to: to.experiment_id("name", 1.0),
    "run": lambda to: to.create_run(NewRun("0", "name", 0, []), 1.0),
    "found": lambda to: to.find_runs("0", "a", 1.0),
    "batch": lambda to: to.log_batch("a", RunData(tags=[("a", "b")]), 1.0),
    "end": lambda to: to.end_run("a", "FINISHED", 0, 1.0),
    "delete": lambda to: to.delete_run("a", 1.0),
    "info": lambda to: to.write_trace({}, 1.0),
    "span": lambda to: write_a_span(to),
    "file": lambda to: to.write_artifact(RUN, "a.txt", b"a", 1.0),
    "cost": lambda to: to.sum_spans({}, 1.0),
}


def write_a_span(to: RestTransport) -> None:
    to.write_spans("0", [Span(name="a")], 1.0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("body", [MAINTENANCE, b"OK", b'{"status":"ok","code":0}'])
def test_another_programs_success_is_no_answer(
    call: Callable[[RestTransport], Any], body: bytes
) -> None:
    """Whatever it says, MLflow has stored nothing."""
    server = FakeRequester(200, body, **{"Content-Type": "application/json"})
    with pytest.raises(RetryLater):
        call(RestTransport("http://host", server))


def test_an_experiment_that_exists_and_is_not_shown_is_asked_for_again_later() -> None:
    """Such as of a replica that lags, or without the permission to see it."""
    asked: list[Request] = []

    def server(request: Request) -> requests.Response:
        asked.append(request)
        code = "RESOURCE_DOES_NOT_EXIST" if request.body is None else "RESOURCE_ALREADY_EXISTS"
        body = orjson.dumps({"error_code": code, "message": "name"})
        return FakeRequester(400, body)(request)

    with pytest.raises(RetryLater, match="'name' exists, but the server does not show it"):
        RestTransport("http://host", server).experiment_id("name", 1.0)
    assert len(asked) == 3


def test_spans_need_more_than_an_empty_success() -> None:
    """MLflow names the form of its answer to them."""
    with pytest.raises(RetryLater):
        write(FakeRequester(200, b"", **{"Content-Type": "text/plain"}), "span")


@pytest.mark.parametrize("path", ["write_spans", "write_artifact"])
def test_a_page_has_stored_nothing(path: str) -> None:
    """A page that is served for every address does not count as stored."""
    transport = RestTransport(
        "http://host", FakeRequester(200, PAGE, **{"Content-Type": "text/html"})
    )
    with pytest.raises(RetryLater):
        if path == "write_spans":
            transport.write_spans("0", [Span(name="a")], 1.0)
        else:
            transport.write_artifact(RUN, "a.txt", b"a", 1.0)


@pytest.mark.parametrize("hop", [301, 302, 303])
@pytest.mark.parametrize("status", [200, 404, 405, 500])
def test_a_redirect_that_drops_the_request_has_stored_nothing(hop: int, status: int) -> None:
    """After such a redirect not even MLflow's own answer is one to what was sent."""
    server = FakeRequester(status, NOT_FOUND if status >= 400 else b"{}")
    server.hops = (307, hop)
    later = outcome(server)
    assert isinstance(later, RetryLater)
    assert str(later).startswith("the server moved to https://sso.example; if it is yours, set ")


def test_a_question_may_be_redirected() -> None:
    """What has no body loses none."""
    server = FakeRequester(200, MLFLOW)
    server.hops = (301,)
    assert RestTransport("http://host", server).experiment_id("name", 1.0) == "0"


@pytest.mark.parametrize("uri", UNUSABLE)
def test_an_unusable_uri_loses_nothing(uri: str) -> None:
    """It can be corrected, so records wait; and what is said of it holds no password."""
    with pytest.raises(RetryLater) as later:
        RestTransport(uri.format(f"user:{SECRET}@")).experiment_id("name", 1.0)
    assert SECRET not in str(later.value)


def test_a_broken_header_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that cannot be sent is a reason to wait; no message shows it."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"{SECRET}\n")
    with pytest.raises(RetryLater) as later:
        RestTransport("http://127.0.0.1:9").experiment_id("name", 1.0)
    assert SECRET not in str(later.value)


def test_reasons_hold_no_credentials() -> None:
    """Reasons are logged, shown and kept with dead letters."""
    login = f"https://u:{SECRET}@sso.example/login?token={SECRET}"
    echo = orjson.dumps({"error_code": "INTERNAL_ERROR", "message": f"could not reach {login}"})
    answers: list[tuple[int, bytes, dict[str, str]]] = [
        *((status, body, {}) for status in (400, 404, 422, 500, 501) for body in (PAGE, echo)),
        *((301, b"", {"Location": where}) for where in (login, f"/a?token={SECRET}", "http://[")),
        (301, b"", {}),
    ]
    for answer in answers:
        server = FakeRequester(200)
        server.answer = answer
        reason = outcome(server)
        assert reason is not None
        assert SECRET not in str(reason)


@pytest.mark.parametrize("status", [301, 401, 403, 408, 429, 500, 502, 503, 504])
def test_a_server_that_is_not_itself_is_asked_later(status: int) -> None:
    """Overloaded, not authorised, moved, out of order: nothing is lost."""
    assert isinstance(outcome(FakeRequester(status, PAGE)), RetryLater)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("-1", None),
        ("nan", None),
        ("soon", None),
        ("Fri, 01 Jan 99999 00:00:00 GMT", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_obeyed(header: str, seconds: float | None) -> None:
    """Both forms of the header are understood, and a broken one is as none."""
    later = outcome(FakeRequester(429, b"", **{"Retry-After": header}))
    assert isinstance(later, RetryLater)
    assert later.after_s == seconds


# -- over a socket -----------------------------------------------------------------------------


class Listener:
    """A server of one thread on a socket: reads requests at a given speed, answers ``{}``.

    Attributes:
        redirects: so many requests are answered by a redirect to the same path.
        reads_for_s: at least so long does the reading of each body take, without ever pausing.
        bodies: what was received.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.redirects = 0
        self.reads_for_s = 0.0
        self.bodies: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    while self._answer(connection):
                        pass
                except OSError:  # The client has given up.
                    pass

    def _answer(self, connection: socket.socket) -> bool:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (byte := connection.recv(1)):
                return False
            head += byte
        headers = dict(line.lower().split(b": ") for line in head.splitlines()[1:-1])
        length, body = int(headers[b"content-length"]), bytearray()
        began = time.monotonic()
        while len(body) < length:
            if not (some := connection.recv(min(65536, length - len(body)))):
                return False
            body += some
            if time.monotonic() - began < self.reads_for_s:
                time.sleep(0.01)
        self.bodies.append(bytes(body))
        if self.redirects:
            self.redirects -= 1
            status, where = b"308 Permanent Redirect", b"Location: /elsewhere\r\n"
        else:
            status, where = b"200 OK", b""
        connection.sendall(
            b"HTTP/1.1 " + status + b"\r\n" + where + b"Content-Type: application/json\r\n"
            b"Content-Length: 2\r\n\r\n{}"
        )
        return True

    def close(self) -> None:
        """End the thread."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def test_a_large_body_may_take_longer_than_its_timeout(listener: Listener) -> None:
    """The timeout is that of a server that takes nothing, not of one that takes it slowly."""
    listener.reads_for_s = 1.5
    body = bytes(16 * 1024 * 1024)
    requester = SessionRequester(listener.uri)
    # With a small buffer it is the reader that sets the pace, on any system.
    buffer = (socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    adapter = requester.get_adapter(listener.uri)
    adapter.init_poolmanager(1, 1, socket_options=[buffer])  # type: ignore[attr-defined]
    transport = RestTransport(listener.uri, requester)
    transport.write_artifact(RUN, "file", body, 1.0)
    transport.close()
    assert listener.bodies == [body]


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1])
def test_a_body_goes_along_with_a_redirect(listener: Listener, size: int) -> None:
    """Of whatever size, it is sent anew, and with its length."""
    listener.redirects = 1
    body = b"x" * size
    transport = RestTransport(listener.uri)
    transport.write_artifact(RUN, "file", body, 10.0)
    transport.close()
    assert listener.bodies == [body, body]
