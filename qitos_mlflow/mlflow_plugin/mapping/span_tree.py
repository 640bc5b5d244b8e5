"""What MLflow's Traces page shows: each record becomes MLflow spans and trace info. Pure.

Receives decoded, redacted records of one trace, in order; hands on OpenTelemetry spans. Ids follow
from QitOS's ids, so a record sent again replaces what it wrote before.

The order to send in (observed on MLflow 3.6 to 3.17): spans first, then `trace_info` of the tree
whenever `SpanTree.changed` is True. Beginning a trace with its info, or ending it before its root,
leaves wrong times behind.
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
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text, mapping
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import build_span, set_status
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import Counts, kind_of, span_name
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts
from qitos_mlflow.recording.record import Record, SpanEnd, SpanStart, TraceEnd, TraceStart

MAX_PRICED = 20
"""Names of generations, each of which is two requests when the trace's cost is asked for."""

MAX_ASSESSMENT_BYTES = 65_536
"""Assessments that infos repeat, as JSON; they are part of what each acknowledgement writes."""

MAX_TOOLS = 200
"""Names of an agent's tools that are kept for its generations."""

INFO_EVERY_NS = 5_000_000_000
"""How often a running trace's totals and feedback are sent; spans do not wait for it."""


@dataclass
class SpanTree:
    """What must be known of one trace to write its info at any time; bounded, turns to JSON.

    A QitOS trace is itself the root of the tree, there from the start; its spans hang below.
    If the host's trace is one agent's run and that agent's span is announced when it starts
    (a ``span_start`` record right after the ``trace_start``), the agent is the root.

    Attributes:
        facts: the trace's facts; they take in each record first.
        begun: the root has been sent.
        root: QitOS's id of the agent's span that is the root; None: the trace is.
        root_name: name of that agent.
        root_start_ns: when the agent started, once its span has ended: without the time that the
            trace waited for its run.
        root_closed: the root has been sent as it ended.
        request: preview of the task.
        response: preview of the answer.
        tools: names of the agent's tools.
        link: ids of the trace and of the span that this trace is linked to.
        metadata: the trace's metadata as of its start.
        usage: tokens so far.
        priced: names of generations with tokens and a model.
        assessments: feedback that each info repeats.
        assessment_bytes: their size as JSON.
        news: the next info says more than the last one.
        changed: that info is to be sent after the spans that there are.
        info_ns: `facts.last_ns` as of the last info.
    """

    facts: TraceFacts = field(default_factory=TraceFacts)
    begun: bool = False
    root: str | None = None
    root_name: str = ""
    root_start_ns: int | None = None
    root_closed: bool = False
    request: str | None = None
    response: str | None = None
    tools: list[str] | None = None
    link: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=lambda: {"mlflow.trace_schema.version": "3"})
    usage: dict[str, int] = field(default_factory=dict)
    priced: list[str] = field(default_factory=list)
    assessments: list[dict[str, Any]] = field(default_factory=list)
    assessment_bytes: int = 0
    news: bool = False
    changed: bool = False
    info_ns: int = 0

    def to_json(self) -> dict[str, Any]:
        """The tree as plain JSON values, without the facts."""
        return {name: value for name, value in vars(self).items() if name != "facts"}

    @classmethod
    def after_end(cls, facts: TraceFacts) -> SpanTree:
        """The tree of a trace that has ended, for spans that come later.

        And of one whose start was lost: it has no root then, for its name is not known.
        """
        return cls(facts, begun=True, root_closed=True)

    def move(self) -> None:
        """Begin anew on a server that has nothing of the trace."""
        self.begun = self.root_closed = False

    @property
    def name(self) -> str:
        """Name of the root."""
        return self.root_name or self.facts.name or "trace"

    @property
    def start_ns(self) -> int:
        """When the root started."""
        return self.facts.start_ns if self.root_start_ns is None else self.root_start_ns

    @property
    def full(self) -> bool:
        """The next info is the last one with the assessments that there are."""
        return self.assessment_bytes >= MAX_ASSESSMENT_BYTES

    def info_made(self) -> None:
        """Take account of an info that says all there is to say now."""
        self.news = self.changed = False
        self.info_ns = self.facts.last_ns
        if self.full:
            self.assessments, self.assessment_bytes = [], 0

    # -- records -----------------------------------------------------------------------------

    def fold(self, record: Record) -> list[Span]:
        """Take in the trace's next record; returns spans to create or replace."""
        self.news = self.news or bool(mapping(record.get("added")).get("tags"))
        if record["kind"] == "trace_start":
            self._fold_start(record)
        elif record["kind"] == "span_start":
            return self._fold_root(record)
        elif record["kind"] == "span":
            return self._fold_span(record)
        elif record["kind"] == "trace_end":
            return self._fold_end(record)
        return []

    def killed(self, reason: str) -> list[Span]:
        """The spans that end the tree of a trace that the facts say was killed: state ERROR.

        Args:
            reason: the root's error text.
        """
        self.response = clean_text(reason, limits.PREVIEW_CHARS)
        return self._end(reason, None)

    def _fold_start(self, record: TraceStart) -> None:
        """Keep what the root and the infos need; the tree itself begins with its first span.

        Until then the agent may be waiting for its run.
        """
        metadata, settings = mapping(record.get("metadata")), self.facts.settings
        session = (
            record.get("group_id") or metadata.get("benchmark_name") or metadata.get("task_id")
        )
        user = metadata.get("user_id") or metadata.get("user") or settings.get("user")
        for key, value in (
            ("mlflow.trace.session", session),
            ("mlflow.trace.user", user),
            ("mlflow.source.name", settings.get("source")),
        ):
            if value:
                self.metadata[key] = clean_text(value, limits.SESSION_CHARS)
        tools, linked = metadata.get("tools"), metadata.get("linked_trace_id")
        if isinstance(tools, list):
            self.tools = [str(tool)[: limits.KEY_CHARS] for tool in tools[:MAX_TOOLS]]
        if linked:
            self.link = [str(linked), str(metadata.get("linked_span_id") or "")]
        if metadata.get("task") is not None:
            self.request = span_attributes.preview(metadata["task"])

    def _fold_root(self, record: SpanStart) -> list[Span]:
        """An announced agent span becomes the root, unless the trace has one."""
        if not self.begun and record.get("type") == "agent" and not record.get("parent_id"):
            self.root = str(record.get("span_id"))
            self.root_name = str(mapping(record.get("data")).get("name") or "")
        return self._begin()

    def _begin(self) -> list[Span]:
        if self.begun:
            return []
        self.begun = self.changed = True
        # Ended at once and without a status: the server shows the trace as IN_PROGRESS.
        return [self._root_span(self.start_ns, {})]

    def _fold_span(self, record: SpanEnd) -> list[Span]:
        began = self._begin()
        trace, own = self.facts.trace_id, str(record.get("span_id", ""))
        parent, is_root = record.get("parent_id"), own == self.root
        found = {**span_attributes.of_span(record, self.tools), **contributed.attributes(record)}
        counts, name = kind_of(record).counts, span_name(record)
        if counts is Counts.MODEL_CALL:
            self._count(found, name)
            self.response = span_attributes.answer_preview(found) or self.response
        if is_root:
            found = {**self._root_attributes(None), **found}
        identity = span_id(trace, own)
        above = span_id(trace, str(parent)) if parent else self._root_id()
        span = build_span(
            otel_trace_id(trace),
            identity,
            None if is_root else self._root_id() if above == identity else above,
            self.name if is_root else name,
            record.get("start_ns"),
            record.get("end_ns"),
            found,
        )
        error = record.get("error")
        set_status(span, None if error is None else str(error), mapping(record.get("exception")))
        if is_root:
            self.root_closed = True
            self.root_start_ns = span.start_time_unix_nano
            self._add_link(span)
        if counts is Counts.VERDICT and (feedback := feedback_of(record, trace)):
            self.assessments.append(feedback)
            self.assessment_bytes += len(orjson.dumps(feedback))
            self.news = True
        if self.news and (self.facts.last_ns - self.info_ns >= INFO_EVERY_NS or self.full):
            self.changed = True
        return [*began, span]

    def _fold_end(self, record: TraceEnd) -> list[Span]:
        metadata, status = mapping(record.get("metadata")), self.facts.status
        error = record.get("error")
        exception = dict(error) if isinstance(error, Mapping) else None
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
            None if text is None else str(text), exception, metadata.get("final_result")
        )

    def _end(
        self, error: str | None, exception: dict[str, Any] | None, result: Any = None
    ) -> list[Span]:
        began = self._begin()
        self.changed = True
        if self.root_closed:  # The agent's own span says more than this one would.
            return began
        root = self._root_span(self.facts.ended_ns or 0, {"mlflow.spanOutputs": result})
        set_status(root, error, exception)
        self.root_closed = True
        return [*began, root]

    # -- parts -------------------------------------------------------------------------------

    def _root_id(self) -> bytes:
        return span_id(self.facts.trace_id, "\0root" if self.root is None else self.root)

    def _root_attributes(self, kind: str | None) -> dict[str, Any]:
        inputs = {"task": self.request} if self.request else None
        found = {
            "qitos.trace_id": self.facts.trace_id,
            "mlflow.spanInputs": inputs,
            "mlflow.spanType": kind,
        }
        return {key: value for key, value in found.items() if value is not None}

    def _root_span(self, end_ns: int, more: Mapping[str, Any]) -> Span:
        of_agent = self.root is not None or "qitos.agent" in self.facts.start_tags
        span = build_span(
            otel_trace_id(self.facts.trace_id),
            self._root_id(),
            None,
            self.name,
            self.start_ns,
            end_ns,
            {**self._root_attributes("AGENT" if of_agent else "CHAIN"), **more},
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
