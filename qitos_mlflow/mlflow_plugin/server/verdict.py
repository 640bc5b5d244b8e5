"""What an answer over http(s) means.

Receives a request and what came back, hands on one of the failures that `Transport` knows, or none.
Only MLflow's own words can refuse something for good. A router's or a proxy's page, another program
on the port or half an answer say nothing about the request, so it is sent again, however often.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError
from urllib3.util import Retry

from qitos_mlflow import _json
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.server.http import UNAUTHORISED, Request, Requester
from qitos_mlflow.mlflow_plugin.server.transport import (
    NotThere,
    Oversized,
    Poisoned,
    Refused,
    TooLarge,
    Unanswered,
    failure,
    readable,
)

MOST_PARTS = 100_000
"""Objects and lists in an answer. A list in a list is two bytes of JSON, and 60 in memory."""

OVERLOADED = frozenset({408, 425, 429, 502, 503, 504})
CARRIED_OUT = frozenset({200, 201, 204})
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
    except (requests.ReadTimeout, ReadTimeoutError) as error:
        raise Unanswered(f"{type(error).__name__} from {server}") from error
    except (OSError, HTTPError) as error:
        raise RetryLater(f"{type(error).__name__} from {server}") from error
    if not response.content and not any(name in response.headers for name in LENGTHS):
        # requests takes an answer that was cut amid its headers for a whole one.
        raise RetryLater(f"a truncated answer from {server}")
    hops = [hop.status_code for hop in response.history]
    if request.body is not None and not WITH_BODY.issuperset(hops):
        raise RetryLater(_moved(response.url, ""))
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
        if status not in CARRIED_OUT or not _is_mlflows(request, headers, body, answer):
            return RetryLater(foreign)
        return _rejection(body) if request.path == SPANS and answer is None else None
    if status < 400:
        return RetryLater(f"{code}: {_moved(response.url, headers.get('Location'))}")
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
    mlflows = answer.get("error_code")
    if isinstance(mlflows, str) and body.count(b'"error_code"') == 1:  # It says one thing.
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
    kind = headers.get("Content-Type", "")
    if request.path == SPANS and PROTOBUF in kind:
        return True
    if request.method == "PUT" and not body:  # Of artifacts.
        return True
    if kind and "json" not in kind:
        return False
    return answer is not None and (not answer or request.answer in answer)


def _rejection(body: bytes) -> RetryLater | Poisoned | None:
    """What an answer to spans says of some of them. Which ones they are is not known."""
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError:
        return RetryLater("an answer to spans that is not OpenTelemetry's")
    rejected, why = partial.rejected_spans, readable(partial.error_message)
    return Poisoned(f"{rejected} spans are rejected: {why}") if rejected else None


def _text(response: requests.Response) -> str:
    """The text of an answer, if it is one for people: no page and no other format."""
    plain = "text/plain" in response.headers.get("Content-Type", "text/plain")
    text = response.content[:4096].decode("utf-8", "replace").strip()
    return text if plain and not text.startswith("<") else ""


def _moved(asked: str, address: str | None) -> str:
    """Says where the server is: its name only, because login pages put tokens into the rest."""
    try:
        parts = urlsplit(urljoin(asked, address or ""))
        name = parts.netloc.rpartition("@")[2]
        where = f"{parts.scheme}://{name}" if name else "another path"
    except ValueError:
        where = "nowhere"
    return (
        f"the server moved to {where}; if it is yours, set MLFLOW_TRACKING_URI to its new address"
    )


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that an answer holds; None when it holds none, such as a proxy's page.

    Raises:
        Oversized: as Python's objects it would be many times as large.
    """
    if body.count(b"{") + body.count(b"[") > MOST_PARTS:
        raise Oversized("an answer with too many parts")
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
