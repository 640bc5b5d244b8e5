"""MLflow's spans as its tracer keeps them: the current one of a thread, and those of each trace.

mlflow is never imported here.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow._threads import OwnThread

RENEW_S = 60.0
"""How often an open trace is registered with MLflow, which forgets it after an hour (seconds). Far
longer than the 5 s that MLflow's exporter, which looks spans up there, waits for more."""


def make_current(contexts: Any, span: Any) -> None:
    """Make one of our spans MLflow's current one on this thread, until `qitos_ended` is set."""
    from opentelemetry import trace as otel

    context = contexts.get_current()
    span.qitos_outer, span.qitos_ended = _going(otel.get_current_span(context)), False
    contexts.attach(otel.set_span_in_context(span, context))


def leave_ended(contexts: Any) -> None:
    """Make the innermost span that has not ended MLflow's current one on this thread."""
    from opentelemetry import trace as otel

    context = contexts.get_current()
    current = otel.get_current_span(context)
    going = _going(current)
    if going is not current:
        contexts.attach(otel.set_span_in_context(going, context))


def _going(span: Any) -> Any:
    """`span`; if it is one of ours that has ended, the span that was current outside of it."""
    while getattr(span, "qitos_ended", False):
        span = span.qitos_outer
    return span


def flush_spans(timeout_ms: int) -> None:
    """Have MLflow's exporter take what has ended; it sends that afterwards."""
    provider = sys.modules["mlflow.tracing.provider"].provider.get()
    if hasattr(provider, "force_flush"):
        provider.force_flush(timeout_ms)


def flush_in_time(timeout_s: float) -> None:
    """As `flush_spans`, and wait for it at most so long (seconds).

    OpenTelemetry sends on the thread that flushes, and knows no time limit (1.45).
    """

    def flush() -> None:
        with shield("mlflow_spans.flush"):
            flush_spans(int(timeout_s * 1000))

    flushing = OwnThread("qitos-mlflow-flush", flush)
    with suppress(RuntimeError, MemoryError):  # Without a thread, MLflow's own sends them later.
        flushing.start()
        flushing.join(timeout_s)


def renew(manager: Any, trace_id: str, trace: Any) -> None:
    """Have MLflow's manager keep a trace for another hour; with its lock."""
    if (traces := getattr(manager, "_traces", None)) is not None:
        traces.pop(trace_id, None)  # Not all its caches renew what is there.
        traces[trace_id] = trace


def trace_manager() -> Any:
    """What keeps the traces that MLflow's tracer is making."""
    return sys.modules["mlflow.tracing.trace_manager"].InMemoryTraceManager.get_instance()


def is_below(spans: Any, span: Any, above: Any) -> bool:
    """Whether a span is within the subtree of another one; `spans`: all of the trace, by id."""
    parent = span.parent_id
    while parent in spans and parent != above.span_id:
        parent = spans[parent].parent_id
    return bool(parent == above.span_id)
