"""One request at a time to an MLflow server over http(s): how it is sent, what its answer means.

Receives requests from `rest`, hands back answers and what they mean: one of the failures that
`Transport` knows, or none. Only MLflow itself can refuse something for good. A proxy's page,
another program on the port or half an answer say nothing about the request, so it is sent again.
"""

from __future__ import annotations

import configparser
import io

# Not used here: requests imports it with its first request, and a process that forks amid that
# leaves a child whose own first request hangs. A fork waits while a sink is opened, not later.
import netrc  # noqa: F401
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
import requests
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import Retry

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused, failure, readable

CONNECT_TIMEOUT_S = 3.0
"""Longest wait for a connection; a server that is there answers in milliseconds."""
SMALL_BYTES = 64 * 1024
"""A body up to this size fits into the system's buffers and is sent without waiting."""

OVERLOADED = frozenset({408, 425, 429, 502, 503, 504})
UNAUTHORISED = frozenset({401, 403, 407})
TOO_LARGE = frozenset({413, 414, 431})
"""A proxy may say so of this request alone; it may accept smaller ones."""
UNPROCESSABLE = "HTTP 422"
"""MLflow's span endpoint says so of every failure of its own, a broken database included."""
NOT_IMPLEMENTED = frozenset({"HTTP 501", "NOT_IMPLEMENTED"})
"""A file store says so of what it can never do."""
WITH_BODY = frozenset({307, 308})
"""Redirects that requests follows with the whole request. After others it leaves the body out, so
the answer, of a login page or of MLflow itself, says nothing about the body."""
PROTOBUF = "application/x-protobuf"
LENGTHS = ("Content-Length", "Transfer-Encoding")
"""A server that keeps connections open marks the end of its answer with one of these."""


class Request(NamedTuple):
    """One request to a server.

    Attributes:
        method: HTTP's.
        path: below the tracking URI, with the query if there is one.
        timeout_s: longest wait for a connection, and for each piece of the answer (seconds).
        body: what is sent; None for nothing.
        headers: those of this request alone.
    """

    method: str
    path: str
    timeout_s: float
    body: bytes | None = None
    headers: Mapping[str, str] = {"Content-Type": "application/json"}


Requester = Callable[[Request], requests.Response]
"""Sends a request and returns the answer; raises `requests.RequestException`."""


def _credentials() -> tuple[str, str] | None:
    """User and password from the environment, else from MLflow's credentials file."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user is None or password is None:
        config = configparser.ConfigParser()
        config.read(Path("~/.mlflow/credentials").expanduser())
        user = user or config.get("mlflow", "mlflow_tracking_username", fallback=None)
        password = password or config.get("mlflow", "mlflow_tracking_password", fallback=None)
    return (user, password) if user and password else None


class SessionRequester(requests.Session):
    """A `Requester` with a session of its own, set up as MLflow's environment variables say."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        environ = os.environ
        self._base = uri.rstrip("/")
        if token := environ.get("MLFLOW_TRACKING_TOKEN"):
            self.headers["Authorization"] = f"Bearer {token}"
        elif credentials := _credentials():
            self.auth = credentials
        if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
            self.verify = False
        elif path := environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
            self.verify = path
        if path := environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
            self.cert = path
        if workspace := environ.get("MLFLOW_WORKSPACE"):
            self.headers["X-MLFLOW-WORKSPACE"] = workspace

    def __call__(self, request: Request) -> requests.Response:
        """Send `request`."""
        data: bytes | io.BytesIO | None = request.body
        connect_s = min(CONNECT_TIMEOUT_S, request.timeout_s)
        if request.body is not None and len(request.body) > SMALL_BYTES:
            # urllib3 sends under the connection's timeout: bytes all in that time, a file piece by
            # piece with as long for each.
            data, connect_s = io.BytesIO(request.body), request.timeout_s
        return self.request(
            request.method,
            self._base + request.path,
            data=data,
            headers=dict(request.headers),
            timeout=(connect_s, request.timeout_s),
        )


def answer_to(request: Request, requester: Requester, server: str) -> requests.Response:
    """Send `request`; returns the answer, whatever its status, if it is whole and one to it.

    Raises:
        RetryLater: `server` cannot be reached, or has answered something else.
    """
    try:
        response = requester(request)
    except ValueError as error:  # Of requests or of urllib3; its text holds what they got.
        kind = type(error).__name__
        raise RetryLater(
            f"{kind}: {server!r} is not a usable tracking URI, or a header is malformed"
        ) from None
    except (OSError, HTTPError) as error:
        raise RetryLater(f"{type(error).__name__} from {server}") from error
    if not response.content and not any(name in response.headers for name in LENGTHS):
        # requests takes an answer that was cut amid its headers for a whole one.
        raise RetryLater(f"a truncated answer from {server}")
    hops = [hop.status_code for hop in response.history]
    if request.body is not None and not WITH_BODY.issuperset(hops):
        raise RetryLater(_moved(response.url))
    return response


def verdict(
    status: int, headers: Mapping[str, str], body: bytes, server: str
) -> RetryLater | Poisoned | Refused | None:
    """What an answer of `server` says of the request: why it failed; None: it is carried out.

    RetryLater: overloaded, not authorised, or not MLflow that answers. Poisoned: MLflow failed on
    it. Refused: MLflow will never accept it; or, with a code such as ``HTTP 404``, some program
    says so that may be another one.
    """
    code, answer = f"HTTP {status}", json_object(body)
    foreign = f"{code} from {server}, which is not MLflow's answer"
    if status < 300:
        # MLflow answers spans with protobuf, of no bytes, and artifacts with ``{}`` or nothing.
        whole = not body or answer is not None or PROTOBUF in headers.get("Content-Type", "")
        return None if whole else RetryLater(foreign)
    if status < 400:
        return RetryLater(f"{code}: {_moved(headers.get('Location'))}")
    if status in OVERLOADED:
        return RetryLater(code, _retry_after_s(headers.get("Retry-After")))
    if status in UNAUTHORISED:
        return RetryLater(f"{code}: check MLFLOW_TRACKING_USERNAME/PASSWORD or _TOKEN")
    if status >= 500 and not answer:
        # Something in front of MLflow is out of order, or it is being exchanged.
        return RetryLater(foreign)
    answer = answer or {}
    message = str(answer.get("message") or answer.get("detail") or body.decode("utf-8", "replace"))
    code = str(answer.get("error_code", code))
    if code == UNPROCESSABLE or (status >= 500 and code not in NOT_IMPLEMENTED):
        return Poisoned(f"{code}: {readable(message)}")
    return failure(code, message)


def _moved(address: str | None) -> str:
    """Says where the server is: its name only, because login pages put tokens into the rest."""
    try:
        parts = urlsplit(address or "")
        name = parts.netloc.rpartition("@")[2]
        where = f"{parts.scheme}://{name}" if name else "another path"
    except ValueError:
        where = "nowhere"
    return f"the server moved to {where}"


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that an answer holds; None when it holds none, such as a proxy's page."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return answer if isinstance(answer, dict) else None


def _retry_after_s(header: str | None) -> float | None:
    """Seconds the server asked to wait, from either form of the header (RFC 9110, 10.2.3)."""
    try:
        return float(Retry().parse_retry_after(header or ""))
    except (InvalidHeader, ValueError, OverflowError):
        return None
