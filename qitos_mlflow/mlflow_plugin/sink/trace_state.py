"""One trace on its way to MLflow: its run, its totals and tree, and what is waiting to be sent.

Part of the sink's state; turns to JSON and back, so that another process can go on with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.mlflow_plugin.mapping import params_and_tags
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric, RunRef
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_ms
from qitos_mlflow.mlflow_plugin.mapping.run_totals import RunData, RunTotals
from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree, TraceData


@dataclass(frozen=True)
class Elsewhere:
    """Where the first part of a trace is: another server's address, run and number of spans."""

    uri: str
    run_id: str
    spans: int


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
        elsewhere: where part of the trace was delivered, if that is not where the rest goes.
        start_tags: tags of the run as of its start.
        refused: why the server will not have the run; every record of the trace is dead then.
        started: its trace_start record has been seen.
        start_lost: it has a run of its own without one.
        ended: its run is to end, or has.
        cut_off: not the trace itself ended it, but the end of its process.
        status: the run's status in the end.
        end_ms: when it ended.
        recorded: spans that ended in the agent, as its end says.
        dropped: of those, how many were lost before delivery, by reason.
        lost_spans: of those, how many are not on the server although delivery got to them.
        told: the server has an info of its tree.
    """

    trace_id: str
    totals: RunTotals
    tree: SpanTree | None
    name: str = ""
    start_ms: int = 0
    run: RunRef | None = None
    maybe_created: bool = False
    creations: int = 0
    elsewhere: Elsewhere | None = None
    start_tags: list[tuple[str, str]] = field(default_factory=list)
    refused: str | None = None
    started: bool = False
    start_lost: bool = False
    ended: bool = False
    cut_off: bool = False
    status: str | None = None
    end_ms: int = 0
    recorded: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    lost_spans: dict[str, int] = field(default_factory=dict)
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
            self.artifacts.append((record["path"], _file(record["content"])))
            return
        # Where the start was lost, its first record is the next best.
        self.start_ms = self.start_ms or clean_ms(record.get("start_ns") or record.get("time_ns"))
        if record["kind"] == "trace_start":
            self.started = True
            self.name = str(record.get("name") or "")
        elif record["kind"] == "trace_end":
            self.recorded = int(record.get("recorded") or 0)
            self.dropped = dict(record.get("dropped") or {})
            metadata = record.get("metadata")
            self.cut_off = isinstance(metadata, Mapping) and "qitos.closed" in metadata
        self._add(self.totals.fold(record))
        if record["kind"] == "trace_start":
            self.start_tags = list(dict(self.tags).items())  # Servers refuse a key given twice.
        if self.tree is not None:
            self._add_to_tree(self.tree.fold(record))

    def kill(self, last_time_ns: int, reason: str) -> None:
        """End the trace whose end will not come; `reason` says why."""
        self.cut_off = True
        self._add(self.totals.abandoned(last_time_ns, reason))
        if self.tree is not None:
            self._add_to_tree(self.tree.abandoned(last_time_ns, reason))

    def _add_to_tree(self, data: TraceData) -> None:
        self.spans += data.spans
        # What came after its end does not change what is known of the trace.
        known = self.started or self.ended
        self.tree_changed = known and (self.tree_changed or data.changed)

    def _add(self, data: RunData) -> None:
        self.metrics += data.metrics
        self.params += data.params
        for key, value in data.tags:
            # A name among the configured tags: MLflow refuses the run if it is given both ways.
            if key == "mlflow.runName":
                self.name = value or self.name
            else:
                self.tags.append((key, value))
        if data.status is not None:
            self.ended, self.status, self.end_ms = True, data.status, data.end_ms or 0

    def lose_start(self, process: Mapping[str, Any]) -> None:
        """Prepare for a run without its trace's start, should there be none already."""
        tags = params_and_tags.start_tags({"trace_id": self.trace_id, **process}, None)
        tags += [
            ("qitos.start_lost", "true"),
            *params_and_tags.cleaned(self.totals.constant_tags, None),
        ]
        found = dict(tags)
        self.name = found.pop("mlflow.runName", self.name)  # See `_add`.
        self.start_tags = list(found.items())

    def move(self, uri: str) -> None:
        """Forget what the server at `uri` has: what is to come goes to another one."""
        if self.run is not None:
            self.elsewhere = Elsewhere(uri, self.run.run_id, self.totals.spans)
        self.run, self.maybe_created, self.creations, self.told = None, True, 0, False
        self.lost_spans = {}
        self.totals.params = []  # The end of a trace has them all again.
        if self.tree is not None:
            self.tree.move()

    def creation_tags(self) -> list[tuple[str, str]]:
        """Tags that a new run is created with."""
        if self.elsewhere is None:
            return self.start_tags
        return [*self.start_tags, ("qitos.partial", f"begun on {self.elsewhere.uri}")]

    def settle(self) -> None:
        """Take account of where the run is, now that it is known."""
        if self.run is not None and self.elsewhere is not None:
            # Else it is the same server by another name.
            if self.run.run_id != self.elsewhere.run_id:
                self.lost_spans["elsewhere"] = self.elsewhere.spans
            self.elsewhere = None

    def count_refused(self, span: Span) -> None:
        """Count a span that the server refused, but for the root that stands for the trace."""
        if span.parent_span_id or (self.tree is not None and self.tree.root is not None):
            self.lost_spans["refused"] = self.lost_spans.get("refused", 0) + 1

    def corrected_ledger(self) -> list[tuple[str, str]]:
        """The loss ledger once more, if spans are not on the server after all; else nothing."""
        if not self.lost_spans:
            return []
        lost = sum(self.lost_spans.values())
        delivered = max(0, self.totals.spans - lost)
        dropped = {**self.dropped, **self.lost_spans}
        return params_and_tags.ledger_tags(
            max(self.recorded, self.totals.spans), delivered, dropped
        )

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
        plain["elsewhere"] = None if self.elsewhere is None else vars(self.elsewhere)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> TraceState:
        """The state that `to_json` described."""
        run, tree, elsewhere = plain.get("run"), plain.get("tree"), plain.get("elsewhere")
        return cls(
            **{
                **plain,
                "totals": RunTotals.from_json(plain["totals"]),
                "tree": SpanTree.from_json(tree) if tree else None,
                "run": RunRef(**run) if run else None,
                "elsewhere": Elsewhere(**elsewhere) if elsewhere else None,
                "start_tags": [(key, value) for key, value in plain["start_tags"]],
            }
        )


_WAITING = ("metrics", "params", "tags", "spans", "tree_changed", "artifacts", "records")


def _file(content: Any) -> bytes:
    """A text as it is, anything else as JSON."""
    if isinstance(content, str):
        return content.encode()
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)
