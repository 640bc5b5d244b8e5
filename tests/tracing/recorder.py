"""A processor that keeps what it is told."""

from __future__ import annotations

import threading
from typing import Any

from qitos_mlflow.tracing import Span, Trace, TraceProcessor


class Recorder(TraceProcessor):
    """`events` has (event, object) in order; `span_ends` the ended spans by id."""

    def __init__(self, log: list[Any] | None = None) -> None:
        self.events: list[tuple[str, Any]] = [] if log is None else log
        self.ended = threading.Event()

    def on_trace_start(self, trace: Trace) -> None:
        self.events.append(("trace_start", trace))

    def on_trace_end(self, trace: Trace) -> None:
        self.events.append(("trace_end", trace))
        self.ended.set()

    def on_span_start(self, span: Span) -> None:
        self.events.append(("span_start", span))

    def on_span_end(self, span: Span) -> None:
        self.events.append(("span_end", span))

    def of(self, event: str) -> list[Any]:
        return [item for name, item in self.events if name == event]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


class Failing(TraceProcessor):
    """Raises in every method."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_trace_start(self, trace: Trace) -> None:
        raise self.error

    def on_trace_end(self, trace: Trace) -> None:
        raise self.error

    def on_span_start(self, span: Span) -> None:
        raise self.error

    def on_span_end(self, span: Span) -> None:
        raise self.error

    def shutdown(self) -> None:
        raise self.error

    def force_flush(self) -> bool:
        raise self.error
