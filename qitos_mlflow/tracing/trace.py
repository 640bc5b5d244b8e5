"""Traces: each makes the spans of one run, and hands its start and its end on to a processor.

The parent of a new span is, unless given, the innermost open span of the same trace in this
context. So a span that was finished, or belongs to another trace, is never a parent by accident.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Protocol

from qitos_mlflow._guard import in_words
from qitos_mlflow.tracing.config import TracingMode
from qitos_mlflow.tracing.span import (
    NOT_FINISHED,
    NoOpSpan,
    Span,
    _SpanListener,
    new_id,
    open_spans,
    unfinished,
)
from qitos_mlflow.tracing.span_data import SpanData, SpanType


class _TraceListener(_SpanListener, Protocol):
    """What a trace and its spans need of a `TraceProcessor`."""

    def on_trace_start(self, trace: Trace) -> None: ...

    def on_trace_end(self, trace: Trace) -> None: ...


class Trace:
    """One run's tree of spans, for a ``with`` block. Entering and leaving notify the processors.

    `metadata` is the trace's own dict: what is put there before the end is there at the end.
    `error` is the exception that left the ``with`` block; it is set before the processors are
    notified.
    """

    def __init__(
        self,
        trace_id: str,
        name: str,
        group_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        processor: _TraceListener | None = None,
        *,
        mode: TracingMode = TracingMode.ENABLED,
    ) -> None:
        self.trace_id = trace_id
        self.name = name
        self.group_id = group_id
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.mode = mode
        self.error: BaseException | None = None
        self._processor = processor
        self._spans: list[Span] = []
        self._unstarted = [True]
        self._unended = [True]

    def __enter__(self) -> Trace:
        if self._unstarted:
            self._unstarted.pop()
            if self._processor is not None:
                self._processor.on_trace_start(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            self._unended.pop()
        except IndexError:
            return
        self.error = exc_val
        self._close_open_spans()
        if self._processor is not None:
            self._processor.on_trace_end(self)

    def create_span(
        self,
        span_type: SpanType,
        data: SpanData,
        span_id: str | None = None,
        parent: Span | str | None = None,
    ) -> Span:
        """A new span of this trace, not yet started. Any thread.

        Args:
            span_type: the kind; ignored, because `data` has it.
            data: what the span is about.
            span_id: its id; None for a new one.
            parent: the span (or its id) it is part of; None for the current span of this trace
                in this context, if any. A span of another trace is no parent.
        """
        if parent is None:
            parent = self._current_span()
        if isinstance(parent, Span):
            parent_id = parent.span_id if parent.trace_id == self.trace_id else None
        else:
            parent_id = parent if isinstance(parent, str) else None
        span = Span(
            self.trace_id,
            span_id or new_id(),
            data,
            parent_id,
            self._processor,
            mode=self.mode,
        )
        self._spans.append(span)
        return span

    @property
    def spans(self) -> list[Span]:
        """A new list of the spans created so far, in that order."""
        return list(self._spans)

    def export(self) -> dict[str, Any]:
        """A new dict of what is known, spans exported; values are the live ones."""
        return {
            "trace_id": self.trace_id,
            "name": self.name,
            "group_id": self.group_id,
            "metadata": self.metadata,
            "spans": [span.export() for span in self.spans],
        }

    def _current_span(self) -> Span | None:
        for span in reversed(open_spans.get()):
            if span.trace_id == self.trace_id and span._unfinished:
                return span
        return None

    def _close_open_spans(self) -> None:
        """Finish what is open, innermost first, but leave what still runs on another thread.

        That thread will finish the span, which is delivered then, after its trace.
        """
        here = threading.get_ident()
        elsewhere = {thread.ident for thread in threading.enumerate()} - {here}
        error: str = NOT_FINISHED
        if self.error is not None:
            error = f"{NOT_FINISHED} with {in_words(self.error)}"
        for span in reversed(self.spans):
            started = span._thread_id is not None
            if started and span._unfinished and span._thread_id not in elsewhere:
                span.exception = self.error
                span.finish(error)
        # Spans finished on another thread are still in this context, and would stay in memory.
        open_spans.set(unfinished(open_spans.get()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processor": None}

    def __repr__(self) -> str:
        return f"<Trace {self.name!r} {self.trace_id}, {len(self._spans)} spans>"


class NoOpTrace:
    """Stands for a trace where tracing is off; `metadata` is its own, so that writing is safe."""

    def __init__(self) -> None:
        self.trace_id = ""
        self.name = ""
        self.group_id: str | None = None
        self.metadata: dict[str, Any] = {}
        self.mode = TracingMode.DISABLED
        self.error: BaseException | None = None

    def __enter__(self) -> NoOpTrace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def create_span(
        self,
        span_type: SpanType,
        data: SpanData,
        span_id: str | None = None,
        parent: Span | NoOpSpan | str | None = None,
    ) -> NoOpSpan:
        """A span that does nothing, and has `data` for those who add to it."""
        span = NoOpSpan()
        span.data = data
        return span

    @property
    def spans(self) -> list[Span]:
        """An empty list."""
        return []

    def export(self) -> dict[str, Any]:
        """An empty dict."""
        return {}
