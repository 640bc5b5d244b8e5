"""Processors that pass every start and end on to several others, or to none."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, cast

from qitos_mlflow._guard import contain, shield
from qitos_mlflow.tracing.models import TraceProcessor


def _to_each(event: str) -> Any:
    """A method that calls the method `event` of each processor, whatever the others raise."""

    def method(self: SynchronousMultiTraceProcessor, item: Any) -> None:
        for processor in self._processors:
            try:
                getattr(processor, event)(item)
            except BaseException as error:  # noqa: BLE001 - other code, on the agent's thread
                contain(_name(processor, event), error)

    method.__name__ = event
    method.__doc__ = f"Call ``{event}`` of each processor."
    return method


class SynchronousMultiTraceProcessor(TraceProcessor):
    """Passes each event to each of its processors, in order, whatever the others do.

    Any thread may add, remove and pass on at the same time: an event goes to the processors that
    there were when it began. No event takes a lock. What a processor raises is kept from the
    caller and from the other processors, and logged at most once a minute.
    """

    def __init__(self, processors: Iterable[TraceProcessor] | None = None) -> None:
        self._processors: tuple[TraceProcessor, ...] = tuple(processors or ())
        self._changing = threading.Lock()

    @property
    def processors(self) -> list[TraceProcessor]:
        """A new list of them, in order."""
        return list(self._processors)

    def add_processor(self, processor: TraceProcessor) -> None:
        """Pass events to `processor` too, last, from now on."""
        with self._changing:
            self._processors = (*self._processors, processor)

    def remove_processor(self, processor: TraceProcessor) -> None:
        """Pass no more events to `processor`; one that is not here is no error."""
        with self._changing:
            self._processors = tuple(p for p in self._processors if p is not processor)

    on_trace_start = _to_each("on_trace_start")
    on_trace_end = _to_each("on_trace_end")
    on_span_start = _to_each("on_span_start")
    on_span_end = _to_each("on_span_end")

    def shutdown(self) -> None:
        """Shut each down."""
        for processor in self._processors:
            with shield(_name(processor, "shutdown")):
                processor.shutdown()

    def force_flush(self) -> bool:
        """Flush each, also after one failed; True when every one returned True or None."""
        flushed = True
        for processor in self._processors:
            done = False
            with shield(_name(processor, "force_flush")):
                done = processor.force_flush() in (True, None)
            flushed = done and flushed
        return flushed


class NoOpTraceProcessor(TraceProcessor):
    """Does nothing with any event."""

    def _nothing(self, item: Any) -> Any:
        """Nothing."""

    on_trace_start = on_trace_end = on_span_start = on_span_end = cast(Any, _nothing)


def _name(processor: TraceProcessor, method: str) -> str:
    return f"{type(processor).__qualname__}.{method}"
