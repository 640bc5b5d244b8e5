"""The tracing API of the host: its own `qitos.tracing` where it has one, else ours.

Receives what the bridge and the user's code trace; hands it on to the processors. Which of the
two it is, is settled when this package is first imported, and `host_has_tracing` tells. Beside
the host's names there are a few helpers of ours, the same on any host. Nothing here knows of
MLflow or of plugins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qitos_mlflow.tracing import _host
from qitos_mlflow.tracing import config as _config
from qitos_mlflow.tracing import models as _models
from qitos_mlflow.tracing import processor as _processor
from qitos_mlflow.tracing import provider as _provider
from qitos_mlflow.tracing.redaction import REDACTED as REDACTED
from qitos_mlflow.tracing.redaction import STRUCTURAL_FIELDS as STRUCTURAL_FIELDS
from qitos_mlflow.tracing.redaction import STRUCTURAL_METADATA as STRUCTURAL_METADATA
from qitos_mlflow.tracing.redaction import redacted_export as redacted_export
from qitos_mlflow.tracing.redaction import redacted_metadata as redacted_metadata

if TYPE_CHECKING:
    from qitos_mlflow.tracing.config import RedactingSpanData as RedactingSpanData
    from qitos_mlflow.tracing.config import TracingMode as TracingMode
    from qitos_mlflow.tracing.models import ActSpanData as ActSpanData
    from qitos_mlflow.tracing.models import AgentSpanData as AgentSpanData
    from qitos_mlflow.tracing.models import CriticSpanData as CriticSpanData
    from qitos_mlflow.tracing.models import CustomSpanData as CustomSpanData
    from qitos_mlflow.tracing.models import DecideSpanData as DecideSpanData
    from qitos_mlflow.tracing.models import GenerationSpanData as GenerationSpanData
    from qitos_mlflow.tracing.models import HandoffSpanData as HandoffSpanData
    from qitos_mlflow.tracing.models import MCPSpanData as MCPSpanData
    from qitos_mlflow.tracing.models import NoOpSpan as NoOpSpan
    from qitos_mlflow.tracing.models import NoOpTrace as NoOpTrace
    from qitos_mlflow.tracing.models import ReduceSpanData as ReduceSpanData
    from qitos_mlflow.tracing.models import Span as Span
    from qitos_mlflow.tracing.models import SpanData as SpanData
    from qitos_mlflow.tracing.models import SpanType as SpanType
    from qitos_mlflow.tracing.models import StepSpanData as StepSpanData
    from qitos_mlflow.tracing.models import ToolSpanData as ToolSpanData
    from qitos_mlflow.tracing.models import Trace as Trace
    from qitos_mlflow.tracing.processor import NoOpTraceProcessor as NoOpTraceProcessor
    from qitos_mlflow.tracing.processor import (
        SynchronousMultiTraceProcessor as SynchronousMultiTraceProcessor,
    )
    from qitos_mlflow.tracing.processor import TraceProcessor as TraceProcessor
    from qitos_mlflow.tracing.provider import TracingProvider as TracingProvider
    from qitos_mlflow.tracing.provider import add_trace_processor as add_trace_processor
    from qitos_mlflow.tracing.provider import create_trace as create_trace
    from qitos_mlflow.tracing.provider import get_tracing_provider as get_tracing_provider
    from qitos_mlflow.tracing.provider import set_trace_processors as set_trace_processors
    from qitos_mlflow.tracing.provider import set_tracing_disabled as set_tracing_disabled
    from qitos_mlflow.tracing.provider import set_tracing_mode as set_tracing_mode

_of_host = _host.load()

host_has_tracing: bool = _of_host is not None
"""Whether these names are the host's own."""

for _home in (_config, _models, _processor, _provider):
    for _names in _host.SURFACE.values():
        # A name that the host lacks, such as a kind of span it does not know, is ours.
        globals().update({name: getattr(_home, name) for name in _names if hasattr(_home, name)})
globals().update(_of_host or {})


def processors() -> tuple[TraceProcessor, ...]:
    """What is attached to the global provider now, in order. Any thread; never blocks."""
    provider = get_tracing_provider()
    holder = getattr(provider, "_multi_processor", provider)
    return tuple(getattr(holder, "processors", ()))


def remove_trace_processor(processor: TraceProcessor) -> None:
    """Have `processor` told no more; the others stay. One that is not attached is no error.

    Traces under way stop telling it too. Any thread; never blocks.
    """
    provider = get_tracing_provider()
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
        mode = get_tracing_provider().mode
    return mode != TracingMode.ENABLED_WITHOUT_DATA


def _evidence_of_content(item: object) -> bool | None:
    """What a host's trace or span gives away: redacted data, or what its events go through."""
    spans = getattr(item, "_spans", None) or [item]
    if any(isinstance(getattr(span, "data", None), RedactingSpanData) for span in spans):
        return False
    through = getattr(item, "_processor", None)
    if through is None:
        return None
    if isinstance(through, SynchronousMultiTraceProcessor):
        return True
    return False if "redact" in type(through).__name__.lower() else None
