"""Tracing of the host's own; like the real one's, its package lacks most names of its modules."""

from qitos.tracing.config import TracingMode
from qitos.tracing.mlflow_processor import MlflowTraceProcessor
from qitos.tracing.models import Span, SpanData, SpanType, Trace
from qitos.tracing.processor import TraceProcessor
from qitos.tracing.provider import TracingProvider

__all__ = [
    "MlflowTraceProcessor",
    "Span",
    "SpanData",
    "SpanType",
    "Trace",
    "TraceProcessor",
    "TracingMode",
    "TracingProvider",
    "add_trace_processor",
    "create_trace",
    "get_tracing_provider",
    "set_trace_processors",
    "set_tracing_disabled",
    "set_tracing_mode",
]

the_provider = TracingProvider()


def get_tracing_provider():
    return the_provider


def add_trace_processor(processor):
    the_provider.add_processor(processor)


def set_trace_processors(processors):
    the_provider.set_processors(processors)


def set_tracing_mode(mode):
    the_provider.set_mode(mode)


def set_tracing_disabled(disabled):
    the_provider.set_mode(TracingMode.DISABLED if disabled else TracingMode.ENABLED)


def create_trace(name, group_id=None, metadata=None):
    return the_provider.create_trace(name, group_id=group_id, metadata=metadata)
