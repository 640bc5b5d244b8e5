"""Makes MLflow's own spans children of the QitOS span in which they are made.

With `mlflow.openai.autolog()` and the like, a model call leaves a span of MLflow's tracer. While a
QitOS span is going, that span is what MLflow takes for its current one on this thread: a remote
parent, in the way of MLflow's distributed tracing. Nothing of MLflow is set up, cleared or
configured for it; its exporter sends its spans, with our trace's id.

A small, isolated step that may fail without consequence: then MLflow's spans are traces of their
own, as they are without us. mlflow is never imported here.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from qitos_mlflow._guard import report
from qitos_mlflow.mlflow_plugin.active_run import mlflow_in_use, same_place
from qitos_mlflow.mlflow_plugin.ids import otel_trace_id, span_id, trace_id
from qitos_mlflow.mlflow_plugin.pending_run import PendingRun

KNOWN_S = 600.0
"""How long MLflow is sure to remember a trace; it forgets after an hour."""

FLUSH_MS = 30_000
"""How long MLflow's exporter may take for its last spans of a trace, in the background."""


class Nesting:
    """What MLflow's tracer sees of one trace. Any thread; every method is total.

    Args:
        qitos_trace_id: the trace.
        run: its run; while its server is out of reach nothing is done.
        uri: where the trace goes; None for MLflow's default. MLflow's spans must go there too.
    """

    def __init__(self, qitos_trace_id: str, run: PendingRun, uri: str | None) -> None:
        self._qitos_trace_id = qitos_trace_id
        self._otel_trace_id = int.from_bytes(otel_trace_id(qitos_trace_id), "big")
        self._trace_id = trace_id(qitos_trace_id)
        self._run = run
        self._uri = uri
        self._attached: dict[str, tuple[int, Any]] = {}
        self._contexts: Any = None  # MLflow's, once it is in use.
        self._elsewhere = False
        self._known_until_s = 0.0

    def enter(self, span: Any) -> None:
        """`span` has started on this thread: MLflow's spans go below it from now on."""
        try:
            if not self._is_possible():
                return
            from opentelemetry import trace as otel

            parent = otel.SpanContext(
                trace_id=self._otel_trace_id,
                span_id=int.from_bytes(span_id(self._qitos_trace_id, str(span.span_id)), "big"),
                is_remote=True,
                trace_flags=otel.TraceFlags(otel.TraceFlags.SAMPLED),
            )
            current = self._contexts.get_current()
            context = otel.set_span_in_context(otel.NonRecordingSpan(parent), current)
            token = self._contexts.attach(context)
            self._attached[span.span_id] = (threading.get_ident(), token)
        except Exception as error:  # noqa: BLE001
            report("nesting.enter", error)

    def leave(self, span: Any) -> None:
        """`span` has ended: MLflow's current span is again what it was before."""
        attached = self._attached.pop(span.span_id, None)
        if attached is None:
            return
        thread, token = attached
        if thread != threading.get_ident():
            return
        try:
            self._contexts.detach(token)
        except ValueError:
            pass  # Ended in another task than it was started in, whose context it cannot reach.
        except Exception as error:  # noqa: BLE001
            report("nesting.leave", error)

    def end(self) -> dict[str, str]:
        """The trace is over. Returns the tags that were given to it through MLflow."""
        try:
            if not self._known_until_s:
                return {}
            with _manager().get_trace(self._trace_id) as trace:
                if trace is None:
                    return {}
                tags = dict(trace.info.tags)
                spans = list(trace.span_dict.values())
            if not spans:
                _manager().pop_trace(self._otel_trace_id)
            elif all(span.end_time_ns for span in spans):
                # Its exporter looks the spans up there, some seconds after they have ended.
                forget = threading.Thread(target=self._forget, daemon=True)
                forget.name = "qitos-mlflow-nesting"
                forget.start()
            return {key: str(tag) for key, tag in tags.items() if not key.startswith("mlflow.")}
        except Exception as error:  # noqa: BLE001
            report("nesting.end", error)
            return {}

    def _is_possible(self) -> bool:
        if self._contexts is None:
            if self._elsewhere or not mlflow_in_use():
                return False
            if not same_place(self._uri):
                self._elsewhere = True
                return False
            self._contexts = sys.modules["mlflow.tracing.provider"].get_context_api()
        if self._run.out_of_reach():
            return False
        if time.monotonic() >= self._known_until_s:
            self._make_known()
            self._known_until_s = time.monotonic() + KNOWN_S
        return True

    def _make_known(self) -> None:
        """Tell MLflow of the trace: it drops spans of those that it does not know."""
        with _manager().get_trace(self._trace_id) as trace:
            if trace is not None:
                return
        entities: Any = sys.modules["mlflow.entities"]
        ref = self._run.ref
        location = entities.TraceLocation
        info = entities.TraceInfo(
            trace_id=self._trace_id,
            trace_location=location.from_experiment_id(ref.experiment_id) if ref else None,
            request_time=0,
            state=entities.TraceState.IN_PROGRESS,
            # Whoever reads the trace in this process gets it from where it is.
            tags={"mlflow.trace.spansLocation": "TRACKING_STORE"},
        )
        _manager().register_trace(self._otel_trace_id, info, is_remote_trace=True)

    def _forget(self) -> None:
        try:
            provider = sys.modules["mlflow.tracing.provider"].provider.get()
            if hasattr(provider, "force_flush"):
                provider.force_flush(FLUSH_MS)
            _manager().pop_trace(self._otel_trace_id)
        except Exception as error:  # noqa: BLE001
            report("nesting.forget", error)


def _manager() -> Any:
    return sys.modules["mlflow.tracing.trace_manager"].InMemoryTraceManager.get_instance()
