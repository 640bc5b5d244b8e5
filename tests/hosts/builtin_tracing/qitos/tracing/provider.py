"""Makes traces; without data, redacts ends only (FLAW)."""

import uuid

from qitos.tracing.config import RedactingSpanData, TracingMode
from qitos.tracing.models import NoOpTrace, Span, Trace
from qitos.tracing.processor import SynchronousMultiTraceProcessor, TraceProcessor


class TracingProvider:
    def __init__(self, processors=None, mode=TracingMode.ENABLED):
        self._multi_processor = SynchronousMultiTraceProcessor(processors)
        self._mode = mode

    @property
    def mode(self):
        return self._mode

    def set_mode(self, mode):
        self._mode = mode

    def set_processors(self, processors):
        self._multi_processor = SynchronousMultiTraceProcessor(processors)

    def add_processor(self, processor):
        self._multi_processor.add_processor(processor)

    def create_trace(self, name, group_id=None, metadata=None, trace_id=None):
        if self._mode == TracingMode.DISABLED:
            return NoOpTrace()
        through = self._multi_processor
        if self._mode == TracingMode.ENABLED_WITHOUT_DATA:
            through = _RedactingProcessor(through)
        return Trace(trace_id or self.gen_trace_id(), name, group_id, metadata, through)

    @staticmethod
    def gen_trace_id():
        return str(uuid.uuid4())

    @staticmethod
    def gen_span_id():
        return str(uuid.uuid4())

    def shutdown(self):
        self._multi_processor.shutdown()

    def force_flush(self):
        self._multi_processor.force_flush()


class _RedactingProcessor(TraceProcessor):
    def __init__(self, inner):
        self._inner = inner

    def on_trace_start(self, trace):
        self._inner.on_trace_start(trace)

    def on_span_start(self, span):
        self._inner.on_span_start(span)

    def on_span_end(self, span):
        self._inner.on_span_end(_without_data(span))

    def on_trace_end(self, trace):
        other = Trace(trace.trace_id, trace.name, trace.group_id, trace.metadata)
        other._spans = [_without_data(span) for span in trace._spans]
        self._inner.on_trace_end(other)


def _without_data(span):
    other = Span(span.trace_id, span.span_id, RedactingSpanData(span.data), span.parent_span_id)
    for name in ("started_at", "ended_at", "error", "output"):
        setattr(other, name, getattr(span, name))
    return other
