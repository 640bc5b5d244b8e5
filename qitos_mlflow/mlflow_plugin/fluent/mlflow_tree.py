"""Makes the agent's spans the subtree of MLflow's own span that is current where a trace begins.

Inside `@mlflow.trace`, `mlflow.start_span` or the call of `mlflow.genai.evaluate`, MLflow's tracer
makes the tree and delivers it. So scorers, judges and `mlflow.get_trace` see the agent's spans in
the trace that they know. A span's content comes from its record: redacted, cut and mapped like what
goes through the spool. The run and its numbers go the usual way.

The agent's thread begins the spans. A thread in the background shows and ends them: in an
evaluation MLflow sends each span as it ends, and waits for its server.

If MLflow's tracer fails, only its trace lacks spans. mlflow is in use before this is imported.
"""

from __future__ import annotations

import contextvars
import sys
import time
from itertools import takewhile
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow._after_import import imported
from qitos_mlflow._guard import contain, shield
from qitos_mlflow.mlflow_plugin.fluent import origins
from qitos_mlflow.mlflow_plugin.fluent.in_background import InBackground
from qitos_mlflow.mlflow_plugin.fluent.mlflow_spans import (
    RENEW_S,
    flush_in_time,
    is_below,
    leave_ended,
    make_current,
    renew,
    trace_manager,
)
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun, before_alarm_s
from qitos_mlflow.mlflow_plugin.mapping import span_attributes
from qitos_mlflow.mlflow_plugin.mapping.assessments import assessment_of
from qitos_mlflow.mlflow_plugin.mapping.attachments import attach, may_show
from qitos_mlflow.mlflow_plugin.mapping.limits import mapping
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import failure_of
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import kind_of, span_name
from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree, feedback_of
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TREE_TAG, TraceFacts, added
from qitos_mlflow.recording.normalize import additions, nanoseconds, safe
from qitos_mlflow.recording.pictures import TakenPictures
from qitos_mlflow.recording.to_json import Snapshot, as_json
from qitos_mlflow.redaction.redact import redact_text

TRACE = "trace"
"""Stands for the trace itself among the open spans, if it has a span of its own."""

STALL_S = 2.0
"""The end of a trace waits for its spans to end. It gives up if none ends for so long (seconds), as
long as the start may wait for the run."""

MAX_WAITING = 2_000
"""Most records that wait, such as for a server that hangs. Spans of later records show nothing."""

MODEL, USAGE = "mlflow.llm.model", "mlflow.chat.tokenUsage"
"""Attributes by which the server prices a span."""


def tree_around(
    trace: Any, run: PendingRun, field_bytes: int, parent_run_id: str | None, picture_bytes: int = 0
) -> MlflowTree | None:
    """The tree that a trace which begins on this thread is part of; None if it has its own.

    It is the tree of MLflow's current span, if that is recorded. If there is no current span inside
    `mlflow.genai.evaluate`, it is a new tree, because the evaluation looks for what MLflow's tracer
    has made. Never raises. The arguments are those of `MlflowTree`.
    """
    with shield("mlflow_tree.begin"):
        above = sys.modules["mlflow"].get_current_active_span()
        if above is not None:
            with trace_manager().get_trace(above.trace_id) as known:
                if known is None:  # Another tracer's span.
                    return None
            if not above._span.is_recording() or above.start_time_ns <= origins.forked_ns:
                return None  # It is over, or the parent process's.
        elif not _is_evaluated():
            return None
        tree = MlflowTree(trace, above, run, field_bytes, parent_run_id, picture_bytes)
        return tree if tree.trace_id else None
    return None


class MlflowTree:
    """The spans of one QitOS trace in MLflow's tracer. Any thread; only the constructor raises.

    Args:
        trace: the host's.
        above: MLflow's span that they are below; None: they are a trace of their own.
        run: the QitOS trace's.
        field_bytes: largest size of one field of a record (bytes).
        parent_run_id: the parent of `run`; MLflow's trace belongs to the parent.
        picture_bytes: largest size of a picture that is attached (bytes); 0: none is.

    Attributes:
        trace_id: MLflow's id of its trace; empty if MLflow made none.
    """

    def __init__(
        self,
        trace: Any,
        above: Any,
        run: PendingRun,
        field_bytes: int,
        parent_run_id: str | None,
        picture_bytes: int,
    ) -> None:
        self._facts = TraceFacts(str(trace.trace_id))
        self._tree = SpanTree(self._facts)
        self._run = run
        # MLflow deletes all traces of an evaluation's run but one for each row.
        self._parent_run_id = None if above is None else parent_run_id
        self._field_bytes = field_bytes
        self._pictures = TakenPictures(picture_bytes)
        self._open: dict[str, Any] = {}
        self._over = self._stalled = self._in_queue = False
        self._known_until_s = time.monotonic() + RENEW_S
        self._contexts = sys.modules["mlflow.tracing.provider"].get_context_api()
        self._background = InBackground("mlflow-tree")
        self._context = contextvars.copy_context()  # Says that this is an evaluation.
        self._top = above
        # A trace of the bridge is one agent's run, whose span is there in a moment.
        self._root = "" if "agent_name" in (trace.metadata or {}) else TRACE
        if above is None or self._root == TRACE:
            self._top = self._start(str(trace.name or "trace"), above, time.time_ns())
            if self._top is not None:
                self._open[TRACE] = self._top
                make_current(self._contexts, self._top._span)
        self.trace_id = "" if self._top is None else str(self._top.trace_id)

    # -- spans, on their own threads -----------------------------------------------------------

    def enter(self, span: Any) -> None:
        """`span` has started on this thread: it is MLflow's current span until it ends."""
        late = self._over
        if late:
            return
        try:
            if time.monotonic() >= self._known_until_s:
                self._known_until_s = time.monotonic() + RENEW_S
                self._renew()
            above = self._open.get(span.parent_span_id, self._top)
            current = sys.modules["mlflow"].get_current_active_span()
            if current is not None and not hasattr(current._span, "qitos_outer"):
                # The user's, such as in a tool that `@mlflow.trace` is around.
                with trace_manager().get_trace(self.trace_id) as known:
                    spans = {} if known is None else known.span_dict
                    above = current if is_below(spans, current, above) else above
            name = getattr(span.data, "name", None) or span.data.type
            live = self._start(str(name), above, nanoseconds(span.started_at))
            if live is None:
                return
            self._open[span.span_id] = live
            self._root = self._root or span.span_id
            make_current(self._contexts, live._span)
            if self._over:  # Since the look above, on another thread.
                self._close_all()
        except BaseException as error:  # noqa: BLE001
            contain("mlflow_tree.enter", error)

    def leave(self, span: Any) -> None:
        """`span` has ended: MLflow's current span is again the one before it."""
        with shield("mlflow_tree.leave"):
            live = self._open.get(span.span_id)
            if live is not None:
                live._span.qitos_ended = True
                self._background.do(self._close, span.span_id, time.time_ns())
            leave_ended(self._contexts)

    def fold(self, snapshot: Snapshot) -> None:
        """Take in a record of the trace: its start, a span or its end. Shows it soon."""
        if not self._over and self._background.waiting < MAX_WAITING:
            self._background.do(self._fold, snapshot)

    def assess(self, snapshot: Snapshot) -> bool:
        """Add the assessment in a record to the trace; False if MLflow has sent the trace."""
        with shield("mlflow_tree.assess"):
            return self._assess(assessment_of(self._safe(as_json(snapshot))))
        return False

    def end(self) -> None:
        """The trace has ended: its open spans end, too, or MLflow would never send its trace."""
        self._over = True
        with shield("mlflow_tree.end"):
            self._close_all()
            try:
                leave_ended(self._contexts)
            finally:
                if not self._background.wait(STALL_S, before_alarm_s()):
                    self._stalled = True
                    self._background.start_another()
                    self._background.wait(STALL_S, before_alarm_s())
            if self._in_queue:  # The queue drops the spans of a trace whose root is sent.
                flush_in_time(min(STALL_S, before_alarm_s()))
            # A trace that has ended is remembered for long: it holds no spans.
            self._top, self._context = None, contextvars.Context()

    # -- parts -----------------------------------------------------------------------------------

    @staticmethod
    def _start(name: str, above: Any, start_ns: int | None) -> Any:
        """A span of MLflow's tracer; None if it makes none."""
        start = sys.modules["mlflow"].start_span_no_context
        live = start(redact_text(name), parent_span=above, start_time_ns=start_ns)
        return live if live._span.is_recording() else None

    def _renew(self) -> None:
        """Have MLflow keep its trace for another hour, unless the user has set a time limit."""
        manager = trace_manager()
        with manager.get_trace(self.trace_id) as trace:
            if trace is not None and not getattr(manager._traces, "timeout", None):
                renew(manager, self.trace_id, trace)

    def _safe(self, data: bytes) -> Any:
        return safe(_json.loads(data), len(data), self._field_bytes, self._pictures)

    @staticmethod
    def _show(live: Any, attributes: dict[str, Any]) -> None:
        """Set attributes as MLflow keeps them: as JSON, which its own encoder takes long for."""
        for key, value in attributes.items():
            if value is not None:
                live._span.set_attribute(key, _json.dumps(value).decode())

    def _close_all(self) -> None:
        """Have all open spans end, the innermost first."""
        for key, live in reversed([*self._open.items()]):
            live._span.qitos_ended = True
            self._background.do(self._close, key, time.time_ns())

    # -- parts, in the background ----------------------------------------------------------------

    def _close(self, key: str, end_ns: int) -> None:
        """Forget an open span. If its record was lost, or could not be shown, it ends here."""
        live = self._open.pop(key, None)
        if live is not None and live._span.is_recording():
            self._end(live, end_ns)

    def _end(self, live: Any, end_ns: int | None) -> None:
        # Outside of an evaluation's context, MLflow leaves it to its queue: that is for a server
        # which does not answer.
        context = self._context
        if self._stalled or self._run.out_of_reach():
            context, self._in_queue = contextvars.Context(), True
        context.run(live.end, end_time_ns=end_ns)

    def _fold(self, snapshot: Snapshot) -> None:
        data = as_json(snapshot)
        record = self._safe(data)
        if record["kind"] == "span":
            self._fold_span(record, data)
            return
        self._facts.fold(record)
        spans = self._tree.fold(record)
        self._describe()  # First: MLflow sends its trace as the root ends.
        if record["kind"] == "trace_end" and TRACE in self._open:
            self._end_of_trace(record, spans[-1])

    def _fold_span(self, record: Any, data: bytes) -> None:
        live = self._open.get(record["span_id"])
        if live is None:
            return
        record |= additions(record, self._field_bytes)
        if self._pictures.max_bytes and ("pictures" in record or may_show(data)):
            record, pictures = attach(record, self.trace_id)
            made = sys.modules["mlflow.tracing.attachments"].Attachment
            for one in pictures:  # MLflow sends them with its trace, each once.
                live._attachments[one.id] = made(content_type="", content_bytes=one.content)
        found = {**span_attributes.of_span(record, self._tree.tools), **added(record, "attributes")}
        if record["span_id"] == self._root:
            found = {**self._tree.root_attributes, **found}
        if MODEL in found and USAGE in found and self._is_priced_below(live):
            # Not the model: the server finds it in the inputs as well.
            found["qitos.token_usage"] = found.pop(USAGE)
        live._span.update_name(span_name(record))
        self._show(live, found)
        error = record.get("error")
        text, end_ns = None if error is None else str(error), record.get("end_ns")
        self._fail(live, failure_of(text, mapping(record.get("exception"))), end_ns)
        scores = kind_of(record).counts == "scores"
        if scores and (feedback := feedback_of(record, self._facts.trace_id)):
            self._assess({**feedback, "trace_id": self.trace_id, "span_id": live.span_id})
        self._end(live, end_ns)

    def _assess(self, said: dict[str, Any]) -> bool:
        """Add an assessment to MLflow's trace; False if MLflow has sent the trace."""
        with trace_manager().get_trace(self.trace_id) as trace:
            if trace is None or trace.is_remote_trace:
                return False
            entities: Any = sys.modules["mlflow.entities"]
            there, own = trace.info.assessments, said["assessment_id"]
            there[:] = [one for one in there if one.assessment_id != own]
            there.append(entities.Assessment.from_dictionary(said))
            return True

    def _fail(self, live: Any, failure: Any, end_ns: int | None) -> None:
        if failure is not None:
            entities: Any = sys.modules["mlflow.entities"]
            text, attributes = failure
            at_ns = end_ns or time.time_ns()
            live.add_event(entities.SpanEvent("exception", timestamp=at_ns, attributes=attributes))
            live.set_status(entities.SpanStatus(entities.SpanStatusCode.ERROR, text))

    def _end_of_trace(self, record: Any, root: Any) -> None:
        """End the span of the trace itself as `root`, the one that the tree would have, ends."""
        live = self._open[TRACE]
        live._span.update_name(self._facts.name or "trace")
        result = mapping(record.get("metadata")).get("final_result")
        self._show(live, {**self._tree.root_attributes, "mlflow.spanOutputs": result})
        for event in root.events:
            attributes = {one.key: one.value.string_value for one in event.attributes}
            self._fail(live, (root.status.message, attributes), record["time_ns"])
        self._end(live, record["time_ns"])

    def _describe(self) -> None:
        """Give MLflow's trace the tags of ours, and the run that it belongs to."""
        ref = self._run.ref
        run_id = self._parent_run_id or (None if ref is None else ref.run_id)
        with trace_manager().get_trace(self.trace_id) as trace:
            if trace is None or trace.is_remote_trace:  # One begun elsewhere has its own.
                return
            # An evaluation finds the trace of a row by its own request id.
            kept = {TREE_TAG, *trace.info.tags.keys() & {"mlflow.eval.requestId"}}
            tags = self._facts.trace_tags.items()
            trace.info.tags.update({key: tag for key, tag in tags if key not in kept})
            metadata = trace.info.trace_metadata
            for key, value in self._tree.metadata.items():
                metadata.setdefault(key, value)
            if run_id:  # MLflow takes any thread's newest run, which may be another agent's.
                metadata["mlflow.sourceRun"] = run_id

    def _is_priced_below(self, live: Any) -> bool:
        """Whether MLflow has a span of the same model call, which is the one that is priced."""
        with trace_manager().get_trace(self.trace_id) as trace:
            spans = {} if trace is None else trace.span_dict
            return any(
                {MODEL, USAGE} <= one._span.attributes.keys() and is_below(spans, one, live)
                # Those before began before it.
                for one in takewhile(lambda one: one is not live, reversed(spans.values()))
            )


def _is_evaluated() -> bool:
    """Whether `mlflow.genai.evaluate` calls what this thread does."""
    if imported("mlflow.pyfunc.context") is None:  # MLflow would import it to look.
        return False
    return bool(sys.modules["mlflow.tracing.utils"].maybe_get_request_id(is_evaluate=True))
