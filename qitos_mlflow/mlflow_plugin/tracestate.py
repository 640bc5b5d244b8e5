"""One trace on its way to MLflow: its run, its totals and tree, and what is waiting to be sent.

Part of the sink's state; turns to JSON and back, so that another process can go on with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.mlflow_plugin.labels import ledger_tags
from qitos_mlflow.mlflow_plugin.metrics import Metric, RunData, RunState
from qitos_mlflow.mlflow_plugin.spans import TraceData, TraceFold
from qitos_mlflow.mlflow_plugin.transport import RunRef


@dataclass
class TraceState:
    """What the sink knows of one trace.

    Attributes:
        trace_id: QitOS's id.
        totals: the run's fold over its records.
        tree: the MLflow trace's fold over its records; None when no traces are logged.
        name: the trace's name, or the one that its tags give.
        start_ms: when it started, milliseconds since the epoch.
        run: its MLflow run, once created.
        maybe_created: an attempt to create the run was made whose outcome is not known, here or
            in another process: look for it first.
        creations: how often creating it was tried. Beyond the first, an earlier attempt may still
            come through, where a database is locked for longer than a request lasts.
        refused: why the server will not have the run; every record of the trace is dead then.
        started: its trace_start record has been seen.
        ended: its run is to end, or has.
        status: the run's status in the end.
        end_ms: when it ended.
        recorded: spans that ended in the agent, as its end says.
        dropped: of those, how many were lost before delivery, by reason.
        refused_spans: of those, how many the server refused for good.
        told: the server has an info of its tree.
    """

    trace_id: str
    totals: RunState
    tree: TraceFold | None
    name: str = ""
    start_ms: int = 0
    run: RunRef | None = None
    maybe_created: bool = False
    creations: int = 0
    refused: str | None = None
    started: bool = False
    ended: bool = False
    status: str | None = None
    end_ms: int = 0
    recorded: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    refused_spans: int = 0
    told: bool = False
    metrics: list[Metric] = field(default_factory=list)
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    tree_changed: bool = False
    artifacts: list[tuple[str, bytes]] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)

    def take(self, record: dict[str, Any], data: bytes) -> None:
        """Fold in the next record; what it adds waits in the lists."""
        self.records.append(data)
        if record["kind"] == "artifact":
            self.artifacts.append((record["path"], str(record["content"]).encode()))
            return
        if record["kind"] == "trace_start":
            self.started = True
            self.name = str(record.get("name") or "")
            self.start_ms = int(record.get("time_ns") or 0) // 1_000_000
        elif record["kind"] == "trace_end":
            self.recorded = int(record.get("recorded") or 0)
            self.dropped = dict(record.get("dropped") or {})
        self._add(self.totals.fold(record))
        if self.tree is not None:
            self._add_to_tree(self.tree.fold(record))

    def kill(self, last_time_ns: int, reason: str) -> None:
        """End the trace whose end will not come; `reason` says why."""
        self._add(self.totals.abandoned(last_time_ns, reason))
        if self.tree is not None:
            self._add_to_tree(self.tree.abandoned(last_time_ns, reason))

    def _add_to_tree(self, data: TraceData) -> None:
        self.spans += data.spans
        # What came after its end does not change what is known of the trace.
        self.tree_changed = self.started and (self.tree_changed or data.changed)

    def _add(self, data: RunData) -> None:
        self.metrics += data.metrics
        self.params += data.params
        for key, value in data.tags:
            # A name that was given as MLflow's tag. Refused beside another one when the run is
            # created; of a run that there is it is a new name.
            if key == "mlflow.runName" and self.run is None:
                self.name = value or self.name
            else:
                self.tags.append((key, value))
        if data.status is not None:
            self.ended, self.status, self.end_ms = True, data.status, data.end_ms or 0

    def refused_ledger(self) -> list[tuple[str, str]]:
        """The loss ledger once more, if the server refused spans; else nothing."""
        if not self.refused_spans:
            return []
        delivered = max(0, self.totals.spans - self.refused_spans)
        dropped = {**self.dropped, "refused": self.refused_spans}
        return ledger_tags(max(self.recorded, self.totals.spans), delivered, dropped)

    def sent(self) -> None:
        """Forget what was waiting: it is part of a shipment now."""
        self.metrics, self.params, self.tags, self.records = [], [], [], []
        self.spans, self.tree_changed, self.artifacts = [], False, []

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values; what is waiting is not part of it."""
        plain = dict(vars(self))
        for waiting in _WAITING:
            del plain[waiting]
        plain["tree"] = None if self.tree is None else self.tree.to_json()
        plain["totals"] = self.totals.to_json()
        plain["run"] = None if self.run is None else self.run.to_json()
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> TraceState:
        """The state that `to_json` described."""
        run, tree = plain.get("run"), plain.get("tree")
        return cls(
            **{
                **plain,
                "totals": RunState.from_json(plain["totals"]),
                "tree": TraceFold.from_json(tree) if tree else None,
                "run": RunRef(**run) if run else None,
            }
        )


_WAITING = ("metrics", "params", "tags", "spans", "tree_changed", "artifacts", "records")
