"""Makes MLflow's own spans children of the QitOS span in which they are made.

With `mlflow.openai.autolog()` and the like, a model call leaves a span of MLflow's tracer. While a
QitOS span is open, it is MLflow's current span on this thread: a remote parent, as in MLflow's
distributed tracing. Nothing of MLflow is set up, cleared or configured for it. MLflow's exporter
sends its spans with our trace's id.

If this fails, MLflow's spans are traces of their own, as they are without this package. mlflow is
never imported here.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any

from qitos_mlflow._guard import contain, shield
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.mlflow_plugin.fluent.active_run import same_place
from qitos_mlflow.mlflow_plugin.fluent.mlflow_spans import (
    RENEW_S,
    flush_spans,
    leave_ended,
    make_current,
    renew,
    trace_manager,
)
from qitos_mlflow.mlflow_plugin.fluent.origins import mlflow_in_use
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.mapping.ids import otel_trace_id, span_id, trace_id

FLUSH_MS = 30_000
"""How long MLflow's exporter may take for its last spans of a trace, in the background (ms)."""


COST = "mlflow.llm.cost"
"""Attribute of a span: the server does not price a span that has it."""

FREE = {"input_cost": 0.0, "output_cost": 0.0, "total_cost": 0.0}


class _Spans(dict[str, Any]):
    """MLflow's spans of a trace. A model call that is also a QitOS span has its price there only.

    Attributes:
        calls: MLflow's spans below each QitOS span of a model call that is open, by its id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Any]] = {}

    def __setitem__(self, key: str, span: Any) -> None:
        super().__setitem__(key, span)
        above = span.parent_id
        while above in self:
            above = self[above].parent_id
        if above in self.calls:
            self.calls[above].append(span)
            span.set_attribute(COST, FREE)


class AutologSpans:
    """What MLflow's tracer sees of one trace. Any thread; no method raises.

    Args:
        qitos_trace_id: the trace.
        run: its run. While its server is out of reach, MLflow's spans stay traces of their own.
        uri: where the trace goes; None for MLflow's default. MLflow's spans must go there too.
        sampled: the trace is logged. If not, neither are MLflow's spans within it.
    """

    def __init__(
        self, qitos_trace_id: str, run: PendingRun, uri: str | None, *, sampled: bool = True
    ) -> None:
        self._qitos_trace_id = qitos_trace_id
        self._run = run
        self._uri = uri
        self._sampled = sampled
        self._attached: dict[str, Any] = {}
        self._contexts: Any = None  # MLflow's, once it is in use.
        self._spans = _Spans()
        self._over = False  # Or never begun: MLflow's spans go elsewhere.
        self._known_until_s = 0.0

    def enter(self, span: Any) -> None:
        """`span` has started on this thread: MLflow's spans are its children from now on."""
        try:
            if not self._is_possible():
                return
            from opentelemetry import trace as otel

            parent = otel.SpanContext(
                trace_id=self._otel_trace_id,
                span_id=int.from_bytes(self._id_of(span), "big"),
                is_remote=True,
                trace_flags=otel.TraceFlags(self._sampled),
            )
            attached = _attached_class()(parent)
            make_current(self._contexts, attached)
            self._attached[span.span_id] = attached
            if span.data.type == "generation":
                self._spans.calls[self._id_of(span).hex()] = []
            if self._over:  # Since the look above, on another thread.
                attached.qitos_ended = True
        except BaseException as error:  # noqa: BLE001
            contain("autolog_spans.enter", error)

    def leave(self, span: Any) -> None:
        """`span` has ended: MLflow's current span is again the one before it."""
        attached = self._attached.pop(span.span_id, None)
        if attached is None:
            return
        # It may be current on another thread or task than this one.
        attached.qitos_ended = True
        with shield("autolog_spans.leave"):
            if span.data.type == "generation":
                below = self._spans.calls.pop(self._id_of(span).hex(), ())
                if not getattr(span.data, "token_usage", None):  # It has no price itself.
                    for one in below:  # They have ended, but wait for MLflow's exporter.
                        one._span._attributes._dict.pop(COST, None)
            leave_ended(self._contexts)

    def end(self) -> dict[str, str]:
        """The trace has ended. Returns the tags that were set on it through MLflow."""
        self._over = True
        for attached in list(self._attached.values()):
            attached.qitos_ended = True
        self._attached.clear()
        tags: dict[str, str] = {}
        with shield("autolog_spans.end"):
            if self._contexts is not None and self._sampled:
                sys.modules["mlflow.tracing.fluent"]._set_last_active_trace_id(self._trace_id)
            if not self._known_until_s:
                return tags
            self._spans = _Spans()  # A trace that has ended is remembered for long.
            with trace_manager().get_trace(self._trace_id) as trace:
                if trace is None:
                    return tags
                given = dict(trace.info.tags)
                spans = list(trace.span_dict.values())
            tags = {key: str(tag) for key, tag in given.items() if not key.startswith("mlflow.")}
            if not spans:
                trace_manager().pop_trace(self._otel_trace_id)
            elif all(span.end_time_ns for span in spans):
                # Its exporter looks the spans up there, some seconds after they have ended.
                # At the interpreter's exit no thread starts, and all is forgotten.
                with suppress(RuntimeError, MemoryError):
                    OwnThread("qitos-mlflow-autolog", self._forget).start()
        return tags

    @cached_property
    def _otel_trace_id(self) -> int:
        return int.from_bytes(otel_trace_id(self._qitos_trace_id), "big")

    @cached_property
    def _trace_id(self) -> str:
        return trace_id(self._qitos_trace_id)

    def _id_of(self, span: Any) -> bytes:
        return span_id(self._qitos_trace_id, str(span.span_id))

    def _is_possible(self) -> bool:
        if self._over:
            return False
        if self._contexts is None:
            if mlflow_in_use() is None:
                return False
            if not same_place(self._uri):
                self._over = True
                return False
            self._contexts = sys.modules["mlflow.tracing.provider"].get_context_api()
        if not self._sampled:
            return True
        if self._run.out_of_reach():
            return False
        if time.monotonic() >= self._known_until_s:
            self._make_known()
            self._known_until_s = time.monotonic() + RENEW_S
        return True

    def _make_known(self) -> None:
        """Register the trace with MLflow, which drops spans of unknown traces."""
        manager = trace_manager()
        with manager.get_trace(self._trace_id) as trace:  # With the manager's lock.
            if trace is not None:  # For another hour, without the spans that it has sent.
                sent_ns = time.time_ns() - int(RENEW_S * 1e9)
                for key, span in list(trace.span_dict.items()):
                    if span.end_time_ns and span.end_time_ns < sent_ns:
                        del trace.span_dict[key]
                renew(manager, self._trace_id, trace)
                return
        entities: Any = sys.modules["mlflow.entities"]
        ref = self._run.ref
        location = entities.TraceLocation
        info = entities.TraceInfo(
            trace_id=self._trace_id,
            trace_location=location.from_experiment_id(ref.experiment_id) if ref else None,
            request_time=0,
            state=entities.TraceState.IN_PROGRESS,
            # MLflow reads the trace from the tracking store, also in this process.
            tags={"mlflow.trace.spansLocation": "TRACKING_STORE"},
        )
        manager.register_trace(self._otel_trace_id, info, is_remote_trace=True)
        with manager.get_trace(self._trace_id) as trace:
            trace.span_dict = self._spans

    def _forget(self) -> None:
        with shield("autolog_spans.forget"):
            flush_spans(FLUSH_MS)
            trace_manager().pop_trace(self._otel_trace_id)


@lru_cache(maxsize=1)
def _attached_class() -> Any:
    """The class that represents a QitOS span in MLflow's contexts."""
    from opentelemetry import trace as otel

    class AttachedSpan(otel.NonRecordingSpan):
        """A remote parent, without effect once it has ended.

        The contexts of other threads and tasks keep it, and MLflow drops every span whose parent
        belongs to a trace that it has forgotten.
        """

        qitos_outer: Any = None
        qitos_ended = False

        def get_span_context(self) -> Any:
            if self.qitos_ended:
                return self.qitos_outer.get_span_context()
            return super().get_span_context()

    return AttachedSpan
