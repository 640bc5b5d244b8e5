"""What MLflow's Traces page shows: each record becomes MLflow spans and trace info. Pure.

Receives decoded, redacted records of one trace, in order; hands on OpenTelemetry spans, and on
demand the trace's info as JSON (MLflow's TraceInfoV3). Ids follow from QitOS's ids, so a record
sent again replaces what it wrote before. No clock, no threads, no MLflow.

The order to send in (observed on MLflow 3.6 to 3.17): spans first, then `SpanTree.info` whenever
`TraceData.changed` says so. Beginning a trace with its info, or ending it before its root, leaves
wrong times behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.mlflow_plugin.mapping import contributed, limits, params_and_tags, span_attributes
from qitos_mlflow.mlflow_plugin.mapping.feedback import feedback_of
from qitos_mlflow.mlflow_plugin.mapping.ids import otel_trace_id, span_id
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_key, clean_ns, clean_text, mapping
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import build_span, set_status
from qitos_mlflow.mlflow_plugin.mapping.trace_info import trace_info

MAX_PRICED = 20
"""Names of generations, each of which is two requests when the trace's cost is asked for."""

MAX_ASSESSMENT_BYTES = 65_536
"""Assessments that infos repeat, as JSON; they are part of what each acknowledgement writes."""

MAX_TAGS = 200
"""Tags of one trace; what other plugins add beyond is left out."""

TELL_EVERY_NS = 5_000_000_000
"""A running trace's totals and feedback are sent this often; spans do not wait for it."""


@dataclass(frozen=True)
class TraceData:
    """What one record adds to its trace.

    Attributes:
        spans: to create or replace.
        changed: the trace's info is to be sent after them.
    """

    spans: list[Span] = field(default_factory=list)
    changed: bool = False


@dataclass
class SpanTree:
    """What must be known of one trace to write its info at any time; bounded, turns to JSON.

    A QitOS trace is itself the root of the tree, there from the start; its spans hang below.
    Where the host's trace is one agent's run and that agent's span is announced when it starts
    (a ``span_start`` record right after the ``trace_start``), the agent is the root.
    """

    id: str = ""
    constant_tags: dict[str, str] = field(default_factory=dict)
    begun: bool = False
    root: str | None = None
    root_closed: bool = False
    name: str = ""
    start_ns: int = 0
    last_ns: int = 0
    ended_ns: int | None = None
    status: str = ""
    error: str | None = None
    exception: dict[str, Any] | None = None
    request: str | None = None
    response: str | None = None
    tools: list[str] | None = None
    link: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    priced: list[str] = field(default_factory=list)
    assessments: list[dict[str, Any]] = field(default_factory=list)
    news: bool = False
    told_ns: int = 0

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SpanTree:
        """The state that `to_json` described."""
        return cls(**orjson.loads(orjson.dumps(plain)))

    @classmethod
    def after_end(cls, qitos_trace_id: str) -> SpanTree:
        """What is left to know of a trace that has ended, for spans that come later.

        And of one whose start was lost: it has no root then, for nobody knows what it was called.
        """
        fold = cls(id=qitos_trace_id, begun=True, root_closed=True)
        fold.metadata["mlflow.trace_schema.version"] = "3"
        fold._tag("qitos.trace_id", qitos_trace_id)
        return fold

    def move(self) -> None:
        """Begin anew where nothing of the trace is there yet."""
        self.begun = self.root_closed = False

    # -- records -----------------------------------------------------------------------------

    def fold(self, record: Mapping[str, Any]) -> TraceData:
        """Take in the trace's next record; returns what it adds to the trace."""
        kind = record.get("kind")
        for key, value in contributed.tags(record):
            if key in self.tags or len(self.tags) < MAX_TAGS:
                self._tag(key, value)
                self.news = True
        if kind == "trace_start":
            return self._fold_start(record)
        if kind == "span_start":
            return self._fold_root(record)
        if kind == "span":
            return self._fold_span(record)
        if kind == "trace_end":
            return self._fold_end(record)
        return TraceData()

    def abandoned(self, last_ns: int | None = None, reason: str = "the process died") -> TraceData:
        """The end of a trace that will never end: state ERROR.

        Args:
            last_ns: when the process was last known to live; None: its last record.
            reason: the root's error text and the tag ``qitos.killed``.
        """
        self.tags["qitos.killed"] = self.response = clean_text(reason, limits.PREVIEW_CHARS)
        return self._end(max(clean_ns(last_ns), self.last_ns), "KILLED", reason, None)

    def _fold_start(self, record: Mapping[str, Any]) -> TraceData:
        self.id = str(record.get("trace_id", ""))
        self.name = str(record.get("name") or "trace")
        self.start_ns = clean_ns(record.get("time_ns"))
        self.last_ns = max(self.last_ns, self.start_ns)
        metadata = mapping(record.get("metadata"))
        session = (
            record.get("group_id") or metadata.get("benchmark_name") or metadata.get("task_id")
        )
        user = metadata.get("user_id") or metadata.get("user") or record.get("user")
        for key, value, length in (
            ("mlflow.trace.session", session, limits.SESSION_CHARS),
            ("mlflow.trace.user", user, limits.SESSION_CHARS),
            ("mlflow.source.name", record.get("source"), limits.SESSION_CHARS),
        ):
            if value:
                self.metadata[key] = clean_text(value, length)
        self.metadata["mlflow.trace_schema.version"] = "3"
        tools = metadata.get("tools")
        if isinstance(tools, list):
            self.tools = [str(tool)[: limits.KEY_CHARS] for tool in tools[:200]]
        if metadata.get("linked_trace_id"):
            self.link = [
                str(metadata["linked_trace_id"]),
                str(metadata.get("linked_span_id") or ""),
            ]
        for key, value in params_and_tags.start_tags(record, None) + list(
            self.constant_tags.items()
        ):
            if not key.startswith("mlflow."):
                self._tag(key, value)
        self._tag("mlflow.traceName", self.name, limits.KEY_CHARS)
        if metadata.get("task") is not None:
            self.request = span_attributes.preview(metadata["task"])
        # The tree begins with its first span: the run is what somebody may be waiting for.
        return TraceData()

    def _fold_root(self, record: Mapping[str, Any]) -> TraceData:
        """An announced agent span becomes the root, unless the trace has one."""
        if not self.begun and record.get("type") == "agent" and not record.get("parent_id"):
            self.root = str(record.get("span_id"))
            self.name = str(mapping(record.get("data")).get("name") or self.name)
        return self._begin()

    def _begin(self) -> TraceData:
        if self.begun:
            return TraceData()
        self.begun = True
        # Ended at once and without a status: the server shows the trace as IN_PROGRESS.
        return TraceData([self._root_span(self.start_ns, {})], changed=True)

    def _fold_span(self, record: Mapping[str, Any]) -> TraceData:
        began = self._begin()
        own = str(record.get("span_id", ""))
        parent = record.get("parent_id")
        start_ns, end_ns = record.get("start_ns"), record.get("end_ns")
        self.start_ns = self.start_ns or clean_ns(start_ns)
        self.last_ns = max(self.last_ns, clean_ns(end_ns))
        found = {**span_attributes.of_span(record, self.tools), **contributed.attributes(record)}
        kind = record.get("type")
        if kind == "generation":
            self._count(found, span_attributes.span_name(record))
            self.response = span_attributes.answer_preview(found) or self.response
        is_root = own == self.root
        if is_root:
            found = {**self._root_attributes(None), **found}
        identity = span_id(self.id, own)
        above = (
            None if is_root else self._root_id() if not parent else span_id(self.id, str(parent))
        )
        span = build_span(
            otel_trace_id(self.id),
            identity,
            self._root_id() if above == identity else above,
            self.name if is_root else span_attributes.span_name(record),
            start_ns,
            end_ns,
            found,
        )
        set_status(span, _text_or_none(record.get("error")), mapping(record.get("exception")))
        if is_root:
            self.root_closed = True
            # The agent's time, without what its trace waited for its run.
            self.start_ns = span.start_time_unix_nano
            self._add_link(span)
        if kind == "critic" and (feedback := feedback_of(record, self.id)):
            self.assessments.append(feedback)
            self.news = True
        changed = self.news and (self.last_ns - self.told_ns >= TELL_EVERY_NS or self.full)
        return TraceData([*began.spans, span], began.changed or changed)

    def _fold_end(self, record: Mapping[str, Any]) -> TraceData:
        metadata = mapping(record.get("metadata"))
        for key, value in params_and_tags.end_tags(record, None):
            if key != "qitos.error":
                self._tag(key, value)
        error = record.get("error")
        exception = dict(error) if isinstance(error, Mapping) else None
        status = str(record.get("status") or "FINISHED")
        text = error if isinstance(error, str) else metadata.get("error")
        stopped = f"stopped: {metadata.get('stop_reason') or status.lower()}"
        if text is None and exception is None and status != "FINISHED":
            text = stopped
        answer = metadata.get("final_result")
        unfinished = metadata.get("stop_reason") not in (None, "final")
        if answer is None and (text or exception or unfinished):
            # Why there is no answer says more than what the model said last.
            answer = text or params_and_tags.error_text(exception) or stopped
        if answer not in (None, ""):
            self.response = span_attributes.preview(answer)
        return self._end(
            clean_ns(record.get("time_ns")),
            status,
            None if text is None else str(text),
            exception,
            metadata.get("final_result"),
        )

    def _end(
        self,
        end_ns: int,
        status: str,
        error: str | None,
        exception: dict[str, Any] | None,
        result: Any = None,
    ) -> TraceData:
        began = self._begin()
        self.last_ns = self.ended_ns = max(end_ns, self.start_ns)
        self.status = status
        if self.root_closed:  # The agent's own span says more than this one would.
            return TraceData(began.spans, changed=True)
        root = self._root_span(self.ended_ns, {"mlflow.spanOutputs": result})
        set_status(root, error, exception)
        self.root_closed = True
        return TraceData([*began.spans, root], changed=True)

    # -- info --------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """The trace's info as it stands, as MLflow's JSON; `locate` says where it belongs.

        Its assessments have ids of their own, so that the same one is there once. Totals are
        always explicit: the server stops adding up by itself once it has an info (see `cost`).
        """
        self.news, self.told_ns = False, self.last_ns
        found = trace_info(self)
        if self.full:
            self.assessments = []
        return found

    @property
    def full(self) -> bool:
        """The next info is the last one with the assessments that there are."""
        return len(orjson.dumps(self.assessments)) >= MAX_ASSESSMENT_BYTES

    # -- parts -------------------------------------------------------------------------------

    def _root_id(self) -> bytes:
        return span_id(self.id, "\0root" if self.root is None else self.root)

    def _root_attributes(self, kind: str | None) -> dict[str, Any]:
        inputs = {"task": self.request} if self.request else None
        found: dict[str, Any] = {"qitos.trace_id": self.id, "mlflow.spanInputs": inputs}
        if kind:
            found["mlflow.spanType"] = kind
        return {key: value for key, value in found.items() if value is not None}

    def _root_span(self, end_ns: int, more: Mapping[str, Any]) -> Span:
        kind = "AGENT" if self.root is not None or "qitos.agent" in self.tags else "CHAIN"
        span = build_span(
            otel_trace_id(self.id),
            self._root_id(),
            None,
            self.name,
            self.start_ns,
            end_ns,
            {**self._root_attributes(kind), **more},
        )
        self._add_link(span)
        return span

    def _add_link(self, span: Span) -> None:
        if self.link:
            trace, linked = self.link
            span.links.add(
                trace_id=otel_trace_id(trace), span_id=span_id(trace, linked or "\0root")
            )

    def _count(self, found: Mapping[str, Any], name: str) -> None:
        for key, number in (found.get("mlflow.chat.tokenUsage") or {}).items():
            self.usage[key] = self.usage.get(key, 0) + number
            self.news = True
        if self.usage and "mlflow.llm.model" in found and name not in self.priced:
            self.priced = [*self.priced, name][: MAX_PRICED + 1]

    def _tag(self, key: str, value: object, length: int = limits.TRACE_TAG_CHARS) -> None:
        self.tags[clean_key(key)] = clean_text(value, length)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
