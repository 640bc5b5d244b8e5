"""A trace while it goes on: starts its spans, and finishes each of them once.

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
from qitos_mlflow._guard import report
from qitos_mlflow.bridge.extract import describe
from qitos_mlflow.tracing.span import NOT_FINISHED
from qitos_mlflow.tracing.trace import NoOpTrace

__all__ = ["LiveTrace", "somebody_listens"]


def somebody_listens() -> bool:
    """Whether any attached processor wants a new trace. Costs a microsecond when there is none."""
    attached = tracing.processors()
    if not attached or tracing.get_tracing_provider().mode == tracing.TracingMode.DISABLED:
        return False
    return any(_wants_trace(processor) for processor in attached)


def _wants_trace(processor: Any) -> bool:
    try:
        wants = getattr(processor, "wants_trace", None)
        return wants is None or bool(wants())
    except Exception as error:  # noqa: BLE001 - somebody's processor; it says nothing
        report("bridge.wants_trace", error)
        return True


_forks = 0
"""How often the process forked on the way from its first ancestor to this one."""


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class LiveTrace:
    """A trace that is going on, shared by the agents in it. Any thread.

    A process forked off within it has no part in it: the trace is the parent's to end.
    """

    def __init__(self, name: str, group_id: str | None, metadata: dict[str, Any]) -> None:
        self.trace: Any = tracing.get_tracing_provider().create_trace(
            name, group_id=group_id, metadata=metadata
        )
        self._ended = False
        self._forks = _forks
        self._open: dict[str, Any] = {}
        self._lock = threading.RLock()  # A signal handler may run an agent while it is held.
        try:
            self.trace.__enter__()
        except BaseException as error:  # Ctrl-C while a processor was told
            try:
                self.trace.__exit__(type(error), error, error.__traceback__)
            except Exception as another:  # noqa: BLE001 - somebody's processor, told once more
                report("bridge.trace_end", another)
            raise

    @property
    def closed(self) -> bool:
        """Whether it takes no more spans: it has ended, or is that of a parent process."""
        return self._ended or self._forks != _forks

    def start(self, data: Any, parent: Any) -> Any:
        """Start a span below `parent` (a span, or None for the top)."""
        span = self.trace.create_span(tracing.SpanType(data.type), data)
        span.parent_span_id = parent.span_id if parent is not None else None
        span.start()
        _leave_context(span)
        with self._lock:
            self._open[span.span_id] = span
        if self.closed:  # ended by another thread meanwhile: nothing may stay open
            self.finish(span, NOT_FINISHED)
        return span

    def finish(self, span: Any, error: BaseException | str | None = None) -> None:
        """Finish a span, once; a second call does nothing.

        An exception is on ``span.exception`` while the processors see the span, and no longer:
        its traceback keeps the agent's local variables alive.
        """
        if self._forks != _forks:  # Before the lock, which another thread may have held.
            return
        with self._lock:
            if self._open.pop(span.span_id, None) is None:
                return
        if not isinstance(error, BaseException):
            span.finish(error)
            return
        span.exception = error
        try:
            span.finish(describe(error))
        finally:
            span.exception = None

    def annotate(self, metadata: Mapping[str, Any]) -> None:
        """Add to the trace's metadata."""
        # A disabled host shares one dict among all its traces.
        if not isinstance(self.trace, tracing.NoOpTrace):
            self.trace.metadata.update(metadata)

    def end(self, error: BaseException | None) -> None:
        """End the trace; once, and only in its own process.

        Agents still running in it lose their spans, see `AgentRun.open`.

        Call it inside the handler of `error`: a host's own trace tells its processors nothing,
        they look at ``sys.exc_info()``.
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
                try:
                    self.finish(span, NOT_FINISHED)
                except Exception as problem:  # noqa: BLE001 - the next one and the trace must end
                    report("bridge.end", problem)
        finally:  # Whatever comes in between (Ctrl-C), the trace is told of its end.
            # Contexts copied within the trace lead here as long as they live, and a traceback
            # does: neither may keep the spans, nor the trace the traceback.
            self.trace = NoOpTrace()
            self.trace.trace_id = trace.trace_id
            if error is None:
                trace.__exit__(None, None, None)
            else:
                trace.__exit__(type(error), error, error.__traceback__)


def _leave_context(span: Any) -> None:
    """Take the span out of the host's context variable again.

    There it would become the parent of whatever trace comes next on this thread, and could only
    be finished on this thread: elsewhere the reset raises and no processor hears of the end.
    """
    token = getattr(span, "_token", None)
    if isinstance(token, Token):
        token.var.reset(token)
        span._token = None
