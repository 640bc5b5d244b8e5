"""An open trace: starts its spans, and finishes each of them once.

Hands `Trace` and `Span` objects to the host's tracing. Parents are explicit: the host takes them
from a context variable that other traces and threads share.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextvars import Token
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import in_words, shield
from qitos_mlflow.tracing.models import NOT_FINISHED
from qitos_mlflow.tracing.provider import NoOpTrace


def is_wanted() -> bool:
    """Whether any attached processor wants a new trace. Takes a microsecond if there is none."""
    attached = tracing.processors()
    if not attached or tracing.get_tracing_provider().mode == tracing.TracingMode.DISABLED:
        return False
    for processor in attached:
        with shield("bridge.wants_trace"):
            if hasattr(processor, "wants_trace") and not processor.wants_trace():
                continue
        return True  # One that fails to answer has not declined.
    return False


_forks: list[None] = []
"""An item for each fork on the way from the process's first ancestor to this one."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forks.append(None))


class LiveTrace:
    """An open trace, shared by the agents in it. Any thread.

    In a process forked within it, it is closed: the parent process ends the trace.
    """

    def __init__(self, name: str, metadata: dict[str, Any]) -> None:
        self.trace: Any = tracing.get_tracing_provider().create_trace(name, metadata=metadata)
        self._ended = False
        self._forks = len(_forks)
        self._open: dict[str, Any] = {}
        self._lock = threading.RLock()  # A signal handler may run an agent while it is held.
        try:
            self.trace.__enter__()
        except BaseException as error:  # Such as Ctrl-C in a processor.
            with shield("bridge.trace_end"):
                self.trace.__exit__(type(error), error, error.__traceback__)
            raise

    @property
    def closed(self) -> bool:
        """Whether it takes no more spans: it has ended, or belongs to the parent process."""
        return self._ended or self._forks != len(_forks)

    def start(self, data: Any, parent: Any) -> Any:
        """Start a span below `parent` (a span, or None for the top)."""
        span = self.trace.create_span(tracing.SpanType(data.type), data)
        span.parent_span_id = parent.span_id if parent is not None else None
        span.start()
        token = getattr(span, "_token", None)
        if isinstance(token, Token):
            # Out of the host's context variable again: there it would become the parent of the next
            # trace on this thread. And it could only be finished on this thread: on another one the
            # reset raises, and no processor gets the end.
            token.var.reset(token)
            span._token = None
        with self._lock:
            self._open[span.span_id] = span
        if self.closed:  # Another thread has ended it meanwhile: no span may stay open.
            self.finish(span, NOT_FINISHED)
        return span

    def finish(self, span: Any, error: BaseException | str | None = None) -> None:
        """Finish a span, once; a second call does nothing.

        An exception is on ``span.exception`` only while the processors are called: its traceback
        keeps the agent's local variables alive.
        """
        if self._forks != len(_forks):  # Before the lock, which a fork may have left held.
            return
        with self._lock:
            if self._open.pop(span.span_id, None) is None:
                return
        if not isinstance(error, BaseException):
            span.finish(error)
            return
        span.exception = error
        try:
            span.finish(in_words(error))
        finally:
            span.exception = None

    def annotate(self, metadata: Mapping[str, Any]) -> None:
        """Add to the trace's metadata."""
        # A host with tracing disabled has one dict for all its traces.
        if not isinstance(self.trace, tracing.NoOpTrace):
            self.trace.metadata.update(metadata)

    def end(self, error: BaseException | None) -> None:
        """End the trace; once, and only in its own process.

        Agents still running in it lose their spans, see `AgentRun.open`.

        Call it inside the handler of `error`: processors of a host's own trace find the error in
        ``sys.exc_info()`` only.
        """
        if self.closed:
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
            left = list(self._open.values())
        trace = self.trace
        try:
            for span in reversed(left):
                with shield("bridge.end"):  # The other spans and the trace must end, too.
                    self.finish(span, NOT_FINISHED)
        finally:  # Also after Ctrl-C in between.
            # Contexts copied within the trace refer to this object, and so does a traceback.
            # Neither may keep the spans in memory.
            self.trace = NoOpTrace()
            self.trace.trace_id = trace.trace_id
            if error is None:
                trace.__exit__(None, None, None)
            else:
                trace.__exit__(type(error), error, error.__traceback__)
