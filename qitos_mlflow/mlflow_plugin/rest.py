"""MLflow over http(s): its documented REST and OTLP endpoints, without mlflow in the process.

`import mlflow` costs 1.1 s of CPU and 155 MB and stalls the agent's threads for up to 87 ms
(MLFLOW.md 5e, 8); this module costs a tenth. Authentication, TLS and workspace follow MLflow's
environment variables; what only mlflow can do (SigV4, auth plugins, request header plugins,
Databricks) goes through mlflow's own `http_request`, which `store.mlflow_requester` provides
behind the same `Requester` call.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import orjson
import requests

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.transport import Poisoned, Refused, RunRef

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from qitos_mlflow.mlflow_plugin.metrics import Metric

CONNECT_TIMEOUT_S = 3.0
"""Longest wait for a connection; a server that is there answers in milliseconds."""

OVERLOADED = frozenset({408, 425, 429, 502, 503, 504})
UNAUTHORISED = frozenset({401, 403, 407})

Requester = Callable[[str, str, bytes | None, Mapping[str, str], float], requests.Response]
"""``(method, path, body, headers, timeout_s) -> response``; raises `requests.RequestException`."""


def needs_mlflow(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why an http destination needs mlflow's own client, or None when it does not."""
    for name in ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"):
        if environ.get(name, "").lower() not in ("", "0", "false"):
            return f"{name} is set"
    from importlib_metadata import entry_points

    for point in entry_points(group="mlflow.request_header_provider"):
        if not point.value.startswith("mlflow."):
            return f"the request header plugin {point.name!r} is installed"
    return None


def _credentials(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password from the environment, else from MLflow's credentials file."""
    user = environ.get("MLFLOW_TRACKING_USERNAME")
    password = environ.get("MLFLOW_TRACKING_PASSWORD")
    path = Path("~/.mlflow/credentials").expanduser()
    if (user is None or password is None) and path.exists():
        config = configparser.ConfigParser()
        config.read(path)
        if config.has_section("mlflow"):
            user = user or config.get("mlflow", "mlflow_tracking_username", fallback=None)
            password = password or config.get("mlflow", "mlflow_tracking_password", fallback=None)
    return (user, password) if user and password else None


class SessionRequester:
    """A `Requester` on one `requests.Session`, set up as MLflow's environment variables say."""

    def __init__(self, uri: str, environ: Mapping[str, str] = os.environ) -> None:
        self._base = uri.rstrip("/")
        self._session = session = requests.Session()
        if token := environ.get("MLFLOW_TRACKING_TOKEN"):
            session.headers["Authorization"] = f"Bearer {token}"
        elif credentials := _credentials(environ):
            session.auth = credentials
        if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
            session.verify = False
        elif path := environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"):
            session.verify = path
        if path := environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"):
            session.cert = path
        if workspace := environ.get("MLFLOW_WORKSPACE"):
            session.headers["X-MLFLOW-WORKSPACE"] = workspace

    def __call__(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> requests.Response:
        """Send one request; `timeout_s` bounds the connection and each wait for data."""
        return self._session.request(
            method,
            self._base + path,
            data=body,
            headers=dict(headers),
            timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
        )

    def close(self) -> None:
        """Close the pooled connections."""
        self._session.close()


class RestTransport:
    """`Transport` over http(s). Used by one thread."""

    def __init__(self, uri: str, requester: Requester | None = None) -> None:
        self.uri = uri
        self._request = requester or SessionRequester(uri)

    # -- calls -------------------------------------------------------------------------------

    def experiment_id(self, name: str, timeout_s: float) -> str:
        """The experiment called `name`, created when missing."""
        path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=" + quote(name, safe="")
        try:
            found = self._json("GET", path, None, timeout_s)["experiment"]
        except Refused as refusal:
            if refusal.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if found.get("lifecycle_stage") == "deleted":
                raise Refused(
                    "INVALID_STATE",
                    f"experiment {name!r} is deleted; restore it with "
                    f"`mlflow experiments restore --experiment-id {found['experiment_id']}`",
                )
            return str(found["experiment_id"])
        try:
            made = self._api("experiments/create", {"name": name}, timeout_s)
        except Refused as refusal:
            if refusal.code == "RESOURCE_ALREADY_EXISTS":  # Somebody else was faster.
                return self.experiment_id(name, timeout_s)
            raise
        return str(made["experiment_id"])

    def create_run(
        self,
        experiment_id: str,
        start_ms: int,
        name: str,
        tags: Sequence[tuple[str, str]],
        timeout_s: float,
    ) -> RunRef:
        """Create a run."""
        answer = self._api(
            "runs/create",
            {
                "experiment_id": experiment_id,
                "start_time": start_ms,
                "run_name": name,
                "tags": _pairs(tags),
            },
            timeout_s,
        )
        return _run_ref(answer["run"]["info"])

    def find_run(self, experiment_id: str, trace_id: str, timeout_s: float) -> RunRef | None:
        """The run tagged ``qitos.trace_id`` = `trace_id`, or None."""
        answer = self._api(
            "runs/search",
            {
                "experiment_ids": [experiment_id],
                "filter": f"tags.`qitos.trace_id` = '{trace_id}'",
                "max_results": 1,
            },
            timeout_s,
        )
        runs = answer.get("runs") or []
        return _run_ref(runs[0]["info"]) if runs else None

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric],
        params: Sequence[tuple[str, str]],
        tags: Sequence[tuple[str, str]],
        timeout_s: float,
    ) -> None:
        """Log metrics, params and tags in one call."""
        self._api(
            "runs/log-batch",
            {
                "run_id": run_id,
                "metrics": [
                    {"key": m.key, "value": m.value, "timestamp": m.timestamp_ms, "step": m.step}
                    for m in metrics
                ],
                "params": _pairs(params),
                "tags": _pairs(tags),
            },
            timeout_s,
        )

    def end_run(self, run_id: str, status: str, end_ms: int, timeout_s: float) -> None:
        """Set the run's status and end time."""
        self._api(
            "runs/update", {"run_id": run_id, "status": status, "end_time": end_ms}, timeout_s
        )

    def write_trace(self, info: dict[str, Any], timeout_s: float) -> None:
        """Create or replace a trace."""
        body = orjson.dumps({"trace": {"trace_info": info}})
        self._json("POST", "/api/3.0/mlflow/traces", body, timeout_s)

    def write_spans(self, experiment_id: str, spans: Sequence[Span], timeout_s: float) -> None:
        """Create or replace spans, in OpenTelemetry's own protocol."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )
        from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans

        message = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])]
        )
        headers = {
            "Content-Type": "application/x-protobuf",
            "x-mlflow-experiment-id": experiment_id,
        }
        self._send("POST", "/v1/traces", message.SerializeToString(), headers, timeout_s)

    def sum_spans(
        self,
        experiment_id: str,
        metric: str,
        filters: Sequence[str],
        times_ms: tuple[int, int],
        timeout_s: float,
    ) -> float | None:
        """The sum of a metric over the spans that match all `filters`; None if none has it."""
        question = {
            "experiment_ids": [experiment_id],
            "view_type": "SPANS",
            "metric_name": metric,
            "aggregations": [{"aggregation_type": "SUM"}],
            "filters": list(filters),
            "start_time_ms": times_ms[0],
            "end_time_ms": times_ms[1],
        }
        path = "/api/3.0/mlflow/traces/metrics"
        points = self._json("POST", path, orjson.dumps(question), timeout_s).get("data_points")
        return float(points[0]["values"]["SUM"]) if points else None

    def write_artifact(self, run: RunRef, path: str, data: bytes, timeout_s: float) -> None:
        """Create or replace an artifact, through the server where it serves artifacts."""
        parts = urlsplit(run.artifact_uri)
        if parts.scheme != "mlflow-artifacts":
            from qitos_mlflow.mlflow_plugin.store import write_artifact

            write_artifact(run.artifact_uri, path, data, self.uri)
            return
        where = quote(f"{parts.path.strip('/')}/{path}")
        headers = {"Content-Type": "application/octet-stream"}
        self._send("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{where}", data, headers, timeout_s)

    def close(self) -> None:
        """Give up connections."""
        close = getattr(self._request, "close", None)
        if close is not None:
            close()

    # -- one request -------------------------------------------------------------------------

    def _api(self, name: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return self._json("POST", f"/api/2.0/mlflow/{name}", orjson.dumps(body), timeout_s)

    def _json(self, method: str, path: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        response = self._send(method, path, body, headers, timeout_s)
        try:
            answer = orjson.loads(response.content or b"{}")
        except orjson.JSONDecodeError as error:
            # A proxy's page or a cut answer; MLflow's own answers are JSON.
            raise RetryLater(f"{path}: the answer is not JSON") from error
        return answer if isinstance(answer, dict) else {}

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> requests.Response:
        try:
            response = self._request(method, path, body, headers, timeout_s)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise RetryLater(f"{self.uri!r} is no usable tracking URI: {error}") from error
        except (requests.RequestException, OSError) as error:
            raise RetryLater(f"{type(error).__name__} from {urlsplit(self.uri).netloc}") from error
        if response.status_code < 300:
            return response
        raise _failure(path, response)


def _failure(path: str, response: requests.Response) -> Exception:
    """The exception that says what to do after an answer with an error status."""
    status = response.status_code
    if status in OVERLOADED:
        return RetryLater(f"HTTP {status}", _retry_after_s(response.headers.get("Retry-After")))
    if status in UNAUTHORISED:
        return RetryLater(f"HTTP {status}: check MLFLOW_TRACKING_USERNAME/PASSWORD or _TOKEN")
    code, message = f"HTTP {status}", response.text[:300]
    try:
        answer = orjson.loads(response.content)
        code = str(answer.get("error_code") or code)
        message = str(answer.get("message") or answer.get("detail") or message)[:300]
    except (orjson.JSONDecodeError, AttributeError):
        if status >= 500:  # Not MLflow's own words: something in front of it is out of order.
            return RetryLater(code)
    if status >= 500:
        return Poisoned(f"{path}: {code}: {message}")
    if status in (301, 302, 303, 307, 308):
        return RetryLater(f"{code}: the server moved to {response.headers.get('Location')!r}")
    return Refused(code, message)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds the server asked to wait, from either form of the header (RFC 9110, 10.2.3)."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (TypeError, ValueError):
        return None


def _pairs(items: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in items]


def _run_ref(info: Mapping[str, Any]) -> RunRef:
    return RunRef(
        run_id=info["run_id"],
        experiment_id=str(info["experiment_id"]),
        run_name=info.get("run_name", ""),
        artifact_uri=info.get("artifact_uri", ""),
        start_ms=int(info.get("start_time") or 0),
    )
