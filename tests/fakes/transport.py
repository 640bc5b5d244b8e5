"""MLflow's calls, kept in memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping.entities import (
    NewRun,
    RunData,
    RunRef,
    StoredRun,
)
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused
from qitos_mlflow.redaction.redact import without_credentials


class FakeTransport:
    """A `Transport` without a server. Keeps what it receives, and fails when the test says so.

    `fail` and `fail_after` get the name of a call and what it is about, before and after it takes
    effect; the call raises what they return.
    """

    patience = 1.0

    def __init__(self, host: str = "fake.test") -> None:
        self.host = host
        self.uri = f"http://user:password@{host}"
        self.cost: float | None = None
        self.numbers = count()
        self.calls: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.users_runs: dict[str, StoredRun] = {}
        self.experiments = {"7", "8"}
        self.spans: dict[str, Any] = {}
        self.traces: dict[str, dict[str, Any]] = {}
        self.attachments = True
        self.prompts: set[tuple[str, str, str]] = set()
        self.assessments: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, bytes] = {}
        self.links: set[tuple[str, str]] = set()
        self.fail: Callable[[str, Any], Exception | None] = lambda call, what: None
        self.fail_after: Callable[[str, Any], Exception | None] = lambda call, what: None

    @property
    def address(self) -> str:
        return without_credentials(self.uri)

    def _answer(self, call: str, what: Any, answer: Callable[[], Any]) -> Any:
        self.calls.append(call)
        if failure := self.fail(call, what):
            raise failure
        result = answer()
        if failure := self.fail_after(call, what):
            raise failure
        return result

    def _run(self, run_id: str) -> dict[str, Any]:
        if run_id not in self.runs:
            raise Refused("RESOURCE_DOES_NOT_EXIST", run_id)
        return self.runs[run_id]

    def experiment_id(self, name: str, timeout_s: float) -> str:
        return self._answer("experiment_id", name, lambda: "8" if name == "another" else "7")

    def has_experiment(self, experiment_id: str, timeout_s: float) -> bool:
        return self._answer(
            "has_experiment", experiment_id, lambda: experiment_id in self.experiments
        )

    def create_run(self, run: NewRun, timeout_s: float) -> RunRef:
        prefix = "run-" if self.host == "fake.test" else f"{self.host}-"

        def create() -> RunRef:
            run_id = f"{prefix}{next(self.numbers)}"
            self.runs[run_id] = {
                "name": run.name,
                "tags": dict(run.tags),
                "metrics": Counter(),
                "params": {},
                "status": "RUNNING",
                "experiment_id": run.experiment_id,
                "start_ms": run.start_ms,
            }
            return RunRef(run_id, run.experiment_id, run.name, "mlflow-artifacts:/7", run.start_ms)

        return self._answer("create_run", dict(run.tags), create)

    def find_runs(self, experiment_id: str, trace_id: str, timeout_s: float) -> list[RunRef]:
        def find() -> list[RunRef]:
            return [
                RunRef(run_id, experiment_id, run["name"], "", 0)
                for run_id, run in self.runs.items()
                if run["tags"].get("qitos.trace_id") == trace_id
            ]

        return self._answer("find_runs", trace_id, find)

    def stored_run(self, run_id: str, timeout_s: float) -> StoredRun | None:
        def find() -> StoredRun | None:
            if run_id in self.users_runs:
                return self.users_runs[run_id]
            return self._stored(run_id, self.runs[run_id]) if run_id in self.runs else None

        return self._answer("stored_run", run_id, find)

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        wanted: str,
        timeout_s: float,
        *,
        order: str = "ASC",
        most: int = 10,
        token: str = "",
    ) -> tuple[list[StoredRun], str]:
        tag, text = re.fullmatch("tags.`(.+)` = '(.+)'", wanted).groups()  # type: ignore[union-attr]

        def search() -> tuple[list[StoredRun], str]:
            found = [
                self._stored(run_id, run)
                for run_id, run in self.runs.items()
                if run["tags"].get(tag) == text and run["experiment_id"] in experiment_ids
            ]
            found.sort(key=lambda run: run.ref.start_ms, reverse=order == "DESC")
            begin = int(token or 0)
            rest = str(begin + most) if len(found) > begin + most else ""
            return found[begin : begin + most], rest

        return self._answer("search_runs", wanted, search)

    @staticmethod
    def _stored(run_id: str, run: dict[str, Any]) -> StoredRun:
        newest = sorted(run["metrics"], key=lambda point: (point.step, point.timestamp_ms))
        return StoredRun(
            RunRef(
                run_id, run["experiment_id"], run["name"], "mlflow-artifacts:/7", run["start_ms"]
            ),
            run["status"],
            run.get("end_ms"),
            {point.key: point.value for point in newest},
            run["tags"],
            {point.key: point.timestamp_ms for point in newest},
        )

    def log_dataset(self, run_id: str, dataset: Mapping[str, str], timeout_s: float) -> None:
        self._answer("log_dataset", dataset, lambda: self._run(run_id).update(dataset=dataset))

    def link_traces(self, run_id: str, trace_ids: Sequence[str], timeout_s: float) -> None:
        links = {(trace_id, run_id) for trace_id in trace_ids}
        self._answer("link_traces", trace_ids, lambda: self.links.update(links))

    def delete_run(self, run_id: str, timeout_s: float) -> None:
        self._answer("delete_run", run_id, lambda: self.runs.pop(run_id))

    def log_batch(self, run_id: str, data: RunData, timeout_s: float) -> None:
        def log() -> None:
            run = self._run(run_id)
            for key, value in data.params:
                if run["params"].get(key, value) != value:
                    raise Refused("INVALID_PARAMETER_VALUE", f"param {key} changes")
            # The same point again is the same row.
            run["metrics"].update({point: 1 for point in data.metrics if not run["metrics"][point]})
            run["params"].update(data.params)
            run["tags"].update(data.tags)

        self._answer("log_batch", [*data.metrics, *data.params, *data.tags], log)

    def end_run(self, run_id: str, status: str, end_ms: int, timeout_s: float) -> None:
        self._answer(
            "end_run", status, lambda: self._run(run_id).update(status=status, end_ms=end_ms)
        )

    def write_trace(self, info: dict[str, Any], timeout_s: float) -> None:
        def write() -> None:
            self.traces[info["trace_id"]] = info
            for one in info.get("assessments") or ():
                self.assessments[one["assessment_id"]] = one

        self._answer("write_trace", info, write)

    def trace_info(self, trace_id: str, timeout_s: float) -> Any:
        def find() -> Any:
            info = self.traces.get(trace_id)
            there = [one for one in self.assessments.values() if one["trace_id"] == trace_id]
            return None if info is None else {**info, "assessments": there}

        return self._answer("trace_info", trace_id, find)

    def create_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        def create() -> None:
            if assessment["assessment_id"] in self.assessments:
                raise Poisoned("INTERNAL_ERROR: a constraint violation")
            self.assessments[assessment["assessment_id"]] = assessment

        self._answer("create_assessment", assessment, create)

    def update_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        own = assessment["assessment_id"]
        self._answer(
            "update_assessment",
            assessment,
            lambda: self.assessments.update({own: {**self.assessments[own], **assessment}}),
        )

    def has_attachments(self, timeout_s: float) -> bool:
        return self._answer("has_attachments", None, lambda: self.attachments)

    def artifacts_of_trace(self, trace_id: str, timeout_s: float) -> str:
        return self._answer("artifacts_of_trace", trace_id, lambda: f"mlflow-artifacts:/{trace_id}")

    def link_prompts(self, trace_id: str, prompts: Sequence[Any], timeout_s: float) -> None:
        def link() -> None:
            for prompt in prompts:
                self.prompts.add((trace_id, prompt.name, prompt.version))

        self._answer("link_prompts", prompts, link)

    def write_spans(self, experiment_id: str, spans: Sequence[Any], timeout_s: float) -> None:
        found = {span.span_id.hex(): span for span in spans}
        self._answer("write_spans", [span.name for span in spans], lambda: self.spans.update(found))

    def sum_spans(self, *question: Any) -> float | None:
        return self._answer("sum_spans", question, lambda: self.cost)

    def write_artifact(self, run: RunRef, path: str, data: bytes, timeout_s: float) -> None:
        self._answer("write_artifact", path, lambda: self.artifacts.update({path: data}))

    def close(self) -> None:
        self.calls.append("close")

    def values(self, run_id: str = "run-0") -> dict[str, list[float]]:
        """The points of each metric of a run."""
        found: dict[str, list[float]] = {}
        for point in self.runs[run_id]["metrics"]:
            found.setdefault(point.key, []).append(point.value)
        return found
