"""MLflow over http(s): its documented REST and OTLP endpoints, without mlflow in the process.

`import mlflow` costs 1 to 2 s of CPU and some 130 MiB, and stalls the agent's threads for up to
87 ms (docs/transport.md); this module costs a tenth. What only mlflow can do for a request (SigV4,
auth plugins, request header plugins), `access` asks of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow import _json
from qitos_mlflow.delivery.sink import progressed
from qitos_mlflow.mlflow_plugin.mapping.entities import (
    NewRun,
    PromptRef,
    RunData,
    RunRef,
    is_inside,
)
from qitos_mlflow.mlflow_plugin.server import answers
from qitos_mlflow.mlflow_plugin.server.artifacts import SERVED, write_elsewhere
from qitos_mlflow.mlflow_plugin.server.http import Request, Requester, SessionRequester, patience
from qitos_mlflow.mlflow_plugin.server.transport import (
    ARTIFACTS_TAG,
    NotThere,
    Refused,
    Transport,
)
from qitos_mlflow.mlflow_plugin.server.verdict import (
    PROTOBUF,
    SPANS,
    answer_to,
    json_object,
    verdict,
)

CHANGES = ("feedback", "expectation", "rationale", "metadata")
"""Parts of an assessment that can change."""


class RestTransport(Transport):
    """`Transport` over http(s). Used by one thread.

    Args:
        uri: of the server.
        requester: sends the requests; None: one for `uri`.
        trusted: this process's credentials are configured for the server.
        files: files may go where the server says, which may be somewhere else.
    """

    def __init__(
        self,
        uri: str,
        requester: Requester | None = None,
        *,
        trusted: bool = True,
        files: bool = True,
    ) -> None:
        super().__init__(uri.rstrip("/"))
        self._trusted, self._files = trusted, files
        self._requester = requester or SessionRequester(uri)
        self.patience = patience()

    def _experiment(self, name: str, timeout_s: float) -> Mapping[str, Any] | None:
        path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=" + quote(name, safe="")
        try:
            return self._get(path, timeout_s, "experiment")
        except Refused as refusal:
            if refusal.code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _create_experiment(self, name: str, timeout_s: float) -> str:
        path, field = "/api/2.0/mlflow/experiments/create", "experiment_id"
        return answers.identifier(self._post(path, {"name": name}, timeout_s, field), field)

    def _experiment_with_id(self, experiment_id: str, timeout_s: float) -> Mapping[str, Any]:
        path = "/api/2.0/mlflow/experiments/get?experiment_id=" + quote(experiment_id, safe="")
        return self._get(path, timeout_s, "experiment")

    def _run(self, run_id: str, timeout_s: float) -> Mapping[str, Any]:
        path = "/api/2.0/mlflow/runs/get?run_id=" + quote(run_id, safe="")
        return self._get(path, timeout_s, "run")

    def create_run(self, run: NewRun, timeout_s: float) -> RunRef:
        body = {
            "experiment_id": run.experiment_id,
            "start_time": run.start_ms,
            "run_name": run.name,
            "tags": _pairs(run.tags),
        }
        answer = self._post("/api/2.0/mlflow/runs/create", body, timeout_s, "run")
        return answers.created_run(answers.thing(answer, "run"), run)

    def _search_runs(
        self, wanted: str, page: Mapping[str, Any], timeout_s: float
    ) -> Mapping[str, Any]:
        body = {"filter": wanted, **page}
        return self._post("/api/2.0/mlflow/runs/search", body, timeout_s, "runs")

    def delete_run(self, run_id: str, timeout_s: float) -> None:
        self._post("/api/2.0/mlflow/runs/delete", {"run_id": run_id}, timeout_s)

    def log_batch(self, run_id: str, data: RunData, timeout_s: float) -> None:
        metrics = [
            {"key": m.key, "value": m.value, "timestamp": m.timestamp_ms, "step": m.step}
            for m in data.metrics
        ]
        pairs = {"params": _pairs(data.params), "tags": _pairs(data.tags)}
        body = {"run_id": run_id, "metrics": metrics, **pairs}
        self._post("/api/2.0/mlflow/runs/log-batch", body, timeout_s)

    def end_run(self, run_id: str, status: str, end_ms: int, timeout_s: float) -> None:
        body = {"run_id": run_id, "status": status, "end_time": end_ms}
        answer = self._post("/api/2.0/mlflow/runs/update", body, timeout_s, "run_info")
        answers.identifier(answers.thing(answer, "run_info"), "run_id", run_id)

    def log_dataset(self, run_id: str, dataset: Mapping[str, str], timeout_s: float) -> None:
        context = {"key": "mlflow.data.context", "value": "eval"}
        body = {"run_id": run_id, "datasets": [{"dataset": dict(dataset), "tags": [context]}]}
        self._post("/api/2.0/mlflow/runs/log-inputs", body, timeout_s)

    def link_traces(self, run_id: str, trace_ids: Sequence[str], timeout_s: float) -> None:
        body = {"run_id": run_id, "trace_ids": list(trace_ids)}
        self._post("/api/2.0/mlflow/traces/link-to-run", body, timeout_s)

    def write_trace(self, info: dict[str, Any], timeout_s: float) -> None:
        body = {"trace": {"trace_info": info}}
        answers.thing(self._post("/api/3.0/mlflow/traces", body, timeout_s, "trace"), "trace")

    def _trace_info(self, trace_id: str, timeout_s: float) -> Mapping[str, Any]:
        path = "/api/3.0/mlflow/traces/" + quote(trace_id, safe="")
        return answers.thing(self._get(path, timeout_s, "trace"), "trace_info")

    def create_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        path = f"/api/3.0/mlflow/traces/{quote(assessment['trace_id'], safe='')}/assessments"
        answer = self._post(path, {"assessment": assessment}, timeout_s, "assessment")
        answers.thing(answer, "assessment")

    def update_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        trace, own = (quote(assessment[key], safe="") for key in ("trace_id", "assessment_id"))
        parts = [part for part in CHANGES if part in assessment]
        body = _json.dumps({"assessment": assessment, "update_mask": ",".join(parts)})
        path = f"/api/3.0/mlflow/traces/{trace}/assessments/{own}"
        answer = self._json(Request("PATCH", path, timeout_s, body, answer="assessment"))
        answers.thing(answer, "assessment")

    def write_spans(self, experiment_id: str, spans: Sequence[Span], timeout_s: float) -> None:
        headers = {"Content-Type": PROTOBUF, "x-mlflow-experiment-id": experiment_id}
        body = _export_request(spans)
        # Servers before 3.8 answer in JSON.
        self._send(Request("POST", SPANS, timeout_s, body, headers, "partialSuccess"))

    def link_prompts(self, trace_id: str, prompts: Sequence[PromptRef], timeout_s: float) -> None:
        versions = [{"name": prompt.name, "version": prompt.version} for prompt in prompts]
        body = {"trace_id": trace_id, "prompt_versions": versions}
        self._post("/api/2.0/mlflow/traces/link-prompts", body, timeout_s)

    def sum_spans(self, question: Mapping[str, Any], timeout_s: float) -> float | None:
        body = {**question, "view_type": "SPANS", "aggregations": [{"aggregation_type": "SUM"}]}
        path, field = "/api/3.0/mlflow/traces/metrics", "data_points"
        return answers.total(answers.objects(self._post(path, body, timeout_s, field), field))

    def write_artifact(self, run: RunRef, path: str, data: bytes, timeout_s: float) -> None:
        parts = urlsplit(run.artifact_uri)
        name = f"{parts.path.strip('/')}/{path}"
        if parts.scheme != "mlflow-artifacts" or parts.netloc or not is_inside(name):
            allowed = {"trusted": self._trusted, "files": self._files}
            write_elsewhere(run.artifact_uri, path, data, self.uri, timeout_s, **allowed)
            return
        where = f"{SERVED}/{quote(name)}"
        headers = {"Content-Type": "application/octet-stream"}
        self._send(Request("PUT", where, timeout_s, data, headers))

    def has_attachments(self, timeout_s: float) -> bool:
        request = Request("GET", "/version", timeout_s)
        response = answer_to(request, self._requester, self.address)
        version = re.fullmatch(rb"(\d{1,4})\.(\d{1,4})\.\d[\w.+-]{,40}\s*", response.content)
        if response.status_code != 200 or version is None:
            return True  # A router keeps it to itself; servers of today have attachments.
        return tuple(map(int, version.groups())) >= (3, 12)

    def artifacts_of_trace(self, trace_id: str, timeout_s: float) -> str:
        info = answers.trace_info(self._trace_info(trace_id, timeout_s), trace_id)
        tags = answers.thing(info, "tags")
        answers.part(tags, ARTIFACTS_TAG)
        return answers.text(tags, ARTIFACTS_TAG)

    def close(self) -> None:
        if isinstance(self._requester, SessionRequester):
            self._requester.close()

    def _get(self, path: str, timeout_s: float, answer: str) -> Mapping[str, Any]:
        return answers.thing(self._json(Request("GET", path, timeout_s, answer=answer)), answer)

    def _post(
        self, path: str, body: dict[str, Any], timeout_s: float, answer: str = ""
    ) -> dict[str, Any]:
        return self._json(Request("POST", path, timeout_s, _json.dumps(body), answer=answer))

    def _json(self, request: Request) -> dict[str, Any]:
        """Send `request` as `_send` does; returns the JSON object that is answered."""
        answer = json_object(self._send(request))
        if answer is None:
            raise answers.NotMlflows("it has nothing in it")
        return answer

    def _send(self, request: Request) -> bytes:
        """Send `request`; returns the answer of a server that has carried it out."""
        for _ in range(2):
            response = answer_to(request, self._requester, self.address)
            failure = verdict(request, response, self.address)
            if not isinstance(failure, NotThere):
                break
            # Perhaps one of several routers: it has carried nothing out, another one may.
        if failure is not None:
            raise failure
        progressed()
        return response.content


def _pairs(items: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in items]


def _export_request(spans: Sequence[Span]) -> bytes:
    """The body of a request that exports `spans`: an `ExportTraceServiceRequest`.

    Written by hand, because a message takes in others by copying all that is in them. Field 1 of
    the request holds `ResourceSpans`, whose field 2 holds `ScopeSpans`, whose field 2 holds spans.
    """
    parts: list[bytes] = []
    for span in spans:
        content = span.SerializeToString()
        parts += (_key(2, len(content)), content)
    scope = sum(map(len, parts))
    resource = _key(2, scope)
    return b"".join([_key(1, len(resource) + scope), resource, *parts])


def _key(number: int, size: int) -> bytes:
    """What stands before `size` bytes of a field in protobuf's wire format."""
    key = bytearray([number << 3 | 2])
    while size > 0x7F:
        key.append(size & 0x7F | 0x80)
        size >>= 7
    key.append(size)
    return bytes(key)
