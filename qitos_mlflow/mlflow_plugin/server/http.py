"""One request at a time to an MLflow server over http(s): how it is sent.

Receives requests from `rest`, hands back whatever is answered within the time of the request.
`verdict` says what that means.
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
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple
from urllib.parse import urljoin

import requests
from urllib3.util import Timeout

from qitos_mlflow.mlflow_plugin.server.access import RENEW_S, Access, read_access
from qitos_mlflow.mlflow_plugin.server.connections import WatchedAdapter

CONNECT_TIMEOUT_S = 3.0
"""Longest wait for a connection; a server that is there answers in milliseconds."""
REQUEST_TIMEOUT_S = 10.0
"""Longest time for one request, from its connection to the end of the answer, redirects included
(seconds), unless MLFLOW_HTTP_REQUEST_TIMEOUT is set to more. What MLflow waits without that, 120 s,
would hold up all else for as long."""
SMALL_BYTES = 64 * 1024
"""A body up to this size fits into the system's buffers and is sent without waiting."""
SLOWEST = 16 * 1024
"""Larger ones get the time for this many bytes a second beside: the slowest line that is used."""

UNAUTHORISED = frozenset({401, 403, 407})


class Request(NamedTuple):
    """One request to a server.

    Attributes:
        method: HTTP's.
        path: below the tracking URI, with the query if there is one.
        timeout_s: longest time for all of it, but for the time that a large body takes (seconds).
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


class _Body(io.BytesIO):
    """A large body: sent piece by piece, by a server that takes `SLOWEST` bytes a second."""

    def __init__(self, content: bytes, timeout_s: float) -> None:
        super().__init__(content)
        self._timeout_s, self._began = timeout_s, 0.0

    def read(self, size: int | None = -1) -> bytes:
        now = time.monotonic()
        if not self.tell():  # Perhaps again, after a redirect.
            self._began = now
        if now - self._began > self._timeout_s + self.tell() / SLOWEST:
            raise TimeoutError("the server takes too little at a time")
        return super().read(size)


class SessionRequester(requests.Session):
    """A `Requester` with a session of its own, set up as MLflow's client would be.

    Without cookies: no call needs any, and a server could send more of them with each answer.

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
        self.headers["Accept-Encoding"] = "gzip"  # What `connections` unpacks.
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self._uri = uri
        self._routing = routing
        self._asked = asked
        self._trusted = trusted
        self._access: Access | None = None
        self._environment: Any = None
        self._renew_at = 0.0
        self._deadline = self._connect_s = self._timeout_s = 0.0

    def __call__(self, request: Request) -> requests.Response:
        """Send `request`."""
        if self._access is None or time.monotonic() >= self._renew_at:
            self._access = read_access(
                self._uri, self._routing, asked=self._asked, trusted=self._trusted
            )
            self._renew_at = time.monotonic() + RENEW_S
            self._environment = None
        data: bytes | io.BytesIO | None = request.body
        self._timeout_s, self._connect_s = request.timeout_s, CONNECT_TIMEOUT_S
        self._deadline = time.monotonic() + request.timeout_s
        if request.body is not None and len(request.body) > SMALL_BYTES and not self._access.signs:
            # urllib3 sends under the connection's timeout: bytes all in that time, a file piece by
            # piece with as long for each.
            data, self._connect_s = _Body(request.body, request.timeout_s), request.timeout_s
            self._deadline += len(request.body) / SLOWEST
        response = self.request(
            request.method,
            self._uri.rstrip("/") + request.path,
            data=data,
            headers={**self._access.headers, **request.headers},
            auth=self._access.authorise,
            # For each request: with a session's, REQUESTS_CA_BUNDLE would come first.
            verify=self._access.verify,
            cert=self._access.certificate,
        )
        if response.status_code in UNAUTHORISED:
            self._access = None  # A token may have been renewed.
        return response

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send one request, or what follows a redirect, within what is left of the time."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise requests.ReadTimeout("redirects take too long")
        limits = Timeout(total=left_s, connect=min(left_s, self._connect_s), read=self._timeout_s)
        return super().send(request, **{**options, "timeout": limits})

    def merge_environment_settings(self, *given: Any) -> Any:
        """What the environment says of proxies; looked up anew only with the access.

        The same for each request, all of which go to one server. To look takes a third of the time
        of a request.
        """
        if self._environment is None:
            self._environment = super().merge_environment_settings(*given)
        return self._environment

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Follow the server only to itself: records and credentials are for no other one."""
        leaves: Any = self.should_strip_auth
        try:
            target = super().get_redirect_target(resp)
            return None if target and leaves(resp.url, urljoin(resp.url, target)) else target
        except ValueError:  # It is no address.
            return None

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
