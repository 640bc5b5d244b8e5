"""The tracing API of the host, the QitOS that is installed: its own where it has one, else ours.

Receives what the bridge and the user's code trace; hands it on to the processors. Which of the
two it is, is settled when a name is first used, and `host_has_tracing` tells. Beside the host's
names there are a few helpers of ours, the same on any host. Nothing here knows of MLflow or of
plugins.

Not before a name is used, because settling it may import qitos, and that import may lead back
here: the start-up line loads plugins as soon as qitos is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qitos_mlflow.tracing import _host
from qitos_mlflow.tracing.access import content_allowed as content_allowed
from qitos_mlflow.tracing.access import processors as processors
from qitos_mlflow.tracing.access import remove_trace_processor as remove_trace_processor
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

    host_has_tracing: bool
    """Whether these names are the host's own."""
else:

    def __getattr__(name: str) -> Any:
        if name != "host_has_tracing" and name not in _host.NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        settled = _host.settle()
        globals().update(settled)
        return settled[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_host.NAMES, "host_has_tracing"})
