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

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping import limits, span_attributes
from qitos_mlflow.mlflow_plugin.mapping.ids import digest, otel_trace_id, span_id, trace_id
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text, mapping
from qitos_mlflow.mlflow_plugin.mapping.lineage import MODEL_ID
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import build_span, set_status
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import kind_of, span_name
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts, added, error_text
from qitos_mlflow.recording.record import Record, SpanEnd, TraceEnd, TraceStart

MAX_PRICED = 20
"""Names of generations, each of which is two requests when the trace's cost is asked for."""

MAX_ASSESSMENT_BYTES = 65_536
"""Assessments that infos repeat, as JSON; they are part of what each acknowledgement writes."""

MAX_TOOLS = 200
"""Names of an agent's tools that are kept for its generations."""

INFO_EVERY_NS = 5_000_000_000
"""How often a running trace's totals and feedback are sent; spans do not wait for it."""

_STATES = {"FINISHED": "OK", "FAILED": "ERROR", "KILLED": "ERROR"}


@dataclass
class SpanTree:
    """What must be known of one trace to write its info at any time; bounded, as plain values.

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
        news: the next info says more than the last one.
        info_ns: `facts.last_ns` as of the last info.
    """

    facts: TraceFacts
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
    news: bool = False
    info_ns: int = 0

    @property
    def start_ns(self) -> int:
        """When the root started."""
        return self.facts.start_ns if self.root_start_ns is None else self.root_start_ns

    @property
    def root_attributes(self) -> dict[str, Any]:
        """What the root shows of the trace, beside what an agent's span shows of itself."""
        of_agent = self.root is not None or "qitos.agent" in self.facts.start_tags
        found = {
            "qitos.trace_id": self.facts.trace_id,
            "mlflow.spanInputs": {"task": self.request} if self.request else None,
            "mlflow.spanType": "AGENT" if of_agent else "CHAIN",
        }
        return {key: value for key, value in found.items() if value is not None}

    # -- the info ----------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """The next info is the last one with the assessments that there are."""
        return len(_json.dumps(self.assessments)) >= MAX_ASSESSMENT_BYTES

    @property
    def changed(self) -> bool:
        """An info is to be sent after the spans that there are."""
        if not self.begun or self.facts.ended:
            return self.begun
        due = self.facts.last_ns - self.info_ns >= INFO_EVERY_NS
        return self.news and (due or self.full)

    def info(self) -> dict[str, Any]:
        """The trace's info as MLflow's JSON (TraceInfoV3); `locate` says where it belongs.

        Its assessments have ids of their own, so that each is on the server once. Totals are always
        explicit: the server stops adding up by itself once it has an info (see `sink.operations`).
        """
        facts, tags = self.facts, self.facts.trace_tags
        metadata = {**self.metadata, **facts.code}
        if facts.started:
            tags["mlflow.traceName"] = clean_text(facts.name or "trace", limits.KEY_CHARS)
        info: dict[str, Any] = {
            "trace_id": trace_id(facts.trace_id),
            "client_request_id": clean_text(facts.trace_id, limits.CLIENT_REQUEST_CHARS),
            "request_time": limits.rfc3339(self.start_ns),
            "state": _STATES.get(facts.status, "ERROR") if facts.ended else "IN_PROGRESS",
            "trace_metadata": metadata,
            "tags": tags,
        }
        if self.request:
            metadata["mlflow.traceInputs"] = info["request_preview"] = self.request
        if facts.ended_ns is not None:
            info["execution_duration"] = f"{max(0, facts.ended_ns - self.start_ns) / 1e9:.3f}s"
            if self.response:
                metadata["mlflow.traceOutputs"] = info["response_preview"] = self.response
        if self.usage:
            metadata["mlflow.trace.tokenUsage"] = _json.dumps(self.usage).decode()
        if self.assessments:
            info["assessments"] = list(self.assessments)
        return info

    def assess(self, assessment: dict[str, Any]) -> None:
        """Have the next info, at once, say this of the trace."""
        same = assessment["assessment_id"]
        kept = [one for one in self.assessments if one["assessment_id"] != same]
        self.assessments, self.news, self.info_ns = [*kept, assessment], True, 0

    def info_made(self) -> None:
        """Take account of an info that says all there is to say now."""
        self.news, self.info_ns = False, self.facts.last_ns
        if self.full:
            self.assessments = []

    # -- records -----------------------------------------------------------------------------

    def fold(self, record: Record) -> list[Span]:
        """Take in the trace's next record; returns spans to create or replace."""
        self.news = self.news or bool(added(record, "tags"))
        if record["kind"] == "trace_start":
            self._fold_start(record)
        elif record["kind"] == "span_start":
            if not self.begun and record.get("type") == "agent" and not record.get("parent_id"):
                self.root = str(record.get("span_id"))
                self.root_name = str(mapping(record.get("data")).get("name") or "")
            return self._begin()
        elif record["kind"] == "span":
            return [*self._begin(), self._fold_span(record)]
        elif record["kind"] == "trace_end":
            return [*self._begin(), *self._fold_end(record)]
        return []

    def _fold_start(self, record: TraceStart) -> None:
        """Keep what the root and the infos need; the tree itself begins with its first span.

        Until then the agent may be waiting for its run.
        """
        metadata, settings = mapping(record.get("metadata")), self.facts.settings
        users = (settings.get("user_id"), metadata.get("user_id"), metadata.get("user"))
        user = next(filter(None, users), settings.get("user"))
        caller = str(settings.get("traceparent") or "").split("-")
        for key, value in (
            ("mlflow.trace.session", record.get("group_id")),
            ("mlflow.trace.user", user),
            ("mlflow.source.name", settings.get("source")),
            (MODEL_ID, settings.get("model_id")),
        ):
            if value:
                self.metadata[key] = clean_text(value, limits.SESSION_CHARS)
        tools, linked = metadata.get("tools"), metadata.get("linked_trace_id")
        if isinstance(tools, list):
            self.tools = [str(tool)[: limits.KEY_CHARS] for tool in tools[:MAX_TOOLS]]
        if linked:
            self.link = [str(linked), str(metadata.get("linked_span_id") or "")]
        elif len(caller) > 2:
            self.link = caller[1:3]
        if metadata.get("task") is not None:
            self.request = span_attributes.preview(metadata["task"])

    def _begin(self) -> list[Span]:
        if self.begun:
            return []
        self.begun = self.news = True
        self.info_ns = 0
        # Ended at once and without a status: the server shows the trace as IN_PROGRESS.
        return [self._root_span(self.start_ns, self.start_ns, {})]

    def _fold_span(self, record: SpanEnd) -> Span:
        trace, own = self.facts.trace_id, str(record.get("span_id", ""))
        start_ns, end_ns, parent = (
            record.get("start_ns"),
            record.get("end_ns"),
            record.get("parent_id"),
        )
        found = {**span_attributes.of_span(record, self.tools), **added(record, "attributes")}
        counts, name = kind_of(record).counts, span_name(record)
        if counts == "tokens":
            self._count_tokens(found, name)
            self.response = span_attributes.answer_preview(found) or self.response
        if own == self.root:
            span = self._root_span(start_ns, end_ns, found)
            self.root_closed, self.root_start_ns = True, span.start_time_unix_nano
        else:
            identity, root = span_id(trace, own), self._root_id()
            above = span_id(trace, str(parent)) if parent else root
            above = root if above == identity else above
            span = build_span(otel_trace_id(trace), identity, above, name, start_ns, end_ns, found)
        error = record.get("error")
        set_status(span, None if error is None else str(error), mapping(record.get("exception")))
        if counts == "scores" and (feedback := feedback_of(record, trace)):
            self.assessments.append(feedback)
            self.news = True
        return span

    def _fold_end(self, record: TraceEnd) -> list[Span]:
        metadata, status = mapping(record.get("metadata")), self.facts.status
        error, result = record.get("error"), metadata.get("final_result")
        exception, stop_reason = mapping(error), metadata.get("stop_reason")
        reason = metadata.get("qitos.killed") or metadata.get("error")
        text = error if isinstance(error, str) else reason
        stopped = f"stopped: {stop_reason or status.lower()}"
        if text is None and not exception and status != "FINISHED":
            text = stopped
        answer = result
        if answer is None and (text or exception or stop_reason not in (None, "final")):
            # Why there is no answer says more than what the model said last.
            answer = text or error_text(exception) or stopped
        if answer not in (None, ""):
            self.response = span_attributes.preview(answer)
        if self.root_closed:  # The agent's own span says more than this one would.
            return []
        self.root_closed = True
        root = self._root_span(self.start_ns, self.facts.ended_ns, {"mlflow.spanOutputs": result})
        set_status(root, None if text is None else str(text), exception)
        return [root]

    # -- parts -------------------------------------------------------------------------------

    def _root_id(self) -> bytes:
        return span_id(self.facts.trace_id, "\0root" if self.root is None else self.root)

    def _root_span(self, start_ns: Any, end_ns: Any, attributes: Mapping[str, Any]) -> Span:
        trace = self.facts.trace_id
        name = self.root_name or self.facts.name or "trace"
        both = {**self.root_attributes, **attributes}
        span = build_span(otel_trace_id(trace), self._root_id(), None, name, start_ns, end_ns, both)
        if self.link:
            other, linked = self.link
            of_link = span_id(other, linked or "\0root")
            span.links.add(trace_id=otel_trace_id(other), span_id=of_link)
        return span

    def _count_tokens(self, found: Mapping[str, Any], name: str) -> None:
        for key, number in (found.get("mlflow.chat.tokenUsage") or {}).items():
            self.usage[key] = self.usage.get(key, 0) + number
            self.news = True
        if self.usage and "mlflow.llm.model" in found and name not in self.priced:
            self.priced = [*self.priced, name][: MAX_PRICED + 1]


def locate(info: Mapping[str, Any], experiment_id: str, run_id: str) -> dict[str, Any]:
    """`info` completed for ``POST /api/3.0/mlflow/traces``: in its experiment, linked to its run.

    Args:
        info: what `SpanTree.info` returned; it stays as it is.
        experiment_id: MLflow's id.
        run_id: MLflow's id.
    """
    experiment = {"experiment_id": experiment_id}
    return {
        **info,
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": experiment},
        "trace_metadata": {**info["trace_metadata"], "mlflow.sourceRun": run_id},
    }


def feedback_of(record: SpanEnd, qitos_trace_id: str) -> dict[str, Any] | None:
    """MLflow's assessment, as JSON, for a critic's span record; None if it has no score.

    A text among the values would leave MLflow without an average for all of that name. The id
    follows from the span's, so that the same assessment written again replaces the first one.
    """
    data = mapping(record.get("data"))
    verdict = mapping(data.get("output_content"))
    value = limits.clean_score(data.get("score"))
    if value is None:
        return None
    name = clean_text(data.get("critic_name") or "critic", limits.KEY_CHARS)
    at = limits.rfc3339(limits.clean_ns(record.get("end_ns")))
    judge = verdict.get("model") or mapping(verdict.get("details")).get("model")
    # If the bridge found no model, the verdict may still name one.
    by_model = judge or mapping(record.get("output")).get("judged_by_model") is True
    own = str(record.get("span_id", ""))
    facts = {"step": record.get("step"), "action": verdict.get("action")}
    feedback: dict[str, Any] = {
        "assessment_id": f"a-{digest('feedback', qitos_trace_id, own, size=16).hex()}",
        "assessment_name": name,
        "trace_id": trace_id(qitos_trace_id),
        "span_id": span_id(qitos_trace_id, own).hex(),
        "source": {"source_type": "LLM_JUDGE" if by_model else "CODE", "source_id": name},
        "create_time": at,
        "last_update_time": at,
        "feedback": {"value": value},
        "metadata": {
            f"qitos.{key}": clean_text(fact, limits.KEY_CHARS)
            for key, fact in facts.items()
            if fact is not None
        },
        "valid": True,
    }
    if verdict.get("reason"):
        feedback["rationale"] = clean_text(verdict["reason"], limits.TAG_CHARS)
    return feedback
