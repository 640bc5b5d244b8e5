"""The whole way from an agent's thread to the server, as one object.

    offer() -> ByteQueue -> SpoolingThread -> SegmentWriter on disk -> SendingThread -> sink

The spooling thread only fills the disk and the sending thread only empties it, so a server that
hangs does not delay the moment from which a record survives the process. Import and construction
start nothing; the first offer does. A pipeline with nothing to do rests: it has no threads and no
files until the next record comes. A forked child begins anew: its own queue, segment and threads.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path

from qitos_mlflow._threads import in_time
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.byte_queue import Barrier, ByteQueue
from qitos_mlflow.delivery.leftovers import Leftovers
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.sending_thread import SendingThread
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool.counts import CLOSED, QUEUE_FULL, Counts
from qitos_mlflow.delivery.spool.paths import Paths
from qitos_mlflow.delivery.spool.reader import SegmentReader
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from qitos_mlflow.delivery.spooling_thread import Spooled, SpoolingThread

# Not used here. Its import registers with threading, which raises once the main thread has ended: a
# sink importing mlflow in a short script's last moments would fail. It also registers with fork,
# which complains when that happens on another thread in mid-fork. 1.5 ms.
with contextlib.suppress(RuntimeError):  # It has ended: this pipeline works all the same.
    import concurrent.futures.thread  # noqa: F401

DISK_GRACE_S = 0.25
"""From `refuse` on, the spooling thread has at least this long (seconds): what does not reach the
disk is lost."""

living: weakref.WeakValueDictionary[int, Pipeline] = weakref.WeakValueDictionary()
"""All pipelines of this process. To read while others are made: `valuerefs`, which is one call."""


class Pipeline(Spooled):
    """Delivers payloads in order, at least once; what is not delivered stays on disk.

    A subclass says what becomes of a payload, how a sink is opened and when a rest may begin.

    Args:
        header: opaque, stored with the records for the process that delivers them later: where
            they are to go.
        directory: the spool.
        queue_bytes: bound of the queue, and again of the memory that stands in for a failed disk.
        spool_bytes: cap of the spool directory, shared with other processes.
        offline: records stay in the spool until `qitos-mlflow sync`.
        fsync: what the spooling thread writes survives a power cut.
    """

    def __init__(
        self,
        header: bytes,
        *,
        directory: Path,
        queue_bytes: int,
        spool_bytes: int,
        offline: bool,
        fsync: bool = False,
    ) -> None:
        self.header = header
        self._directory = directory
        self._queue_bytes = queue_bytes
        self._spool_bytes = spool_bytes
        self._offline = offline
        self._fsync = fsync
        self.closed = False
        """Whether it takes no more."""
        self._begin()
        living[id(self)] = self

    def _begin(self) -> None:
        self._queue = ByteQueue(self._queue_bytes)
        self.stats = Counts()
        """What became of the records of this process so far. Any thread may count a loss."""
        self._circuit = Circuit()
        self._unattended = threading.Event()
        self._spooling = self._make_threads()
        # Held while threads are at work, and for ever after `close`: as an atomic flag.
        self._awake = threading.Lock()
        self._last = Barrier(last=True)
        self._refused_at = 0.0
        self._closing = threading.RLock()  # A signal handler may close while this thread does.

    def open_sink(self) -> Sink:
        """Sending thread. Open the sink; may block and may raise (then it is called again)."""
        raise NotImplementedError

    def open_leftovers(self, header: bytes) -> Callable[[], Sink] | None:
        """Sending thread. What opens a sink for a dead process's segment with this header.

        None leaves that segment alone.
        """
        return None

    def offer(self, payload: Sized, *, keep: bool = False, urgent: bool = False) -> bool:
        """Take `payload` for delivery; False when it is refused, which is counted.

        Any thread, also inside signal handlers and finalizers. Never blocks, never raises.

        Args:
            payload: never changed afterwards; `len` of it is what it takes (bytes).
            keep: take it also when the queue is full.
            urgent: send it at once: a thread waits for its result.
        """
        if self.closed:
            self.stats.drop(CLOSED)
            return False
        taken = self._queue.offer(payload, keep, urgent)
        if not taken:
            self.stats.drop(QUEUE_FULL)
        if not self._awake.locked():
            self._wake()
        return taken

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
        return self._spooling.wait_delivered(deadline)

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
        if self.stats.dropped:  # Of offers refused since the last time, too.
            in_time(partial(self.stats.save_losses, self.paths), DISK_GRACE_S)
        if not self.at_rest and not self._end(deadline):
            return False
        if not self._offline:
            return self._spooling.nothing_left()
        return bool(in_time(self._spooling.nothing_left, DISK_GRACE_S))

    @property
    def online(self) -> bool | None:
        """Whether the last attempt to reach the server succeeded; None before the first ended."""
        return self._circuit.online

    @property
    def hopeless(self) -> str | None:
        """Why the last attempt failed, if time alone will not help."""
        return self._circuit.problem if self._circuit.hopeless else None

    @property
    def progress(self) -> object:
        """Another value whenever delivery gets on (see `SendingThread`); None if it has ended."""
        return self._spooling.sending and self._spooling.sending.progress

    @property
    def paths(self) -> Paths:
        """The files of its segment. Before the first record and at rest there are none."""
        return self._spooling.segment.paths

    @property
    def unsaved(self) -> int:
        """How many records wait in memory, or are lost and in no file: gone if the process ends."""
        return self._queue.records + self._spooling.unsaved

    @property
    def at_rest(self) -> bool:
        """Whether it has no threads and no files, and nothing to deliver."""
        # In this order: a spooling thread that has emptied the queue is still awake.
        return self._queue.empty and not self._awake.locked()

    def after_fork(self) -> None:
        """Begin anew in a forked child; no other thread runs yet."""
        self._begin()

    def _put_last(self) -> None:
        if not self._refused_at:
            self._refused_at = time.monotonic()
            self._queue.put(self._last)

    def _wake(self) -> None:
        if self._awake.acquire(blocking=False):
            self._spooling.begin()

    def rested(self) -> None:
        """Be ready for the next record."""
        self._spooling = self._make_threads()
        self._awake.release()
        if not self._queue.empty:  # Offered meanwhile, by a thread that found it awake.
            self._wake()

    def _end(self, deadline: float) -> bool:
        # A thread with less time must not end what another one waits for.
        closing = self._closing  # Another one from a fork on.
        if not closing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            self._put_last()  # A record came in while others were refused.
            if not self._spooled(self._last, max(deadline, self._refused_at + DISK_GRACE_S)):
                self._unattended.set()
                if not self._last.reached.is_set():
                    return False
            self._spooling.end(deadline)  # Not those that went to rest meanwhile.
            return True
        finally:
            closing.release()

    def _spooled(self, barrier: Barrier, deadline: float) -> bool:
        """Wait until everything offered so far is in the segment; False after `deadline`."""
        if self._last.reached.is_set():
            return True
        if barrier is not self._last:
            self._queue.put(barrier)
        if not self._awake.locked():
            self._wake()
        if not self._spooling.cannot_start:
            barrier.reached.wait(max(0.0, deadline - time.monotonic()))
        if self._spooling.cannot_start:
            self._spooling.write_here(barrier)
        return barrier.reached.is_set()

    def _make_threads(self) -> SpoolingThread:
        segment = SegmentWriter(
            self._directory,
            self.header,
            offline=self._offline,
            cap_bytes=self._spool_bytes,
            memory_bytes=0 if self._offline else self._queue_bytes,
            fsync=self._fsync,
        )
        sending = None
        if not self._offline:
            reader = SegmentReader(segment.paths, segment.parts, self.stats)
            sending = SendingThread(
                SegmentTransfer(reader, self.open_sink),
                self._circuit,
                Leftovers(self._directory, self.open_leftovers),
            )
        return SpoolingThread(self, self._queue, segment, sending, self.stats, self._unattended)


def _after_fork() -> None:
    for pipeline in list(living.values()):
        pipeline.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
