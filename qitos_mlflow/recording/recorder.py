"""All traces of one plugin, on the agent's thread, and the pipelines that they are recorded to.

Receives traces from a plugin's hooks and keeps them until they have ended. What is kept is bounded
by what is open.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Any, Generic, TypeVar

from qitos_mlflow._guard import warn
from qitos_mlflow.delivery import NO_MEMORY
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.pipelines import RecordPipeline, unfinished
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings

ENDED_TRACES = 1024
"""An ended trace is remembered until so many have begun after it: spans of it may begin or end late
on other threads. Each takes about 4 KB."""

T = TypeVar("T", bound=TraceRecorder)


class Recorder(Generic[T]):
    """The traces that one plugin records, by the host's id. Any thread.

    Args:
        settings: the plugin's.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.closed = False
        self._traces: dict[str, T] = {}
        self.get: Callable[[str], T | None] = self._traces.get
        """The trace with this host id; None if this plugin does not record it."""
        self._pipelines: dict[RecordPipeline, int] = {}
        """The pipelines it uses, and the losses of each that a flush has reported."""
        self._last: tuple[Hashable, RecordPipeline] | None = None
        """The pipeline that was asked for last, and its key."""
        self._unplaced: list[str] = []
        """Why traces were lost before it had any pipeline."""
        self._inherited: dict[str, RecordPipeline] = {}
        _recorders.add(self)

    @property
    def traces(self) -> list[T]:
        """The open traces, and the last ended ones."""
        return list(self._traces.values())

    def pipeline_to(
        self, key: Hashable, make: Callable[[Hashable, Settings], RecordPipeline]
    ) -> RecordPipeline:
        """The pipeline to a destination.

        Args:
            key: equal for equal destinations.
            make: makes the pipeline, if this process has none to the destination yet. The settings
                of the first user decide about spool, queue and offline mode.
        """
        last = self._last
        if last is not None and last[0] == key and not self._unplaced:
            return last[1]  # It stays where it is for as long as this uses it.
        process_exit.register()
        settings = self.settings
        place = (key, settings.spool_dir, settings.offline)
        made: RecordPipeline | None = None
        while True:
            with _lock:
                pipeline = _pipelines.get(place, made)
                if pipeline is not None:
                    if pipeline is made:
                        _forget_unused()
                        _pipelines[place] = pipeline
                        unfinished.add(pipeline)
                    pipeline.use(self, settings)
                    self._pipelines.setdefault(pipeline, pipeline.counted_losses)
                    while self._unplaced:
                        pipeline.stats.drop(self._unplaced.pop())
                    self._last = None if self.closed else (key, pipeline)
                    return pipeline
            made = make(key, settings)  # Without the lock: this may take a moment.

    def add(self, trace_id: str, trace: T) -> None:
        """Remember a trace that begins, and forget the oldest ended ones. Open ones stay."""
        self._traces[trace_id] = trace
        if len(self._traces) <= ENDED_TRACES:  # No lock: eight agents may begin at once.
            return
        with _lock:
            many = max(0, len(self._traces) - ENDED_TRACES)
            for old_id, old in list(islice(self._traces.items(), many)):
                if old.ended:
                    self._traces.pop(old_id, None)
                    if open_spans := old.unfinished_spans:
                        old.pipeline.stats.drop("forgotten", open_spans)

    def lose_start(self, trace_id: str, error: BaseException) -> None:
        """Count a trace that could not begin; nothing of it is recorded, or only its start not.

        Args:
            trace_id: the host's.
            error: what its start has raised.
        """
        reason = NO_MEMORY if isinstance(error, MemoryError) else "snapshot_failed"
        trace = self._traces.get(trace_id)
        if trace is not None:
            if not trace.started:
                trace.lose("trace_start", reason)
            return
        for pipeline in self._pipelines:
            pipeline.stats.drop(reason)
            return
        self._unplaced.append(reason)  # Counted with its first trace that begins.

    def lose_span(self, trace_id: str) -> None:
        """Count a span of an unknown trace, if its trace is that of a parent process."""
        pipeline = self._inherited.get(trace_id)
        if pipeline is not None:
            pipeline.stats.drop("forked")
            process_exit.register()  # The end of the process writes the count to disk.
            warn(
                "recorder.forked",
                "a trace began before this process was forked; its spans from this process are "
                "lost. Begin a trace in the forked process",
            )

    def flush(self, timeout_s: float | None = None) -> bool:
        """Deliver all that was recorded so far; True if it is on the server. Blocks.

        False if `timeout_s` (by default, the setting) passes first. Also False, once for each loss,
        if anything was lost, damaged or refused since the last call.
        """
        deadline = self._deadline(timeout_s)
        used = list(self._pipelines)
        delivered = [pipeline.flush(deadline - time.monotonic()) for pipeline in used]
        losses = {pipeline: pipeline.counted_losses for pipeline in used}
        with _lock:
            lost = any(count > self._pipelines.get(p, 0) for p, count in losses.items())
            self._pipelines.update(losses)
        return all(delivered) and not lost

    @property
    def progress(self) -> list[object]:
        """Another value whenever a pipeline that it uses gets on."""
        return [pipeline.progress for pipeline in list(self._pipelines)]

    @property
    def hopeless(self) -> str | None:
        """Why nothing can be delivered, if time alone will not help."""
        return next(filter(None, (one.hopeless for one in list(self._pipelines))), None)

    def close(self, timeout_s: float | None = None) -> bool:
        """Deliver what is recorded; True if nothing is left. Blocks at most `timeout_s`.

        Takes no more from now on: open traces end as FINISHED, unless `auto_end_run` is off. Ends
        the pipelines that nothing else uses. Idempotent.
        """
        deadline = self._deadline(timeout_s)
        self.closed, self._last = True, None
        for trace in self.traces:
            if self.settings.auto_end_run:
                trace.end_early("FINISHED", "shut down before the trace ended")
            trace.closed = True
        with _lock:
            used = list(self._pipelines)
            for pipeline in used:
                pipeline.users.discard(self)
            last = {pipeline for pipeline in used if not pipeline.users}
            for place in [place for place, pipeline in _pipelines.items() if pipeline in last]:
                del _pipelines[place]
        for pipeline in last:  # All of them first: the time for the disk runs at once.
            pipeline.refuse()
        done = True
        for pipeline in used:
            end = pipeline.close if pipeline in last else pipeline.flush
            if not end(deadline - time.monotonic()):
                done = False
            elif pipeline in last:
                unfinished.discard(pipeline)
        return done

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (
            self.settings.flush_timeout_s if timeout_s is None else timeout_s
        )

    def _after_fork(self) -> None:
        self._inherited.update({key: trace.pipeline for key, trace in self._traces.items()})
        self._traces.clear()
        self._last = None
        self._pipelines = dict.fromkeys(self._pipelines, 0)  # Their counts begin anew.


# Weakly: a recorder that nothing holds any more must not live until the process ends.
_recorders: weakref.WeakSet[Recorder[Any]] = weakref.WeakSet()


_pipelines: dict[Hashable, RecordPipeline] = {}
"""The pipelines that recorders get, by key, spool and mode."""

# Reentrant: a signal handler or the garbage collector may begin or end a trace while this thread
# holds it.
_lock = threading.RLock()


def _forget_unused() -> None:
    for place, pipeline in list(_pipelines.items()):
        if not (pipeline.users or pipeline.traces) and pipeline.at_rest:
            del _pipelines[place]
            unfinished.discard(pipeline)


def _after_fork() -> None:
    """In a forked child: the parent's traces are the parent's."""
    global _lock
    _lock = threading.RLock()
    for recorder in list(_recorders):
        recorder._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
