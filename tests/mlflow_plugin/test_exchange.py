"""What an answer means: MLflow alone can refuse something; all else is tried again."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import requests

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.exchange import Exchange
from qitos_mlflow.mlflow_plugin.rest import RestTransport
from qitos_mlflow.mlflow_plugin.transport import Poisoned, Refused

PATH = "/api/2.0/mlflow/runs/log-batch"
PROBE = "/api/2.0/mlflow/experiments/get?experiment_id=0"
MLFLOW = b'{"experiment": {"experiment_id": "0"}}'
NOT_FOUND = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}'
PAGE = b"<html>default backend</html>"


class Server:
    """A `Requester` that answers as it is told; `probe` is its answer to who it is."""

    def __init__(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.answer = (status, body, headers)
        self.probe: tuple[int, bytes, dict[str, str]] = (200, MLFLOW, {})
        self.paths: list[str] = []

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> requests.Response:
        self.paths.append(path)
        status, content, given = self.probe if path == PROBE else self.answer
        response = requests.Response()
        response.status_code = status
        response._content = content
        response.headers.update({"Content-Length": str(len(content)), **given})
        return response


def outcome(server: Server) -> BaseException | None:
    """What a call on `server` raises."""
    try:
        Exchange("http://u:secret@host:5000", server).json("POST", PATH, b"{}", 1.0)
    except (RetryLater, Refused, Poisoned) as error:
        return error
    return None


def test_mlflows_word_is_final() -> None:
    """An error of MLflow's own below 500 is a refusal, with its code; nobody is asked again."""
    server = Server(404, NOT_FOUND)
    refusal = outcome(server)
    assert isinstance(refusal, Refused)
    assert refusal.code == "RESOURCE_DOES_NOT_EXIST"
    assert server.paths == [PATH]


@pytest.mark.parametrize("status", [400, 404, 405])
def test_only_mlflow_refuses(status: int) -> None:
    """A page is a refusal if MLflow is behind it, and none while something else answers."""
    server = Server(status, PAGE)
    refusal = outcome(server)
    assert isinstance(refusal, Refused)
    assert refusal.code == f"HTTP {status}"
    for probe in [(404, PAGE, {}), (200, b'{"status": "ok"}', {}), (502, b"", {})]:
        server.probe = probe
        assert isinstance(outcome(server), RetryLater)


def test_a_proxy_may_refuse_a_large_request() -> None:
    """A request too large for what is in front of MLflow is one for ever."""
    server = Server(413, PAGE)
    server.probe = (502, b"", {})
    assert isinstance(outcome(server), Refused)


@pytest.mark.parametrize("body", [b"", PAGE, b"[]", b'{"run'])
def test_an_answer_that_is_no_object_is_not_mlflows(body: bytes) -> None:
    """A success that does not look like MLflow's is none."""
    assert isinstance(outcome(Server(200, body)), RetryLater)
    assert outcome(Server(200, b"{}")) is None


def test_a_call_needs_what_mlflow_answers() -> None:
    """Another program's JSON on the port creates no run."""
    transport = RestTransport("http://host", Server(200, b'{"hello": "world"}'))
    with pytest.raises(RetryLater):
        transport.create_run("0", 0, "name", [], 1.0)
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
        Exchange("http://host", cut).send("POST", PATH, b"", {}, 1.0)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b'{"error_code": "INTERNAL_ERROR", "message": "oops"}'),
        (500, b'{"detail": "Internal Server Error"}'),
        (422, b'{"detail": "Failed to log OpenTelemetry spans"}'),
    ],
)
def test_a_server_that_breaks_is_not_refusing(status: int, body: bytes) -> None:
    """MLflow failing on a call may be the call's fault, or not."""
    assert isinstance(outcome(Server(status, body)), Poisoned)


def test_reasons_hold_no_credentials() -> None:
    """Reasons are logged and shown."""
    server = Server(404, PAGE)
    server.probe = (404, PAGE, {})
    for answer in [(404, PAGE, {}), (500, PAGE, {}), (301, b"", {})]:
        server.answer = answer
        assert "secret" not in str(outcome(server))


@pytest.mark.parametrize("status", [301, 401, 403, 408, 429, 500, 502, 503, 504])
def test_a_server_that_is_not_itself_is_asked_later(status: int) -> None:
    """Overloaded, not authorised, moved, out of order: nothing is lost."""
    assert isinstance(outcome(Server(status, PAGE)), RetryLater)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("-1", 0.0),
        ("nan", 0.0),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_obeyed(header: str, seconds: float | None) -> None:
    """Both forms of the header are understood, and a broken one is as none."""
    later = outcome(Server(429, b"", **{"Retry-After": header}))
    assert isinstance(later, RetryLater)
    assert later.after_s == seconds
