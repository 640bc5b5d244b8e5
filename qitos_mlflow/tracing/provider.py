"""Where traces are made: the provider holds the processors and the mode, and there is one for all.

A trace keeps the processors and the mode it was made with; `add_processor` and
`remove_processor` change them for traces under way too, `set_processors` only for later ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow.tracing.config import RedactingSpanData, TracingMode
from qitos_mlflow.tracing.processor import SynchronousMultiTraceProcessor, TraceProcessor
from qitos_mlflow.tracing.redaction import REDACTED, redacted_exception, redacted_metadata
from qitos_mlflow.tracing.span import Span, new_id
from qitos_mlflow.tracing.trace import NoOpTrace, Trace


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
        """Have traces made from now on tell `processors` only; earlier ones keep theirs."""
        self._multi_processor = SynchronousMultiTraceProcessor(processors)

    def add_processor(self, processor: TraceProcessor) -> None:
        """Have `processor` told too, last."""
        self._multi_processor.add_processor(processor)

    def remove_processor(self, processor: TraceProcessor) -> None:
        """Have `processor` told no more; the others stay, one that is not here is no error."""
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
        """Turn tracing off, or back on in the mode it last had: turning on never adds content."""
        self.set_mode(TracingMode.DISABLED if disabled else self._mode_when_on)

    def create_trace(
        self,
        name: str,
        group_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        trace_id: str | None = None,
    ) -> Trace | NoOpTrace:
        """A trace to be entered with ``with``; one that does nothing when tracing is disabled.

        Args:
            name: what the run is called.
            group_id: what it belongs to, such as a benchmark; None for nothing.
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

    @staticmethod
    def gen_trace_id() -> str:
        """A new id, a UUID with hyphens."""
        return new_id()

    @staticmethod
    def gen_span_id() -> str:
        """A new id, a UUID with hyphens."""
        return new_id()

    def shutdown(self) -> None:
        """Shut every processor down; may wait as long as they do."""
        self._multi_processor.shutdown()

    def force_flush(self) -> bool:
        """Flush every processor; True when none said otherwise. May wait as long as they do."""
        return self._multi_processor.force_flush()


class _RedactingProcessor(TraceProcessor):
    """Tells another processor the same, in copies without content."""

    def __init__(self, delegate: TraceProcessor) -> None:
        self._delegate = delegate

    def on_trace_start(self, trace: Trace) -> None:
        try:
            self._delegate.on_trace_start(_redacted_trace(trace))
        except Exception as error:  # noqa: BLE001 - rather lost than told in full, or raised
            _guard.report("tracing.redaction", error)

    def on_trace_end(self, trace: Trace) -> None:
        try:
            self._delegate.on_trace_end(_redacted_trace(trace))
        except Exception as error:  # noqa: BLE001
            _guard.report("tracing.redaction", error)

    def on_span_start(self, span: Span) -> None:
        try:
            self._delegate.on_span_start(_redacted_span(span))
        except Exception as error:  # noqa: BLE001
            _guard.report("tracing.redaction", error)

    def on_span_end(self, span: Span) -> None:
        try:
            self._delegate.on_span_end(_redacted_span(span))
        except Exception as error:  # noqa: BLE001
            _guard.report("tracing.redaction", error)


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
    copy = Trace(trace.trace_id, trace.name, trace.group_id, metadata, mode=trace.mode)
    copy._spans = [_redacted_span(span) for span in trace.spans]
    if trace.error is not None:
        copy.error = redacted_exception(trace.error)
    return copy


_provider = TracingProvider()


def get_tracing_provider() -> TracingProvider:
    """The one provider that everything global goes through."""
    return _provider


def set_trace_processors(processors: list[TraceProcessor]) -> None:
    """Replace the global provider's processors; traces under way keep theirs."""
    _provider.set_processors(processors)


def add_trace_processor(processor: TraceProcessor) -> None:
    """Have `processor` told of every trace, after those already there."""
    _provider.add_processor(processor)


def set_tracing_mode(mode: TracingMode) -> None:
    """Set the global mode, for traces made from now on."""
    _provider.set_mode(mode)


def set_tracing_disabled(disabled: bool) -> None:
    """Turn tracing off, or back on in the mode it last had, for traces made from now on."""
    _provider.set_disabled(disabled)


def create_trace(
    name: str, group_id: str | None = None, metadata: dict[str, Any] | None = None
) -> Trace | NoOpTrace:
    """A trace of the global provider; see `TracingProvider.create_trace`."""
    return _provider.create_trace(name, group_id=group_id, metadata=metadata)
