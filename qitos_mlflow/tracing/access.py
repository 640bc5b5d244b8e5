"""Looks into the global provider and its traces, where a host has no API for what is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import qitos_mlflow.tracing as tracing

if TYPE_CHECKING:
    from qitos_mlflow.tracing import NoOpSpan, NoOpTrace, Span, Trace, TraceProcessor


def processors() -> tuple[TraceProcessor, ...]:
    """What is attached to the global provider now, in order. Any thread; never blocks."""
    provider = tracing.get_tracing_provider()
    holder = getattr(provider, "_multi_processor", provider)
    return tuple(getattr(holder, "processors", ()))


def remove_trace_processor(processor: TraceProcessor) -> None:
    """Have `processor` told no more; the others stay. One that is not attached is no error.

    Traces under way stop telling it too. Any thread; never blocks.
    """
    provider = tracing.get_tracing_provider()
    if hasattr(provider, "remove_processor"):
        provider.remove_processor(processor)
        return
    holder = getattr(provider, "_multi_processor", None)
    old = getattr(holder, "_processors", None)
    if holder is None or not isinstance(old, list):
        return
    # A new list: another thread may be going through the old one, and would skip a neighbour.
    length = len(old)
    new = [other for other in old if other is not processor]
    holder._processors = new
    new.extend(old[length:])  # Added by another thread meanwhile.


def content_allowed(trace_or_span: Trace | Span | NoOpTrace | NoOpSpan) -> bool:
    """False when the trace was made under `ENABLED_WITHOUT_DATA`. Any thread; never blocks.

    A host keeps no record of the mode; what it does keep is looked at instead, and where that
    tells nothing (an object built by hand), the provider's present mode decides.
    """
    mode = getattr(trace_or_span, "mode", None)
    if mode is None:
        evidence = _evidence_of_content(trace_or_span)
        if evidence is not None:
            return evidence
        mode = tracing.get_tracing_provider().mode
    return mode != tracing.TracingMode.ENABLED_WITHOUT_DATA


def _evidence_of_content(item: object) -> bool | None:
    """What a host's trace or span gives away: redacted data, or what its events go through."""
    spans = getattr(item, "_spans", None) or [item]
    if any(isinstance(getattr(span, "data", None), tracing.RedactingSpanData) for span in spans):
        return False
    through = getattr(item, "_processor", None)
    if through is None:
        return None
    if isinstance(through, tracing.SynchronousMultiTraceProcessor):
        return True
    return False if "redact" in type(through).__name__.lower() else None
