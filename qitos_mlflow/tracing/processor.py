"""Processors hear of every start and end; `SynchronousMultiTraceProcessor` tells several."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable

from qitos_mlflow import _guard
from qitos_mlflow.tracing.span import Span
from qitos_mlflow.tracing.trace import Trace


class TraceProcessor(ABC):
    """Hears of traces and spans. Every method runs on the thread where the thing happens.

    That is the agent's thread: return within microseconds, and do slow work elsewhere. The objects
    are live; copy what is needed later.
    """

    @abstractmethod
    def on_trace_start(self, trace: Trace) -> None:
        """A trace was entered; it has no spans yet."""

    @abstractmethod
    def on_trace_end(self, trace: Trace) -> None:
        """A trace was left; `trace.error` is the exception that left it, if any."""

    @abstractmethod
    def on_span_start(self, span: Span) -> None:
        """A span was started; what it is about may not be known in full yet."""

    @abstractmethod
    def on_span_end(self, span: Span) -> None:
        """A span was finished; it is told of once, possibly after its trace."""

    def shutdown(self) -> None:  # noqa: B027 - most have nothing to close
        """No more is to come: deliver and close. May be called many times, from any thread."""

    def force_flush(self) -> bool | None:
        """Deliver everything heard so far; returns False when that was not possible in time."""
        return None


class SynchronousMultiTraceProcessor(TraceProcessor):
    """Tells each of its processors, in order, whatever the others do.

    Any thread may add, remove and tell at once: those who tell go through the tuple there was
    when they began. Telling takes no lock. A processor's `Exception` is kept from the caller and
    from the other processors, and logged at most once a minute.
    """

    def __init__(self, processors: Iterable[TraceProcessor] | None = None) -> None:
        self._processors: tuple[TraceProcessor, ...] = tuple(processors or ())
        self._changing = threading.Lock()

    @property
    def processors(self) -> list[TraceProcessor]:
        """A new list of them, in order."""
        return list(self._processors)

    def add_processor(self, processor: TraceProcessor) -> None:
        """Tell `processor` too, last, from now on."""
        with self._changing:
            self._processors = (*self._processors, processor)

    def remove_processor(self, processor: TraceProcessor) -> None:
        """Tell `processor` no more; one that is not here is no error."""
        with self._changing:
            self._processors = tuple(p for p in self._processors if p is not processor)

    def on_trace_start(self, trace: Trace) -> None:
        """Tell each."""
        for processor in self._processors:
            try:
                processor.on_trace_start(trace)
            except Exception as error:  # noqa: BLE001 - someone else's code, on the agent's thread
                _report(processor, "on_trace_start", error)

    def on_trace_end(self, trace: Trace) -> None:
        """Tell each."""
        for processor in self._processors:
            try:
                processor.on_trace_end(trace)
            except Exception as error:  # noqa: BLE001
                _report(processor, "on_trace_end", error)

    def on_span_start(self, span: Span) -> None:
        """Tell each."""
        for processor in self._processors:
            try:
                processor.on_span_start(span)
            except Exception as error:  # noqa: BLE001
                _report(processor, "on_span_start", error)

    def on_span_end(self, span: Span) -> None:
        """Tell each."""
        for processor in self._processors:
            try:
                processor.on_span_end(span)
            except Exception as error:  # noqa: BLE001
                _report(processor, "on_span_end", error)

    def shutdown(self) -> None:
        """Shut each down."""
        for processor in self._processors:
            try:
                processor.shutdown()
            except Exception as error:  # noqa: BLE001
                _report(processor, "shutdown", error)

    def force_flush(self) -> bool:
        """Flush each, also after one failed; True when every one returned True or None."""
        flushed = True
        for processor in self._processors:
            try:
                flushed = processor.force_flush() in (True, None) and flushed
            except Exception as error:  # noqa: BLE001
                _report(processor, "force_flush", error)
                flushed = False
        return flushed


class NoOpTraceProcessor(TraceProcessor):
    """Hears everything, does nothing."""

    def on_trace_start(self, trace: Trace) -> None:
        """Nothing."""

    def on_trace_end(self, trace: Trace) -> None:
        """Nothing."""

    def on_span_start(self, span: Span) -> None:
        """Nothing."""

    def on_span_end(self, span: Span) -> None:
        """Nothing."""


def _report(processor: TraceProcessor, method: str, error: Exception) -> None:
    _guard.report(f"{type(processor).__qualname__}.{method}", error)
