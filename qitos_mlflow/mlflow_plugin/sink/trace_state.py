"""One trace on its way to MLflow: its facts, numbers and tree, its run, and what waits to be sent.

Part of the sink's state; turns to JSON and back, so that another process can go on with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.assessments import assessment_of, metric_of
from qitos_mlflow.mlflow_plugin.mapping.attachments import Attachment, attach, may_show
from qitos_mlflow.mlflow_plugin.mapping.entities import RunData, RunRef
from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import VERDICT
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.limits import mapping
from qitos_mlflow.mlflow_plugin.mapping.run_totals import RunTotals
from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import PARENT_TAG, TraceFacts, settings_in
from qitos_mlflow.recording.record import Assessment, Record
from qitos_mlflow.redaction.redact import redact_text

MAX_PICTURES = 200
"""Pictures of one trace that are remembered as sent; another one is sent again with each step."""


@dataclass
class Elsewhere:
    """Where the first part of a trace is: another server's address, run and number of spans."""

    uri: str
    run_id: str
    spans: int


@dataclass
class Waiting(RunData):
    """What is to be sent of a trace, and the records that it comes from.

    `counts`: the run has ended, or was judged, so its parent's numbers change.
    """

    spans: list[Span] = field(default_factory=list)
    artifacts: list[Attachment | tuple[str, bytes]] = field(default_factory=list)
    assessments: list[Assessment] = field(default_factory=list)
    datasets: list[dict[str, str]] = field(default_factory=list)
    counts: bool = False
    records: list[bytes] = field(default_factory=list)


@dataclass
class TraceState:
    """What the sink knows of one trace.

    Attributes:
        facts: what its records say of it as a whole.
        totals: its numbers.
        tree: its MLflow trace; None if no traces are logged.
        run: its MLflow run, once created.
        attempts: how many attempts to create the run there may have been, here or in another
            process: if any, look for it first. An attempt before the last may still come through
            if a database is locked for longer than a request lasts.
        elsewhere: where part of the trace was delivered, if the rest goes to another server.
        lost_spans: how many spans are not on the server although delivery got to them, by reason.
        has_info: the server has an info of its tree.
        untraced: spans of it were left out because the server has no traces.
        pictures: ids of the last ones that were listed to be sent.
        waiting: what is to be sent; this and what follows is no part of the JSON.
        look_until: no other run is created before this time, because the server may still create
            the one that it was asked for (monotonic clock).
        confirmed_at: when the server was last known to have the run (monotonic clock).
    """

    facts: TraceFacts
    totals: RunTotals
    tree: SpanTree | None
    run: RunRef | None = None
    attempts: int = 0
    elsewhere: Elsewhere | None = None
    lost_spans: dict[str, int] = field(default_factory=dict)
    has_info: bool = False
    untraced: bool = False
    pictures: list[str] = field(default_factory=list)
    waiting: Waiting = field(default_factory=Waiting)
    look_until: float = 0.0
    confirmed_at: float = 0.0

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
        facts = TraceFacts(str(trace_id), settings)
        # A late one has no root that could be sent: its name is not known.
        made = SpanTree(facts, begun=late, root_closed=late) if tree else None
        attempts = int(resumed or late)
        return cls(facts, RunTotals(facts), made, attempts=attempts, untraced=not tree)

    # -- records -----------------------------------------------------------------------------

    def take(self, record: Record, data: bytes, rest: bytes | None = None) -> None:
        """Fold in the next record; what it adds waits to be sent.

        Args:
            record: decoded.
            data: its JSON.
            rest: the same without messages that `record` has as `Encoded`; None: it has none.
        """
        self.waiting.records.append(data)
        shows = "pictures" in record or may_show(rest or data)
        if shows and self.tree is not None and self.facts.settings.get("attachments", True):
            made, pictures = attach(record, trace_id(self.facts.trace_id))
            record = cast("Record", made)
            self.waiting.artifacts += [one for one in pictures if self._is_new(one)]
        if record["kind"] == "artifact":
            content = record["content"]
            if isinstance(content, str):
                file = content.encode()
            else:
                file = _json.dumps(content, option=_json.INDENT)
            self.waiting.artifacts.append((record["path"], file))
        if record["kind"] in ("artifact", "pictures"):
            self.facts.settings = settings_in(record.get("settings")) or self.facts.settings
        elif record["kind"] == "assessment":
            self._assess(record)
        else:
            self._fold(record)

    def _assess(self, record: Assessment) -> None:
        metric, facts = metric_of(record), self.facts
        if metric is not None:
            self.waiting.metrics.append(metric)
            self.waiting.counts |= metric.key.startswith(VERDICT)
        self.waiting.assessments.append(record)
        if self.tree is not None and self.tells:
            self.tree.assess(assessment_of(record))
            return
        facts.settings = settings_in(record.get("settings")) or facts.settings
        facts.last_ns = max(facts.last_ns, limits.clean_ns(record.get("time_ns")))

    @property
    def tells(self) -> bool:
        """Whether the infos of its tree tell what is said of it."""
        return self.facts.started and self.tree is not None

    def kill(self, last_time_ns: int, reason: str) -> None:
        """End the trace whose end will not come.

        Args:
            last_time_ns: when its process was last known to live.
            reason: goes into the tag ``qitos.killed``.
        """
        self._fold(
            {
                "kind": "trace_end",
                "time_ns": max(limits.clean_ns(last_time_ns), self.facts.last_ns),
                "status": "KILLED",
                "metadata": {"qitos.killed": reason},
            }
            if not self.facts.of_evaluation  # It may be resumed.
            else {"kind": "evaluation_end", "time_ns": last_time_ns, "status": "KILLED"}
        )

    def _is_new(self, picture: Attachment) -> bool:
        if picture.id in self.pictures:
            return False
        self.pictures = [*self.pictures, picture.id][-MAX_PICTURES:]
        return True

    def _fold(self, record: Record) -> None:
        self.waiting.counts |= record["kind"] in ("trace_end", "evaluation_result")
        if dataset := record.get("dataset"):
            self.waiting.datasets.append(dict(mapping(dataset)))
        self.waiting.tags += self.facts.fold(record)
        if not self.facts.log_traces:
            self.tree = None
        if self.tree is not None:
            self.waiting.spans += self.tree.fold(record)
        self.totals.fold(record, self.waiting)

    # -- the run -----------------------------------------------------------------------------

    @property
    def unplaced(self) -> bool:
        """Whether nothing is known but an id: a score of a trace of another process."""
        return bool(self.waiting.assessments) and not self.facts.settings

    def move(self, uri: str) -> None:
        """Forget what the server at `uri` has: the rest goes to another one."""
        if self.run is not None:
            self.elsewhere = Elsewhere(uri, self.run.run_id, self.totals.spans)
        self.run, self.attempts, self.has_info = None, 1, False
        self.lost_spans, self.untraced, self.pictures = {}, self.tree is None, []
        self.totals.params = []  # The end of a trace has them all again.
        if self.tree is not None:
            self.tree.begun = self.tree.root_closed = False

    def creation_tags(self) -> list[tuple[str, str]]:
        """Tags that a new run is created with; the user's come before ours."""
        tags = {"mlflow.source.type": "LOCAL", **self.facts.start_tags}
        if self.facts.parent:
            tags.setdefault(PARENT_TAG, self.facts.parent)
        if self.elsewhere is not None:
            tags["qitos.partial"] = redact_text(f"begun on {self.elsewhere.uri}")
        return list(tags.items())

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
        """The state as values that orjson can write; what is waiting is not part of it."""
        tree = None if self.tree is None else _without(self.tree, "facts")
        own = _without(self, "waiting", "look_until", "confirmed_at")
        return {**own, "totals": _without(self.totals, "facts"), "tree": tree}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TraceState:
        """The state that `to_json` described. The parts of `plain` become parts of it."""
        run, tree, elsewhere = plain["run"], plain["tree"], plain["elsewhere"]
        facts = TraceFacts(**_of(TraceFacts, plain["facts"]))
        facts.lost = Counter(facts.lost)
        totals = RunTotals(facts, **_of(RunTotals, plain["totals"]))
        totals.sums = Counter(totals.sums)
        parts = {
            "facts": facts,
            "totals": totals,
            "tree": SpanTree(facts, **_of(SpanTree, tree)) if tree else None,
            "run": RunRef(**run) if run else None,
            "elsewhere": Elsewhere(**elsewhere) if elsewhere else None,
        }
        return cls(**{**_of(cls, plain), **parts})


def _without(part: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in vars(part).items() if key not in names}


def _of(part: type[Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `part` that `plain` has; other versions may have others."""
    return {one.name: plain[one.name] for one in fields(part) if one.name in plain}
