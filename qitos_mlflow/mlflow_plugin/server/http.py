"""One request at a time to an MLflow server over http(s): how it is sent, what its answer means.

Receives requests from `rest`, hands back answers and what they mean: one of the failures that
`Transport` knows, or none. Only MLflow's own words can refuse something for good. A router's or a
proxy's page, another program on the port or half an answer say nothing about the request, so it is
sent again, however often.
"""

from __future__ import annotations

import io

# Not used here. requests imports it at its first request; a fork during that import leaves a child
# whose own first request hangs. This import happens while a sink is opened, when forks wait.
import netrc  # noqa: F401
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.util import Retry

from qitos_mlflow import _json
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.server.access import RENEW_S, Access, read_access
from qitos_mlflow.mlflow_plugin.server.connections import WatchedAdapter
from qitos_mlflow.mlflow_plugin.server.transport import (
    NotThere,
    Poisoned,
    Refused,
    TooLarge,
    Unanswered,
    failure,
    readable,
)

CONNECT_TIMEOUT_S = 3.0
"""Longest wait for a connection; a server that is there answers in milliseconds."""
REQUEST_TIMEOUT_S = 10.0
"""Longest wait for one answer (seconds), unless MLFLOW_HTTP_REQUEST_TIMEOUT is set to more. What
MLflow waits without that, 120 s, would hold up all else for as long."""
SMALL_BYTES = 64 * 1024
"""A body up to this size fits into the system's buffers and is sent without waiting."""

OVERLOADED = frozenset({408, 425, 429, 502, 503, 504})
UNAUTHORISED = frozenset({401, 403, 407})
TOO_LARGE = 413
"""A proxy may say so of this request alone; it may accept smaller ones."""
NEVER_TOO_LARGE = 4096
"""No limit is meant to keep out a body of up to this size (bytes): the proxy is out of order."""
SPANS = "/v1/traces"
"""The one endpoint that MLflow answers in FastAPI's form: ``detail``, without an error code."""
NOT_THERE = frozenset({404, 405, 501})
"""What a server answers that has no such endpoint, and a router that does not know it yet."""
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
        answer: the field of MLflow's answer; "": it has none.
    """

    method: str
    path: str
    timeout_s: float
    body: bytes | None = None
    headers: Mapping[str, str] = {"Content-Type": "application/json"}
    answer: str = ""


Requester = Callable[[Request], requests.Response]
"""Sends a request and returns the answer; raises `requests.RequestException`."""


class SessionRequester(requests.Session):
    """A `Requester` with a session of its own, set up as MLflow's client would be.

    Args:
        uri: of the server.
        routing: headers that say whose data it is; None: those of this process, as they are now.
        asked: MLflow's plugins could be asked when `routing` was recorded; if not, they are now.
        trusted: credentials of this process are meant for this server.
    """

    def __init__(
        self,
        uri: str,
        routing: Mapping[str, str] | None = None,
        *,
        asked: bool = True,
        trusted: bool = True,
    ) -> None:
        super().__init__()
        for scheme in ("http://", "https://"):
            self.mount(scheme, WatchedAdapter())
        self._uri = uri
        self._routing = routing
        self._asked = asked
        self._trusted = trusted
        self._access: Access | None = None
        self._renew_at = 0.0

    def __call__(self, request: Request) -> requests.Response:
        """Send `request`."""
        if self._access is None or time.monotonic() >= self._renew_at:
            self._access = read_access(
                self._uri, self._routing, asked=self._asked, trusted=self._trusted
            )
            self._renew_at = time.monotonic() + RENEW_S
        data: bytes | io.BytesIO | None = request.body
        connect_s = min(CONNECT_TIMEOUT_S, request.timeout_s)
        if request.body is not None and len(request.body) > SMALL_BYTES and not self._access.signs:
            # urllib3 sends under the connection's timeout: bytes all in that time, a file piece by
            # piece with as long for each.
            data, connect_s = io.BytesIO(request.body), request.timeout_s
        response = self.request(
            request.method,
            self._uri.rstrip("/") + request.path,
            data=data,
            headers={**self._access.headers, **request.headers},
            timeout=(connect_s, request.timeout_s),
            auth=self._access.authorise,
            # For each request: with a session's, REQUESTS_CA_BUNDLE would come first.
            verify=self._access.verify,
            cert=self._access.certificate,
        )
        if response.status_code in UNAUTHORISED:
            self._access = None  # A token may have been renewed.
        return response

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Follow the server only to itself: records and credentials are for no other one."""
        target = super().get_redirect_target(resp)
        leaves: Any = self.should_strip_auth
        return None if target and leaves(resp.url, urljoin(resp.url, target)) else target

    def rebuild_auth(self, prepared_request: object, response: object) -> None:
        """Add nothing after a redirect, such as what ``~/.netrc`` has, and take nothing away."""


def patience() -> float:
    """MLFLOW_HTTP_REQUEST_TIMEOUT as a multiple of `REQUEST_TIMEOUT_S`; at least 1."""
    try:
        set_s = float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", ""))
    except ValueError:
        return 1.0
    return max(1.0, min(set_s, 86_400.0) / REQUEST_TIMEOUT_S)


@contextmanager
def uninstrumented() -> Iterator[None]:
    """Keep the program's OpenTelemetry from making spans of our own calls in the block."""
    context: Any = sys.modules.get("opentelemetry.context")
    key = getattr(context, "_SUPPRESS_INSTRUMENTATION_KEY", None)
    if key is None:  # Nothing is instrumented.
        yield
        return
    token = context.attach(context.set_value(key, True))
    try:
        yield
    finally:
        context.detach(token)


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
    except requests.ReadTimeout as error:
        raise Unanswered(f"{type(error).__name__} from {server}") from error
    except (OSError, HTTPError) as error:
        raise RetryLater(f"{type(error).__name__} from {server}") from error
    if not response.content and not any(name in response.headers for name in LENGTHS):
        # requests takes an answer that was cut amid its headers for a whole one.
        raise RetryLater(f"a truncated answer from {server}")
    hops = [hop.status_code for hop in response.history]
    if request.body is not None and not WITH_BODY.issuperset(hops):
        raise RetryLater(_moved(response.url))
    return response


def verdict(request: Request, response: requests.Response, server: str) -> Exception | None:
    """What an answer of `server` says of the request: why it failed; None: it is carried out.

    Refused: MLflow says so in its own form, with an error code or, of spans, with a detail.
    Poisoned: MLflow failed on it. TooLarge: something on the way takes smaller ones. NotThere: the
    server may have no such endpoint. RetryLater: all else.
    """
    status, headers, body = response.status_code, response.headers, response.content
    code, answer = f"HTTP {status}", json_object(body)
    foreign = f"{code} from {server}, which is not MLflow's answer"
    if status < 300:
        return None if _is_mlflows(request, headers, body, answer) else RetryLater(foreign)
    if status < 400:
        return RetryLater(f"{code}: {_moved(headers.get('Location'))}")
    if status in OVERLOADED:
        return RetryLater(code, _retry_after_s(headers.get("Retry-After")))
    answer = answer or {}
    message = str(answer.get("message") or answer.get("detail") or _text(response))
    words = readable(message)
    if status in UNAUTHORISED:
        advice = "check MLFLOW_TRACKING_USERNAME/PASSWORD or _TOKEN"
        return RetryLater(f"{code} from {server}: {words or 'no reason given'}; {advice}")
    if status == TOO_LARGE and request.body is not None:
        large = TooLarge(code, words)
        return large if len(request.body) > NEVER_TOO_LARGE else RetryLater(str(large))
    if isinstance(mlflows := answer.get("error_code"), str):
        return failure(mlflows, message)
    if "detail" in answer and request.path == SPANS:
        if status == 400:
            return Refused(code, words)
        if status == 422:  # MLflow says so of every failure of its own, its database included.
            return Poisoned(f"{code}: {words}")
        if status == 501:
            return Refused("NOT_IMPLEMENTED", words)
    return NotThere(foreign) if status in NOT_THERE else RetryLater(foreign)


def _is_mlflows(
    request: Request, headers: Mapping[str, str], body: bytes, answer: dict[str, Any] | None
) -> bool:
    """Whether an answer to `request` that says "carried out" has MLflow's form.

    Another program may say so of anything, such as a page for a time of maintenance.
    """
    if request.path == SPANS and PROTOBUF in headers.get("Content-Type", ""):
        return True
    if request.method == "PUT" and not body:  # Of artifacts.
        return True
    return answer is not None and (not answer or request.answer in answer)


def _text(response: requests.Response) -> str:
    """The text of an answer, if it is one for people: no page and no other format."""
    plain = "text/plain" in response.headers.get("Content-Type", "text/plain")
    text = response.content[:4096].decode("utf-8", "replace").strip()
    return text if plain and not text.startswith("<") else ""


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
        answer = _json.loads(body)
    except _json.JSONDecodeError:
        return None
    return answer if isinstance(answer, dict) else None


def _retry_after_s(header: str | None) -> float | None:
    """Seconds the server asked to wait, from either form of the header (RFC 9110, 10.2.3)."""
    try:
        return float(Retry().parse_retry_after(header or ""))
    except (InvalidHeader, ValueError, OverflowError):
        return None
