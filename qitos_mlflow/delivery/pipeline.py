"""The whole way from an agent's thread to the server, as one object.

    offer() -> ByteQueue -> SpoolingThread -> SegmentWriter on disk -> SendingThread -> sink

The spooling thread only fills the disk and the sending thread only empties it, so a server that
hangs does not delay the moment from which a record survives the process. Import and construction
start nothing; the first offer does. A pipeline with nothing to do rests (see `PipelineThreads`). A
forked child begins anew: its own queue, segment and threads.
"""

from __future__ import annotations

# Not used here. Its import registers with threading, which raises once the interpreter shuts down:
# a sink importing mlflow in a short script's last moments would fail. It also registers with fork,
# which complains when that happens on another thread in mid-fork. 1.5 ms.
import concurrent.futures.thread  # noqa: F401
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qitos_mlflow.delivery import fork
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.byte_queue import Barrier, ByteQueue
from qitos_mlflow.delivery.leftovers import Leftovers, OpenLeftovers
from qitos_mlflow.delivery.pipeline_threads import PipelineThreads
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.sending_thread import SendingThread
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool.counts import CLOSED, QUEUE_FULL, Counts
from qitos_mlflow.delivery.spool.paths import Paths
from qitos_mlflow.delivery.spool.reader import SegmentReader
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from qitos_mlflow.delivery.spooling_thread import SpoolingThread

DISK_GRACE_S = 0.25
"""From `refuse` on, the spooling thread has at least this long (seconds): what does not reach the
disk is lost."""
ASIDE_SHARE = 0.1
"""What is kept aside may take this share of the spool's size, beyond it."""


class Pipeline:
    """Delivers payloads in order, at least once; what is not delivered stays on disk.

    Args:
        header: opaque, stored with the records for the process that delivers them later: where
            they are to go.
        normalize: decodes and redacts a payload on the spooling thread; None drops it on purpose.
        open_sink: makes the sink on the sending thread, may block there and may raise (then it
            is tried again). None is offline: records stay in the spool until `qitos-mlflow sync`.
        directory: the spool.
        queue_bytes: bound of the queue, and again of the memory that stands in for a failed disk.
        spool_bytes: cap of the spool directory, shared with other processes.
        dropped: called on the spooling thread with each record that is lost after it was accepted,
            and the reason. The record is as normalized, or as offered if normalizing failed. What
            is lost later, from memory or from deleted files, is in `stats` only.
        open_leftovers: given the header of a dead process's segment in the spool, returns how to
            open a sink for it, or None to leave it alone. Sending thread; not called offline.
        may_rest: called on the spooling thread when no record has come for a while. False while
            records may come that belong to earlier ones: each rest begins a new segment.
    """

    def __init__(
        self,
        *,
        header: bytes,
        normalize: Callable[[bytes], bytes | None],
        open_sink: Callable[[], Sink] | None,
        directory: Path,
        queue_bytes: int,
        spool_bytes: int,
        dropped: Callable[[bytes, str], None] = lambda _, __: None,
        open_leftovers: OpenLeftovers = lambda _: None,
        may_rest: Callable[[], bool] = lambda: True,
    ) -> None:
        self._header = header
        self._normalize = normalize
        self._open_sink = open_sink
        self._directory = directory
        self._queue_bytes = queue_bytes
        self._spool_bytes = spool_bytes
        self._dropped = dropped
        self._open_leftovers = open_leftovers
        self._may_rest = may_rest
        self.closed = False
        """Whether it takes no more."""
        self._begin()
        fork.watch(self)

    def _begin(self) -> None:
        self.opening = threading.RLock()
        """Held while a sink is opened; see `fork`."""
        self._queue = ByteQueue(self._queue_bytes)
        self._stats = Counts()
        self._circuit = Circuit()
        self._unattended = threading.Event()
        self._threads = self._make_threads()
        # Held while threads are at work, and for ever after `close`: as an atomic flag.
        self._awake = threading.Lock()
        self._last = Barrier(last=True)
        self._refused_at = 0.0
        self._closing = threading.RLock()  # A signal handler may close while this thread does.

    def offer(self, payload: bytes, *, keep: bool = False, urgent: bool = False) -> bool:
        """Take `payload` for delivery; False when it is refused, which is counted.

        Any thread, also inside signal handlers and finalizers. Never blocks, never raises.

        Args:
            payload: never changed afterwards.
            keep: take it also when the queue is full.
            urgent: send it at once: a thread waits for its result.
        """
        if self.closed:
            self._stats.drop(CLOSED)
            return False
        taken = self._queue.offer(payload, keep, urgent)
        if not taken:
            self._stats.drop(QUEUE_FULL)
        if not self._awake.locked():
            self._wake()
        return taken

    def count_lost(self, reason: str, records: int = 1) -> None:
        """Count records that were lost on their way to `offer`. Any thread; never blocks."""
        self._stats.drop(reason, records)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything offered before the call is acknowledged.

        False when `timeout_s` passes first, and offline unless `qitos-mlflow sync` has delivered
        everything. Any thread. Makes one attempt at once, even after a failure.
        """
        deadline = time.monotonic() + timeout_s
        if not self.at_rest and not self._spooled(Barrier(), deadline):
            return False
        # If these threads are not those that reached the barrier, all of it was delivered: only
        # then does a pipeline rest.
        return self._threads.wait_delivered(deadline)

    def refuse(self) -> None:
        """Take no more; what was taken goes to the disk now. Any thread; waits for nothing."""
        self.closed = True
        if not self.at_rest:
            self._put_last()

    def close(self, timeout_s: float) -> bool:
        """Flush, end the threads, give up the locks; True when nothing is left.

        Later offers are refused. Any thread, any number of times. Blocks for at most `timeout_s`
        and a tenth of a second for the locks, but leaves the spooling thread at least
        `DISK_GRACE_S` from `refuse` on. What is left is in the spool, except what is `unsaved`.
        """
        deadline = time.monotonic() + timeout_s
        self.refuse()
        self._stats.save_losses(self.paths)  # Those of offers refused since the last time.
        if not self.at_rest and not self._end(deadline):
            return False
        return self._threads.nothing_left()

    @property
    def stats(self) -> Counts:
        """What became of the records of this process so far."""
        return self._stats

    @property
    def online(self) -> bool | None:
        """Whether the last attempt to reach the server succeeded; None before the first ended."""
        return self._circuit.online

    @property
    def paths(self) -> Paths:
        """The files of its segment. Before the first record and at rest there are none."""
        return self._threads.segment.paths

    @property
    def unsaved(self) -> int:
        """How many records wait in memory: lost if the process ends now."""
        return self._queue.records + self._threads.unsaved

    @property
    def at_rest(self) -> bool:
        """Whether it has no threads and no files, and nothing to deliver."""
        # In this order: a spooling thread that has emptied the queue is still awake.
        return self._queue.empty and not self._awake.locked()

    def _put_last(self) -> None:
        if not self._refused_at:
            self._refused_at = time.monotonic()
            self._queue.put(self._last)

    def _wake(self) -> None:
        if self._awake.acquire(blocking=False):
            self._threads.start()

    def _rested(self) -> None:
        """Threads and files are gone. Spooling thread, the last thing that it does."""
        self._threads = self._make_threads()
        self._awake.release()
        if not self._queue.empty:  # Offered meanwhile, by a thread that found it awake.
            self._wake()

    def _end(self, deadline: float) -> bool:
        if not self._closing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            self._put_last()  # A record came in while others were refused.
            if not self._spooled(self._last, max(deadline, self._refused_at + DISK_GRACE_S)):
                self._unattended.set()
                if not self._last.reached.is_set():
                    return False
            self._threads.end(deadline)
            return True
        finally:
            self._closing.release()

    def _spooled(self, barrier: Barrier, deadline: float) -> bool:
        """Wait until everything offered so far is in the segment; False after `deadline`."""
        if self._last.reached.is_set():
            return True
        if barrier is not self._last:
            self._queue.put(barrier)
        if not self._awake.locked():
            self._wake()
        threads = self._threads
        if threads.cannot_start:
            threads.spool_here(barrier)
        return barrier.reached.wait(max(0.0, deadline - time.monotonic()))

    def _make_threads(self) -> PipelineThreads:
        online = self._open_sink is not None
        segment = SegmentWriter(
            self._directory,
            self._header,
            offline=not online,
            cap_bytes=self._spool_bytes,
            memory_bytes=self._queue_bytes if online else 0,
        )
        sending = self._make_sending(segment, self._open_sink) if self._open_sink else None

        def wrote(urgent: bool) -> None:
            self._stats.save_losses(segment.paths)
            if sending is not None:
                sending.written(segment.end, urgent=urgent)

        spooling = SpoolingThread(
            self._queue, self._normalize, segment, self._stats, self._dropped, wrote
        )
        return PipelineThreads(
            spooling,
            sending,
            segment,
            self._stats,
            self._unattended,
            self._may_rest,
            self._rested,
        )

    def _make_sending(self, segment: SegmentWriter, open_sink: Callable[[], Sink]) -> SendingThread:
        def open_undisturbed(open_sink: Callable[[], Sink]) -> Sink:
            with self.opening:
                return open_sink()

        def open_leftovers(header: bytes) -> Callable[[], Sink] | None:
            open_sink = self._open_leftovers(header)
            return None if open_sink is None else partial(open_undisturbed, open_sink)

        aside_bytes = int(self._spool_bytes * ASIDE_SHARE)
        reader = SegmentReader(segment.paths, segment.parts, self._stats, aside_bytes=aside_bytes)
        transfer = SegmentTransfer(reader, partial(open_undisturbed, open_sink))
        leftovers = Leftovers(self._directory, open_leftovers)
        return SendingThread(transfer, self._circuit, leftovers)

    def after_fork(self) -> None:
        """Begin anew in a forked child. See `fork`."""
        self._threads.segment.disown()
        self._begin()
