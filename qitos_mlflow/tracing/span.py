"""Spans: each hands its start and its end on to a processor.

A context (of a thread or a task) knows the spans started in it, and in the context it was copied
from, as an immutable tuple, innermost last. A span finished on another thread, or out of order,
stays in the tuple until the next start or end in that context; it is never taken for an open one.
Nothing here blocks or takes a lock: what must happen once is a `list.pop`, which is atomic.
"""

from __future__ import annotations

import os
import threading
import time
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any, Protocol

from qitos_mlflow._guard import in_words
from qitos_mlflow.tracing.config import TracingMode
from qitos_mlflow.tracing.span_data import SpanData

NOT_FINISHED = "not finished when its trace ended"
"""The error of a span that its trace had to close."""

open_spans: ContextVar[tuple[Span, ...]] = ContextVar("qitos_mlflow_open_spans", default=())
"""The spans started in this context, innermost last; some may be finished, see `unfinished`."""


def unfinished(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Those of `spans` that are still open."""
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


class _SpanListener(Protocol):
    """What a span needs of a `TraceProcessor`."""

    def on_span_start(self, span: Span) -> None: ...

    def on_span_end(self, span: Span) -> None: ...


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
        processor: _SpanListener | None = None,
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
            open_spans.set((*unfinished(open_spans.get()), self))
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
        spans = open_spans.get()
        if self in spans:
            open_spans.set(unfinished(spans))
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
        return f"<Span {self.data.type} {self.span_id} of trace {self.trace_id}>"


class NoOpSpan:
    """Stands for a span where tracing is off: takes everything, does nothing."""

    def __init__(self) -> None:
        self.trace_id = ""
        self.span_id = ""
        self.parent_span_id: str | None = None
        self.data: SpanData | None = None
        self.mode = TracingMode.DISABLED
        self.started_at: str | None = None
        self.ended_at: str | None = None
        self.error: str | None = None
        self.exception: BaseException | None = None
        self.output: Any = None

    def start(self) -> NoOpSpan:
        """Nothing."""
        return self

    def finish(self, error: str | BaseException | None = None) -> None:
        """Nothing."""

    def set_output(self, output: Any) -> None:
        """Nothing."""

    def export(self) -> dict[str, Any]:
        """An empty dict."""
        return {}
