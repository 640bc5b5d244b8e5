"""The whole way from an agent's thread to the server, as one object.

    offer() -> ByteQueue -> SpoolingThread -> SegmentWriter on disk -> SendingThread -> sink

The worker only fills the disk and the shipper only empties it, so a server that hangs does not
delay the moment from which a record survives the process. Import and construction start nothing;
the first offer does, and what has nothing to do goes to rest (see `PipelineThreads`). A forked
child begins anew: its own queue, segment and threads.
"""

from __future__ import annotations

# Not used here. Its import registers with threading, which raises once the interpreter shuts down:
# a sink importing mlflow in a short script's last moments would fail. It also registers with fork,
# which complains when that happens on another thread in mid-fork. 1.5 ms.
import concurrent.futures.thread  # noqa: F401
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from qitos_mlflow.delivery.adopter import Adopt
from qitos_mlflow.delivery.byte_queue import Barrier
from qitos_mlflow.delivery.pipeline_threads import Asks, PipelineThreads, Shared
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool.counts import CLOSED, QUEUE_FULL, CountsSnapshot
from qitos_mlflow.delivery.spool.paths import SEGMENT_SUFFIX, Paths
from qitos_mlflow.delivery.spool.segments import waiting_records
from qitos_mlflow.delivery.spool.writer import SegmentWriter

DISK_GRACE_S = 0.25
"""From `refuse` on the worker has at least this long: what does not reach the disk is lost."""
FORK_WAIT_S = 10.0
"""Longest time a fork waits for a sink that is just being opened, or importing (seconds): `import
mlflow` and the creation of a local store take five; a sink for a server, 0.2."""

LOOK_S = 0.05
"""How often a flush looks whether somebody else has delivered what was left to him (seconds)."""


class Pipeline:
    """Delivers payloads in order, at least once; what is not delivered stays on disk.

    Args:
        header: opaque, stored with the records for whoever delivers them later: the destination.
        refine: decodes and redacts a payload on the worker's thread; None drops it on purpose.
        open_sink: makes the sink on the shipper's thread, may block there and may raise (then it
            is tried again). None is offline: records stay in the spool for `deliver`.
        directory: the spool.
        queue_bytes: bound of the queue, and again of the memory that stands in for a failed disk.
        spool_bytes: cap of the spool directory, shared with other processes.
        dropped: called on the worker's thread with each record that is lost after it was accepted,
            and the reason; the record is as refined, or as offered where refining failed. What
            was lost later, from memory or deleted files, is in `stats` only.
        adopt: given the header of what a dead process has left in the spool, returns how to open
            a sink for it, or None to leave it alone. Not asked offline.
        may_rest: asked on the worker's thread when nothing has come for a while. False while
            records may come that belong to earlier ones: each rest begins a new segment.
    """

    def __init__(
        self,
        *,
        header: bytes,
        refine: Callable[[bytes], bytes | None],
        open_sink: Callable[[], Sink] | None,
        directory: Path,
        queue_bytes: int,
        spool_bytes: int,
        dropped: Callable[[bytes, str], None] = lambda _, __: None,
        adopt: Adopt | None = None,
        may_rest: Callable[[], bool] = lambda: True,
    ) -> None:
        asks = Asks(refine, open_sink, dropped, adopt, may_rest)

        def running() -> PipelineThreads:
            segment = SegmentWriter(
                directory,
                header,
                ship=open_sink is not None,
                cap_bytes=spool_bytes,
                memory_bytes=queue_bytes if open_sink is not None else 0,
            )
            return PipelineThreads(self._shared, segment, asks, self._hand_over, self._rested)

        self._header = header
        self._offline = open_sink is None
        self._adopt = adopt
        self._number = next(_numbers)
        self._queue_bytes = queue_bytes
        self._make_running = running
        self._closed = False
        self._begin()
        _pipelines.add(self)

    def _begin(self) -> None:
        self._shared = Shared(self._queue_bytes)
        self._running = self._make_running()
        self._earlier: list[Paths] = []
        self._inherited: list[Paths] = []
        # Held while threads are at work, and for ever after `close`: as an atomic flag.
        self._awake = threading.Lock()
        self._last = Barrier(last=True)
        self._refused_at = 0.0
        self._unattended = False
        self._closing = threading.RLock()  # A signal handler may close while this thread does.

    def offer(self, payload: bytes, *, keep: bool = False, urgent: bool = False) -> bool:
        """Take `payload` on its way; False when it is refused, which is counted.

        Any thread, also inside signal handlers and finalizers. Never blocks, never raises.

        Args:
            payload: never changed afterwards.
            keep: take it also when the queue is full.
            urgent: send it at once: somebody waits for what comes of it.
        """
        shared = self._shared
        if self._closed:
            shared.stats.drop(CLOSED)
            return False
        taken = shared.queue.offer(payload, keep, urgent)
        if not taken:
            shared.stats.drop(QUEUE_FULL)
        if not self._awake.locked():
            self._wake()
        return taken

    def count_lost(self, reason: str, records: int = 1) -> None:
        """Count records that were lost on their way to `offer`. Any thread; never blocks."""
        self._shared.stats.drop(reason, records)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything offered before the call is acknowledged.

        False when `timeout_s` passes first, or offline while nobody else has delivered it. Any
        thread. Tries a server that failed once more at once.
        """
        deadline = time.monotonic() + timeout_s
        if not self._at_rest and not self._spooled(Barrier(), deadline):
            return False
        # The one that has reached the barrier, or a later one: then the earlier went to rest.
        return self._running.shipped(deadline) and self._earlier_delivered(deadline)

    def refuse(self) -> None:
        """Take no more; what was taken goes to the disk now. Any thread; waits for nothing."""
        self._closed = True
        if not self._at_rest:
            self._put_last()

    def close(self, timeout_s: float) -> bool:
        """Flush, end the threads, give up the locks; True when nothing is left.

        Later offers are refused. Any thread, any number of times. Blocks for at most `timeout_s`
        and a tenth of a second for the locks, but leaves the worker at least `DISK_GRACE_S` from
        `refuse` on. What is left is in the spool, except what is `unsaved`.
        """
        deadline = time.monotonic() + timeout_s
        self.refuse()
        self._running.save_losses()  # Those of offers refused since the last time.
        if not self._at_rest and not self._end(deadline):
            return False
        return self._running.nothing_left() and next(self.waiting(), None) is None

    @property
    def stats(self) -> CountsSnapshot:
        """What became of the records of this process so far."""
        return self._shared.stats.snapshot()

    @property
    def online(self) -> bool | None:
        """Whether the last attempt to reach the server succeeded; None before the first ended."""
        return self._shared.circuit.online

    @property
    def paths(self) -> Paths:
        """The files of this process's segment; there are none before the first record."""
        return self._running.segment.paths

    @property
    def segments(self) -> list[Paths]:
        """All segments that may hold records of this pipeline, or of one that left them to it."""
        return list(dict.fromkeys([*self._inherited, *self._earlier, self.paths]))

    def waiting(self) -> Iterator[bytes]:
        """The records that wait on disk, in order. Reads them: not for hot paths."""
        for paths in self.segments:
            yield from waiting_records(paths)

    @property
    def unsaved(self) -> int:
        """How many records wait in memory: lost if the process ends now."""
        return self._running.unsaved

    @property
    def _at_rest(self) -> bool:
        # In this order: a worker that has emptied the queue is still awake.
        return self._shared.queue.empty and not self._awake.locked()

    def _put_last(self) -> None:
        if not self._refused_at:
            self._refused_at = time.monotonic()
            self._shared.queue.put(self._last)

    def _wake(self) -> None:
        if self._awake.acquire(blocking=False):
            self._running.start()

    def _hand_over(self) -> bool:
        """Leave what waits for a server that is away, or offline for others, to a later pipeline.

        False where there is none. Its adopter takes what nobody holds; offline, it tells of it.
        Many pipelines that each wait on their own would take all the threads and files that the
        process may have.
        """
        if (self.online is not False and not self._offline) or self.unsaved:
            return False
        with _handing_over:  # To the last one, which has nobody to leave it to in turn.
            others = [p for p in list(_pipelines) if p._number > self._number]
            for other in sorted(others, key=lambda p: p._number, reverse=True):
                if other._takes_over(self):
                    other._inherited = list(dict.fromkeys([*other._inherited, *self.segments]))
                    other._running.adopt()
                    return True
        return False

    def _takes_over(self, other: Pipeline) -> bool:
        at_work = self._awake.locked() and not self._closed
        if not at_work or self._offline or other._offline:
            return at_work and self._offline and other._offline
        return self._adopt is not None and self._adopt(other._header) is not None

    def _rested(self) -> None:
        """Threads and files are gone. On the worker's thread, as the last that it does."""
        with _handing_over:
            self._inherited = _not_empty(self._inherited)
            self._earlier = _not_empty([*self._earlier, self.paths])
        self._shared.forget_outage()
        self._running = self._make_running()
        if self._unattended:
            self._running.leave()
        self._awake.release()
        if not self._shared.queue.empty:  # Offered meanwhile, by somebody who found it awake.
            self._wake()

    def _end(self, deadline: float) -> bool:
        if not self._closing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            self._put_last()  # A record came in while others were refused.
            if not self._spooled(self._last, max(deadline, self._refused_at + DISK_GRACE_S)):
                self._unattended = True
                self._running.leave()
                if not self._last.reached.is_set():
                    return False
            self._running.end(deadline)
            return True
        finally:
            self._closing.release()

    def _spooled(self, barrier: Barrier, deadline: float) -> bool:
        """Have all that was offered so far in the segment, by `deadline` (monotonic)."""
        if self._last.reached.is_set():
            return True
        if barrier is not self._last:
            self._shared.queue.put(barrier)
        if not self._awake.locked():
            self._wake()
        running = self._running
        if running.no_worker:
            running.work_here(barrier)
        return barrier.reached.wait(max(0.0, deadline - time.monotonic()))

    def _earlier_delivered(self, deadline: float) -> bool:
        """Wait until those to whom earlier segments were left have delivered them."""
        while any(True for paths in self._earlier for _ in waiting_records(paths)):
            left_s = deadline - time.monotonic()
            if self._offline or left_s <= 0:
                return False
            time.sleep(min(LOOK_S, left_s))  # It is files that tell; other processes may do it.
        return True

    def _after_fork(self) -> None:
        self._running.segment.disown()
        self._begin()


def _not_empty(segments: list[Paths]) -> list[Paths]:
    try:
        there = {
            path.name.partition(".")[0]
            for directory in {paths.directory for paths in segments}
            for path in directory.glob(f"*{SEGMENT_SUFFIX}")
        }
    except OSError:  # Nobody can tell.
        return segments
    return [paths for paths in dict.fromkeys(segments) if paths.stem in there]


_handing_over = threading.Lock()
_numbers = count()
_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()
_forking = threading.local()
_importing = threading.RLock()


def importing() -> threading.RLock:
    """The lock under which a sink that is open already imports much: no fork amid that."""
    return _importing


def _before_fork() -> None:
    # A module that a thread is importing during a fork stays locked in the child for ever: its
    # own import of mlflow would hang. The wait is bounded, so that it cannot deadlock.
    deadline = time.monotonic() + FORK_WAIT_S
    locks = [_importing, *(pipeline._shared.opening for pipeline in list(_pipelines))]
    _forking.locks = [
        lock for lock in locks if lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
    ]


def _after_fork_in_parent() -> None:
    for lock in getattr(_forking, "locks", ()):
        lock.release()


def _after_fork_in_child() -> None:
    global _handing_over, _importing
    _handing_over = threading.Lock()
    _importing = threading.RLock()
    for pipeline in list(_pipelines):
        pipeline._after_fork()


if hasattr(os, "register_at_fork"):  # Where there is no fork there is nothing to repair.
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
