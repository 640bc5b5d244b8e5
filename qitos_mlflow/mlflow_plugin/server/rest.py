"""MLflow over http(s): its documented REST and OTLP endpoints, without mlflow in the process.

`import mlflow` costs 1 to 2 s of CPU and some 130 MiB, and stalls the agent's threads for up to
87 ms (docs/transport.md); this module costs a tenth. Authentication, TLS and workspace follow
MLflow's environment variables. What only mlflow can do (SigV4, auth plugins, request header
plugins) goes through mlflow's own `http_request`, which `mlflow_client.mlflow_requester` provides
behind the same `Requester` call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import orjson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from qitos_mlflow.delivery import RetryLater, importing
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.server.http import Exchange, Request, Requester
from qitos_mlflow.mlflow_plugin.server.transport import (
    MAX_FOUND,
    TRACE_TAG,
    Refused,
    deleted_experiment,
    equals,
)
from qitos_mlflow.redaction.redact import without_credentials

if TYPE_CHECKING:
    from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunData, SpanSum


def needs_mlflow() -> bool:
    """Whether http destinations need mlflow's own client, by its settings or its plugins."""
    for name in ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"):
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            return True
    from importlib_metadata import entry_points

    providers = entry_points(group="mlflow.request_header_provider")
    return any(not provider.value.startswith("mlflow.") for provider in providers)


class RestTransport:
    """`Transport` over http(s). Used by one thread."""

    def __init__(self, uri: str, requester: Requester | None = None) -> None:
        self.uri = uri.rstrip("/")
        self.address = without_credentials(self.uri)
        self._exchange = Exchange(uri, requester)

    def experiment_id(self, name: str, timeout_s: float) -> str:
        """The experiment called `name`, created when missing."""
        path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=" + quote(name, safe="")
        try:
            found = _part(self._exchange.json(Request("GET", path, timeout_s)), "experiment")
            experiment_id = str(_part(found, "experiment_id"))
        except Refused as refusal:
            if refusal.code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if found.get("lifecycle_stage") == "deleted":
                raise deleted_experiment(name, experiment_id)
            return experiment_id
        try:
            made = self._post("/api/2.0/mlflow/experiments/create", {"name": name}, timeout_s)
        except Refused as refusal:
            if refusal.code == "RESOURCE_ALREADY_EXISTS":  # Another process was faster.
                return self.experiment_id(name, timeout_s)
            raise
        return str(_part(made, "experiment_id"))

    def create_run(self, run: NewRun, timeout_s: float) -> RunRef:
        """Create a run."""
        body = {
            "experiment_id": run.experiment_id,
            "start_time": run.start_ms,
            "run_name": run.name,
            "tags": _pairs(run.tags),
        }
        answer = self._post("/api/2.0/mlflow/runs/create", body, timeout_s)
        return _run_ref(_part(answer, "run"))

    def find_runs(self, experiment_id: str, trace_id: str, timeout_s: float) -> list[RunRef]:
        """The runs tagged ``qitos.trace_id`` = `trace_id`, the oldest first, a handful at most."""
        tagged = equals(TRACE_TAG, trace_id)
        if tagged is None:
            return []
        body = {
            "experiment_ids": [experiment_id],
            "filter": tagged,
            "order_by": ["attributes.start_time ASC"],
            "max_results": MAX_FOUND,
        }
        answer = self._post("/api/2.0/mlflow/runs/search", body, timeout_s)
        return [_run_ref(run) for run in answer.get("runs") or []]

    def delete_run(self, run_id: str, timeout_s: float) -> None:
        """Mark a run as deleted, as MLflow's pages do."""
        self._post("/api/2.0/mlflow/runs/delete", {"run_id": run_id}, timeout_s)

    def log_batch(self, run_id: str, data: RunData, timeout_s: float) -> None:
        """Log metrics, params and tags in one call."""
        metrics = [
            {"key": m.key, "value": m.value, "timestamp": m.timestamp_ms, "step": m.step}
            for m in data.metrics
        ]
        pairs = {"params": _pairs(data.params), "tags": _pairs(data.tags)}
        body = {"run_id": run_id, "metrics": metrics, **pairs}
        self._post("/api/2.0/mlflow/runs/log-batch", body, timeout_s)

    def end_run(self, run_id: str, status: str, end_ms: int, timeout_s: float) -> None:
        """Set the run's status and end time."""
        body = {"run_id": run_id, "status": status, "end_time": end_ms}
        self._post("/api/2.0/mlflow/runs/update", body, timeout_s)

    def write_trace(self, info: dict[str, Any], timeout_s: float) -> None:
        """Create or replace a trace."""
        self._post("/api/3.0/mlflow/traces", {"trace": {"trace_info": info}}, timeout_s)

    def write_spans(self, experiment_id: str, spans: Sequence[Span], timeout_s: float) -> None:
        """Create or replace spans, in OpenTelemetry's own protocol."""
        message = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])]
        )
        headers = {
            "Content-Type": "application/x-protobuf",
            "x-mlflow-experiment-id": experiment_id,
        }
        body = message.SerializeToString()
        self._exchange.send(Request("POST", "/v1/traces", timeout_s, body, headers))

    def sum_spans(self, question: SpanSum, timeout_s: float) -> float | None:
        """The sum that `question` asks for; None if none of the spans has the metric."""
        body = {
            "experiment_ids": [question.experiment_id],
            "view_type": "SPANS",
            "metric_name": question.metric,
            "aggregations": [{"aggregation_type": "SUM"}],
            "filters": list(question.filters),
            "start_time_ms": question.times_ms[0],
            "end_time_ms": question.times_ms[1],
        }
        points = self._post("/api/3.0/mlflow/traces/metrics", body, timeout_s).get("data_points")
        return float(points[0]["values"]["SUM"]) if points else None

    def write_artifact(self, run: RunRef, path: str, data: bytes, timeout_s: float) -> None:
        """Create or replace an artifact, through the server if it serves artifacts."""
        parts = urlsplit(run.artifact_uri)
        if parts.scheme != "mlflow-artifacts":
            with importing():  # mlflow.
                from qitos_mlflow.mlflow_plugin.server.mlflow_client import write_artifact

            write_artifact(run.artifact_uri, path, data, self.uri)
            return
        where = "/api/2.0/mlflow-artifacts/artifacts/" + quote(f"{parts.path.strip('/')}/{path}")
        headers = {"Content-Type": "application/octet-stream"}
        self._exchange.send(Request("PUT", where, timeout_s, data, headers))

    def close(self) -> None:
        """Give up connections."""
        self._exchange.close()

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return self._exchange.json(Request("POST", path, timeout_s, orjson.dumps(body)))


def _part(answer: Any, key: str) -> Any:
    """A part that every answer of MLflow has; an answer without it is not MLflow's."""
    if not isinstance(answer, dict) or key not in answer:
        raise RetryLater(f"an answer without {key!r}, which is not MLflow's")
    return answer[key]


def _pairs(items: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in items]


def _run_ref(run: Any) -> RunRef:
    info = _part(run, "info")
    return RunRef(
        run_id=_part(info, "run_id"),
        experiment_id=str(_part(info, "experiment_id")),
        run_name=info.get("run_name", ""),
        artifact_uri=info.get("artifact_uri", ""),
        start_ms=int(info.get("start_time") or 0),
    )
