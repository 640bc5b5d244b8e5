"""Traces, their spans, and the base of processors: each start and end is handed on to one.

The parent of a new span is, unless given, the innermost open span of the same trace in this
context. So a span that was finished, or belongs to another trace, is never a parent by accident.

A context (of a thread or a task) knows the spans started in it, and in the context it was copied
from, as an immutable tuple, innermost last. A span finished on another thread, or out of order,
stays in the tuple until the next start or end in that context; it is never taken for an open one.
Nothing here blocks or takes a lock: what must happen once is a `list.pop`, which is atomic.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from contextvars import ContextVar
from datetime import datetime, timezone
from enum import Enum
from types import TracebackType
from typing import Any

from qitos_mlflow._guard import in_words
from qitos_mlflow.tracing.span_data import SpanData, SpanType

NOT_FINISHED = "not finished when its trace ended"
"""The error of a span that its trace had to close."""

_open_spans: ContextVar[tuple[Span, ...]] = ContextVar("qitos_mlflow_open_spans", default=())
"""The spans started in this context, innermost last; some may be finished, see `_still_open`."""


def _still_open(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    return tuple(span for span in spans if span._unfinished)


_second = (-1, "")


def _now() -> str:
    """The time in UTC to the microsecond, as ISO 8601.

    Twice a span, on the agent's thread: what stays the same for a second is written once
    (`datetime.isoformat` takes five times as long).
    """
    global _second
    second, rest_ns = divmod(time.time_ns(), 1_000_000_000)
    known, text = _second
    if second != known:
        text = datetime.fromtimestamp(second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        _second = (second, text)
    return f"{text}.{rest_ns // 1000:06d}+00:00"


def new_id() -> str:
    """A random UUID (version 4) with hyphens, in a third of the time `uuid.uuid4` takes."""
    h = os.urandom(16).hex()
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{_VARIANT[h[16]]}{h[17:20]}-{h[20:]}"


_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class TracingMode(str, Enum):
    """Everything, structure and numbers without content, or nothing at all."""

    ENABLED = "enabled"
    ENABLED_WITHOUT_DATA = "enabled_without_data"
    DISABLED = "disabled"


class TraceProcessor(ABC):
    """Gets the events of traces and spans, each on the thread on which it happens.

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
        """A span was started; its data may be incomplete."""

    @abstractmethod
    def on_span_end(self, span: Span) -> None:
        """A span was finished; called once for a span, possibly after the end of its trace."""

    def shutdown(self) -> None:  # noqa: B027 - most have nothing to close
        """Deliver and close: no event follows. May be called many times, from any thread."""

    def force_flush(self) -> bool | None:
        """Deliver all events so far; returns False if that was not possible in time."""
        return None


class Span:
    """One timed step of a trace; made by `Trace.create_span`, then started and finished once.

    `started_at` and `ended_at` are ISO 8601 texts, UTC, with microseconds. A copied or pickled
    span is a snapshot: it has no processor.
    """

    def __init__(
        self,
        trace_id: str,
        span_id: str,
        data: SpanData,
        parent_span_id: str | None = None,
        processor: TraceProcessor | None = None,
        *,
        mode: TracingMode = TracingMode.ENABLED,
    ) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_span_id = parent_span_id
        self.data = data
        self.mode = mode
        self.started_at: str | None = None
        self.ended_at: str | None = None
        self.error: str | None = None
        self.exception: BaseException | None = None
        self.output: Any = None
        self._processor = processor
        self._thread_id: int | None = None  # That started it; None before.
        self._unfinished = [True]

    def start(self) -> Span:
        """Take the time, become the current span of this context, notify the processor.

        Any thread. A span already started or finished stays as it is.
        """
        if self._thread_id is None and self._unfinished:
            self._thread_id = threading.get_ident()
            self.started_at = _now()
            _open_spans.set((*_still_open(_open_spans.get()), self))
            if self._processor is not None:
                self._processor.on_span_start(self)
        return self

    def finish(self, error: str | BaseException | None = None) -> None:
        """Take the time, record `error`, notify the processor; only the first call counts.

        Args:
            error: why the step failed, in words or as the exception itself; None for no change.

        Any thread.
        """
        try:
            self._unfinished.pop()
        except IndexError:
            return
        self.ended_at = _now()
        if self.started_at is None:
            self.started_at = self.ended_at
        if isinstance(error, BaseException):
            self.exception = error
            self.error = in_words(error)
        elif error is not None:
            self.error = error
        spans = _open_spans.get()
        if self in spans:
            _open_spans.set(_still_open(spans))
        if self._processor is not None:
            self._processor.on_span_end(self)

    def set_output(self, output: Any) -> None:
        """Set `output`, what the step came to."""
        self.output = output

    def export(self) -> dict[str, Any]:
        """A new dict of what is known, ``data`` exported; values are the live ones."""
        return {
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "parent_span_id": self.parent_span_id,
            "data": self.data.export(),
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "error": self.error,
            "output": self.output,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processor": None, "_unfinished": list(self._unfinished)}

    def __repr__(self) -> str:
        return f"<Span {getattr(self.data, 'type', None)} {self.span_id} of trace {self.trace_id}>"


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
        processor: TraceProcessor | None = None,
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
            parent = parent.span_id if parent.trace_id == self.trace_id else None
        span_id = span_id or new_id()
        span = Span(self.trace_id, span_id, data, parent, self._processor, mode=self.mode)
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
        for span in reversed(_open_spans.get()):
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
        _open_spans.set(_still_open(_open_spans.get()))

    def __getstate__(self) -> dict[str, Any]:
        # Entering and leaving a snapshot does nothing: it may have the live spans.
        return {**self.__dict__, "_processor": None, "_unstarted": [], "_unended": []}

    def __repr__(self) -> str:
        return f"<Trace {self.name!r} {self.trace_id}, {len(self._spans)} spans>"
