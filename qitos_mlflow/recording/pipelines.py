"""One pipeline per destination and process, shared by all processors that record for it.

Receives the bytes of records from `recorder`, on the agent's thread. Hands them to a
`delivery.Pipeline`, which normalizes them on its spooling thread. Opens nothing before the first
trace. Knows no server: a plugin's `Destination` says how to open a sink.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from qitos_mlflow.delivery import Pipeline, Sink
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.contributions import ask_plugins
from qitos_mlflow.recording.losses import TraceLosses
from qitos_mlflow.recording.normalize import normalize
from qitos_mlflow.settings import Settings


class RecordedTrace(Protocol):
    """What a pipeline asks of a trace that is recorded to it."""

    id: str

    @property
    def ended(self) -> bool:
        """Whether its end is recorded: only late spans can follow."""
        ...

    @property
    def is_quiet(self) -> bool:
        """Whether it has ended and no late span is expected."""
        ...

    def kill(self, why: str) -> None:
        """Record its end now, as KILLED."""
        ...


FindTrace = Callable[[str], "RecordedTrace | None"]
"""The open trace with this id in this process; None if there is none."""


@dataclass(frozen=True)
class Destination:
    """Where records go, and how the threads of a pipeline reach it.

    Attributes:
        header: stored with the records, for the process that delivers them later. Opaque.
        open_sink: opens the sink. It gets the lookup of this process's open traces. Called on the
            sending thread; may block and may raise (then it is called again later).
        open_leftovers: given the header of a dead process's segment, returns what opens a sink
            for it, or None if this process must leave that segment alone.
    """

    header: bytes
    open_sink: Callable[[FindTrace], Sink]
    open_leftovers: Callable[[bytes], Callable[[], Sink] | None]


class RecordPipeline:
    """A `delivery.Pipeline` with the open traces that are recorded to it. Any thread.

    Args:
        key: the destination's.
        destination: where the records go.
        settings: the first user's. Spool, queue and offline mode follow from them.
    """

    def __init__(self, key: Hashable, destination: Destination, settings: Settings) -> None:
        self._key = key
        self.exit_timeout_s = 0.0
        """The longest of its users' exit timeouts (seconds)."""
        self.field_bytes = 0
        """The largest of its users' bounds of one field (bytes)."""
        self.closed = False
        """Whether it takes no more."""
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._open: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._losses: dict[str, TraceLosses] = {}

        def open_sink() -> Sink:
            return destination.open_sink(self.find)

        self.delivery = Pipeline(
            header=destination.header,
            normalize=self._normalize,
            open_sink=None if settings.offline else open_sink,
            directory=settings.spool_dir,
            queue_bytes=settings.queue_bytes,
            spool_bytes=settings.spool_bytes,
            dropped=self._dropped,
            open_leftovers=destination.open_leftovers,
            may_rest=self._may_rest,
        )
        self.offer = self.delivery.offer
        """See `delivery.Pipeline.offer`: on the agent's thread, without another call."""

    def find(self, trace_id: str) -> Any:
        """The open trace with this id, None if there is none."""
        return self._open.get(trace_id)

    def add(self, trace: RecordedTrace) -> TraceLosses:
        """Register a trace that begins; returns its loss ledger. Its id must be free."""
        losses = TraceLosses()
        self._losses[trace.id] = losses
        self._open[trace.id] = trace
        return losses

    def is_free(self, trace_id: str) -> bool:
        """Whether no trace with this id is open for this destination, whatever its spool."""
        same = {self, *(p for p in list(_pipelines.values()) if p._key == self._key)}
        found = [pipeline.find(trace_id) for pipeline in same]
        return all(trace is None or trace.ended for trace in found)

    @property
    def counted_losses(self) -> int:
        """Records lost, refused or damaged so far."""
        counts = self.delivery.stats
        return counts.dead_letters + counts.bad_lines + sum(counts.dropped.values())

    def refuse(self, why: str) -> None:
        """Record the end of all open traces, then take no more. Waits for nothing."""
        for trace in list(self._open.values()):
            trace.kill(why)
        self.closed = True
        self.delivery.refuse()

    def close(self, timeout_s: float) -> bool:
        """Deliver what is left and end the threads; True if nothing is left. See `Pipeline`."""
        self.closed = True
        return self.delivery.close(timeout_s)

    def _may_rest(self) -> bool:
        """Spooling thread. Whether no open trace can record anything soon."""
        return all(trace.is_quiet for trace in list(self._open.values()))

    def _normalize(self, payload: bytes) -> bytes | None:
        """Spooling thread. The record that goes to disk; see `normalize`."""
        return normalize(payload, self.field_bytes, ask_plugins, self._add_losses)

    def _add_losses(self, record: dict[str, Any]) -> None:
        if record["kind"] == "trace_end":
            losses = self._losses.pop(record["trace_id"], None)
            if losses is not None:
                losses.complete(record)

    def _dropped(self, record: bytes, reason: str) -> None:
        """Spooling thread. Count a record that was lost after it was offered."""
        fields = orjson.loads(record)
        losses = self._losses.get(fields["trace_id"])
        if losses is not None:
            losses.add(fields["kind"], reason)


_pipelines: dict[Hashable, RecordPipeline] = {}
# Reentrant: a signal handler may begin or end a trace while this thread holds it.
_lock = threading.RLock()


def acquire(
    user: object, settings: Settings, key: Hashable, make: Callable[[], Destination]
) -> RecordPipeline:
    """The pipeline for this destination, made if there is none yet. Waits for nothing.

    Args:
        user: what records to it until `release`; held weakly.
        settings: the user's. Those of the first user decide about spool, queue and offline mode.
        key: equal for equal destinations.
        make: describes the destination, if this process has no pipeline to it.
    """
    place = (key, settings.spool_dir, settings.offline)
    with _lock:
        pipeline = _pipelines.get(place)
        if pipeline is None:
            for other, unused in list(_pipelines.items()):
                if not unused.users and unused.delivery.at_rest:
                    del _pipelines[other]
            pipeline = _pipelines[place] = RecordPipeline(key, make(), settings)
        process_exit.watch(pipeline)
        pipeline.users.add(user)
        pipeline.exit_timeout_s = max(pipeline.exit_timeout_s, settings.exit_timeout_s)
        pipeline.field_bytes = max(pipeline.field_bytes, settings.field_bytes)
        return pipeline


def release(user: object, pipeline: RecordPipeline) -> bool:
    """Take note that `user` records nothing more; True if it was the last user.

    Then nobody gets this pipeline any more, and the caller must close it. Waits for nothing.
    """
    with _lock:
        pipeline.users.discard(user)
        if pipeline.users:
            return False
        for key in [key for key, other in _pipelines.items() if other is pipeline]:
            del _pipelines[key]
        return True


def _after_fork() -> None:
    """In a forked child: open traces are the parent's. The delivery begins anew by itself."""
    global _lock
    _lock = threading.RLock()
    for pipeline in _pipelines.values():
        pipeline.__dict__.update(_open=weakref.WeakValueDictionary(), _losses={})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
