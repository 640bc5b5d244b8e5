"""One trace on its way to MLflow: its facts, numbers and tree, its run, and what waits to be sent.

Part of the sink's state; turns to JSON and back, so that another process can go on with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.mlflow_plugin.mapping.entities import Metric, RunData, RunRef
from qitos_mlflow.mlflow_plugin.mapping.run_totals import RunTotals
from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts
from qitos_mlflow.recording.record import Record


@dataclass
class Elsewhere:
    """Where the first part of a trace is: another server's address, run and number of spans."""

    uri: str
    run_id: str
    spans: int


@dataclass
class Waiting:
    """What is to be sent of a trace, and the records that it comes from."""

    metrics: list[Metric] = field(default_factory=list)
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    artifacts: list[tuple[str, bytes]] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)


@dataclass
class TraceState:
    """What the sink knows of one trace.

    Attributes:
        facts: what its records say of it as a whole.
        totals: its numbers.
        tree: its MLflow trace; None if no traces are logged.
        run: its MLflow run, once created.
        maybe_created: an attempt to create the run was made whose outcome is not known, here or
            in another process: look for it first.
        creations: how often creating it was tried. An attempt before the last may still come
            through if a database is locked for longer than a request lasts.
        elsewhere: where part of the trace was delivered, if the rest goes to another server.
        refused: why the server refuses the run; every record of the trace is a dead letter then.
        start_lost: it has a run of its own without a trace_start record.
        lost_spans: how many spans are not on the server although delivery got to them, by reason.
        has_info: the server has an info of its tree.
        waiting: what is to be sent; no part of the JSON.
    """

    facts: TraceFacts
    totals: RunTotals
    tree: SpanTree | None
    run: RunRef | None = None
    maybe_created: bool = False
    creations: int = 0
    elsewhere: Elsewhere | None = None
    refused: str | None = None
    start_lost: bool = False
    lost_spans: dict[str, int] = field(default_factory=dict)
    has_info: bool = False
    waiting: Waiting = field(default_factory=Waiting)

    @classmethod
    def begin(
        cls, trace_id: str, settings: dict[str, Any], *, tree: bool, late: bool, resumed: bool
    ) -> TraceState:
        """The state before the first record.

        Args:
            trace_id: QitOS's id.
            settings: those of the run, unless the trace's start brings its own.
            tree: whether the server stores traces.
            late: the first record is not the trace's start. It may have come after the trace's
                end, so its run is looked up. If the start was lost there is no run; one is made
                once the trace's end is known.
            resumed: another process may have created the run.
        """
        facts = TraceFacts(trace_id, settings)
        if late:
            facts.lose_start()
        made = SpanTree.after_end(facts) if late else SpanTree(facts)
        totals = RunTotals(facts)
        return cls(facts, totals, made if tree else None, maybe_created=resumed or late)

    # -- records -----------------------------------------------------------------------------

    def take(self, record: Record, data: bytes) -> None:
        """Fold in the next record; what it adds waits to be sent."""
        self.waiting.records.append(data)
        if record["kind"] == "artifact":
            self.waiting.artifacts.append((record["path"], _file(record["content"])))
            return
        self.waiting.tags += self.facts.fold(record)
        if not self.facts.log_traces:
            self.tree = None
        if self.tree is not None:
            self.waiting.spans += self.tree.fold(record)
        self._add(self.totals.fold(record))

    def kill(self, last_time_ns: int, reason: str) -> None:
        """End the trace whose end will not come; `reason` says why."""
        self.waiting.tags += self.facts.kill(last_time_ns, reason)
        if self.tree is not None:
            self.waiting.spans += self.tree.killed(reason)
        self._add(self.totals.killed())

    def _add(self, run: RunData) -> None:
        self.waiting.metrics += run.metrics
        self.waiting.params += run.params
        self.waiting.tags += run.tags

    def sent(self) -> None:
        """Forget what was waiting: it is part of a batch now."""
        self.waiting = Waiting()

    # -- the run -----------------------------------------------------------------------------

    def move(self, uri: str) -> None:
        """Forget what the server at `uri` has: the rest goes to another one."""
        if self.run is not None:
            self.elsewhere = Elsewhere(uri, self.run.run_id, self.totals.spans)
        self.run, self.maybe_created, self.creations, self.has_info = None, True, 0, False
        self.lost_spans = {}
        self.totals.params = []  # The end of a trace has them all again.
        if self.tree is not None:
            self.tree.move()

    def creation_tags(self) -> list[tuple[str, str]]:
        """Tags that a new run is created with."""
        tags = [("mlflow.source.type", "LOCAL"), *self.facts.start_tags.items()]
        if self.elsewhere is not None:
            tags.append(("qitos.partial", f"begun on {self.elsewhere.uri}"))
        return tags

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

    # -- as JSON -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values; what is waiting is not part of it."""
        parts = {
            "facts": self.facts.to_json(),
            "totals": self.totals.to_json(),
            "tree": None if self.tree is None else self.tree.to_json(),
            "run": None if self.run is None else self.run.to_json(),
            "elsewhere": None if self.elsewhere is None else vars(self.elsewhere),
        }
        return {**_without(vars(self), {"waiting"}), **parts}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TraceState:
        """The state that `to_json` described. The parts of `plain` become parts of it."""
        run, tree, elsewhere = plain["run"], plain["tree"], plain["elsewhere"]
        facts = TraceFacts.from_json(plain["facts"])
        parts = {
            "facts": facts,
            "totals": RunTotals.from_json(plain["totals"], facts),
            "tree": SpanTree(facts, **tree) if tree else None,
            "run": RunRef(**run) if run else None,
            "elsewhere": Elsewhere(**elsewhere) if elsewhere else None,
        }
        return cls(**{**plain, **parts})


def of_first_version(plain: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A trace's state as version 0.1.0 wrote it (no `version` beside it), in today's form.

    That version kept a state only of traces that had started and had not ended.

    Args:
        plain: the state.
        settings: the header's, which were those of each trace.
    """
    state, totals, tree = dict(plain), dict(plain["totals"]), plain["tree"]
    facts = {
        "trace_id": state.pop("trace_id"),
        "settings": dict(settings),
        "name": state.pop("name"),
        "started": state.pop("started"),
        "start_ns": totals.pop("start_ns"),
        "last_ns": totals.pop("last_ns"),
        "start_tags": dict(state.pop("start_tags")),
        "later_tags": {},
        "lost": totals.pop("lost"),
    }
    if tree is not None:
        tree = dict(tree)
        tags = {**tree.pop("tags"), **facts["start_tags"]}
        later = [key for key in tags if not key.startswith("mlflow.")]
        facts["later_tags"] = {key: tags[key] for key in later if key not in facts["start_tags"]}
        start_ns, tree["root_name"] = tree.pop("start_ns"), tree.pop("name")
        tree["root_start_ns"] = None if start_ns == facts["start_ns"] else start_ns
        tree["info_ns"] = tree.pop("told_ns")
        tree["assessment_bytes"] = sum(len(orjson.dumps(one)) for one in tree["assessments"])
    gone = {"start_ms", "ended", "cut_off", "status", "end_ms", "recorded", "dropped", "told"}
    parts = {
        "facts": facts,
        "totals": _without(totals, {"constant_tags", "constant_params"}),
        "tree": tree and _without(tree, _GONE_OF_TREE),
        "has_info": state["told"],
    }
    return {**_without(state, gone), **parts}


_GONE_OF_TREE = {"id", "constant_tags", "last_ns", "ended_ns", "status", "error", "exception"}
"""What version 0.1.0 kept of a tree, and is in the facts or nowhere now."""


def _without(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _file(content: Any) -> bytes:
    """A text as it is, anything else as JSON."""
    if isinstance(content, str):
        return content.encode()
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)
