"""Makes traces: a provider has the processors and the mode. One provider is the global one.

A trace keeps the processors and the mode it was made with. `add_processor` and
`remove_processor` change the processors of open traces too, `set_processors` only of later ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow.tracing.models import Span, Trace, TraceProcessor, TracingMode, new_id
from qitos_mlflow.tracing.processor import SynchronousMultiTraceProcessor
from qitos_mlflow.tracing.redaction import (
    REDACTED,
    RedactingSpanData,
    redacted_exception,
    redacted_metadata,
)
from qitos_mlflow.tracing.span_data import SpanData, SpanType


class TracingProvider:
    """Makes traces for a set of processors. Every method may be called from any thread."""

    def __init__(
        self,
        processors: Iterable[TraceProcessor] | None = None,
        mode: TracingMode = TracingMode.ENABLED,
    ) -> None:
        self._multi_processor = SynchronousMultiTraceProcessor(processors)
        self._mode = self._mode_when_on = TracingMode.ENABLED
        self.set_mode(mode)

    @property
    def processors(self) -> list[TraceProcessor]:
        """A new list of the processors, in order."""
        return self._multi_processor.processors

    @property
    def mode(self) -> TracingMode:
        """The mode of the traces made from now on."""
        return self._mode

    def set_processors(self, processors: Iterable[TraceProcessor]) -> None:
        """Use `processors` for traces made from now on; earlier ones keep theirs."""
        self._multi_processor = SynchronousMultiTraceProcessor(processors)

    def add_processor(self, processor: TraceProcessor) -> None:
        """Notify `processor` too, after the others."""
        self._multi_processor.add_processor(processor)

    def remove_processor(self, processor: TraceProcessor) -> None:
        """Stop notifying `processor`; the others stay. One that is not here is no error."""
        self._multi_processor.remove_processor(processor)

    def set_mode(self, mode: TracingMode) -> None:
        """Use `mode` for traces made from now on.

        Raises:
            ValueError: `mode` is not a `TracingMode`, nor the value of one.
        """
        self._mode = TracingMode(mode)
        if self._mode is not TracingMode.DISABLED:
            self._mode_when_on = self._mode

    def set_disabled(self, disabled: bool) -> None:
        """Turn tracing off, or on in the mode it last had: turning it on never adds content."""
        self.set_mode(TracingMode.DISABLED if disabled else self._mode_when_on)

    def create_trace(
        self,
        name: str,
        group_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        trace_id: str | None = None,
    ) -> Trace:
        """A trace for a ``with`` block; one that does nothing if tracing is disabled.

        Args:
            name: of the run.
            group_id: a group that it belongs to, such as a benchmark; None: none.
            metadata: copied into the trace's own.
            trace_id: its id; None for a new one.
        """
        mode = self._mode
        if mode is TracingMode.DISABLED:
            return NoOpTrace()
        processor: TraceProcessor = self._multi_processor
        if mode is TracingMode.ENABLED_WITHOUT_DATA:
            processor = _RedactingProcessor(processor)
        trace_id = trace_id or self.gen_trace_id()
        return Trace(trace_id, name, group_id, metadata, processor, mode=mode)

    gen_trace_id = gen_span_id = staticmethod(new_id)

    def shutdown(self) -> None:
        """Shut every processor down; may wait as long as they do."""
        self._multi_processor.shutdown()

    def force_flush(self) -> bool:
        """Flush every processor; True unless one returns False. May wait as long as they do."""
        return self._multi_processor.force_flush()


def _redacting(event: str) -> Any:
    """A method that passes `event` on with a copy of the trace or span."""

    def method(self: _RedactingProcessor, item: Any) -> None:
        with shield("tracing.redaction"):
            copied = _redacted_trace(item) if isinstance(item, Trace) else _redacted_span(item)
            getattr(self._delegate, event)(copied)

    return method


class _RedactingProcessor(TraceProcessor):
    """Passes each event to another processor, with a copy without content.

    An event of which no copy can be made is lost: it is neither passed on in full nor raised.
    """

    def __init__(self, delegate: TraceProcessor) -> None:
        self._delegate = delegate

    on_trace_start = _redacting("on_trace_start")
    on_trace_end = _redacting("on_trace_end")
    on_span_start = _redacting("on_span_start")
    on_span_end = _redacting("on_span_end")


def _redacted_span(span: Span) -> Span:
    data: Any = RedactingSpanData(span.data)
    copy = Span(span.trace_id, span.span_id, data, span.parent_span_id, mode=span.mode)
    copy.started_at = span.started_at
    copy.ended_at = span.ended_at
    copy.error = None if span.error is None else REDACTED
    copy.output = None if span.output is None else REDACTED
    if span.exception is not None:
        copy.exception = redacted_exception(span.exception)
    return copy


def _redacted_trace(trace: Trace) -> Trace:
    metadata = redacted_metadata(trace.metadata)
    through = trace._processor  # From it a processor knows which others get the trace.
    copy = Trace(trace.trace_id, trace.name, trace.group_id, metadata, through, mode=trace.mode)
    copy._unstarted, copy._unended = [], []  # Entering and leaving a copy does nothing.
    copy._spans = [_redacted_span(span) for span in trace.spans]
    if trace.error is not None:
        copy.error = redacted_exception(trace.error)
    return copy


class NoOpSpan(Span):
    """Stands for a span where tracing is off: takes everything, does nothing."""

    def __init__(self, data: Any = None) -> None:
        super().__init__("", "", data, mode=TracingMode.DISABLED)
        self._unfinished.clear()  # So nothing starts or finishes it.

    def set_output(self, output: Any) -> None:
        """Nothing."""

    def export(self) -> dict[str, Any]:
        """An empty dict."""
        return {}


class NoOpTrace(Trace):
    """Stands for a trace where tracing is off; `metadata` is its own, so that writing is safe."""

    def __init__(self) -> None:
        super().__init__("", "", mode=TracingMode.DISABLED)
        self._unstarted.clear()
        self._unended.clear()

    def create_span(
        self,
        span_type: SpanType,
        data: SpanData,
        span_id: str | None = None,
        parent: Span | str | None = None,
    ) -> NoOpSpan:
        """A span that does nothing, and has `data` for those who add to it."""
        return NoOpSpan(data)

    def export(self) -> dict[str, Any]:
        """An empty dict."""
        return {}


_provider = TracingProvider()

set_trace_processors = _provider.set_processors
add_trace_processor = _provider.add_processor
set_tracing_mode = _provider.set_mode
set_tracing_disabled = _provider.set_disabled


def get_tracing_provider() -> TracingProvider:
    """The one provider that everything global goes through."""
    return _provider


def create_trace(
    name: str, group_id: str | None = None, metadata: dict[str, Any] | None = None
) -> Trace:
    """A trace of the global provider; see `TracingProvider.create_trace`."""
    return _provider.create_trace(name, group_id=group_id, metadata=metadata)
