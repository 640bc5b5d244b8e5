"""The thread between memory and disk: queue -> normalize -> segment.

While it writes it waits for nothing but the disk, so a server that hangs never delays the moment
from which records survive the process. What a bug or a plugin raises costs the record at hand,
which is counted, never the thread.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice, takewhile
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow._inheritance import Forked, check
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.delivery.byte_queue import Barrier, ByteQueue, Item
from qitos_mlflow.delivery.sending_thread import SendingThread
from qitos_mlflow.delivery.spool.counts import (
    CLOSED,
    NO_MEMORY,
    NORMALIZE_FAILED,
    SPOOLING_FAILED,
    Counts,
)
from qitos_mlflow.delivery.spool.parts import MemoryPart
from qitos_mlflow.delivery.spool.segments import waiting_records
from qitos_mlflow.delivery.spool.writer import Record, SegmentWriter

APPEND_EVERY_S = 0.02
"""Records gather this long between two appends (seconds): with the append itself, what a kill
costs."""
REST_S = 3.0
"""Threads and files may go after this long without a record; waking costs a few requests."""
REST_WITHIN_S = 1.0
"""To end what is left open before a rest (seconds); records that come meanwhile wait in memory."""
STOP_GRACE_S = 0.1
"""How long the sending thread has to notice that it is to stop, and free its lock (seconds)."""


class Spooled(ABC):
    """What a pipeline decides for its spooling thread. Called on that thread."""

    def normalize(self, payload: Any) -> bytes | None:
        """The record to store for a payload; None drops it on purpose. If it raises, it is lost."""
        return bytes(payload)

    def lost(self, record: Any, reason: str) -> None:  # noqa: B027 - it is counted anyway
        """Called with each record that is lost after it was accepted.

        The record is as normalized, or as offered if normalizing failed. What is lost later, from
        memory or from deleted files, is in `stats` only.
        """

    def may_rest(self) -> bool:
        """Asked when no record has come for a while.

        False while records may come that belong to earlier ones: each rest begins a new segment.
        """
        return True

    @abstractmethod
    def rested(self) -> None:
        """Threads and files are gone: the last thing that a spooling thread does at a rest."""


class SpoolingThread(OwnThread):
    """Fills a segment with what is offered; starts and ends the thread that empties it.

    It begins with a record. It ends with the last barrier, or by itself when no record has come for
    `REST_S`, none is expected and everything is delivered. Offline, and while the server is away,
    it stays. `work` is the thread; the other public methods are for other threads.

    Args:
        pipeline: decides what becomes of the records.
        queue: where the records come from.
        segment: where the records go; its own.
        sending: sends what is written; None offline.
        stats: counts what is recorded and what is lost.
        unattended: set if no other thread will call `end`: then this one ends the rest once it has
            written what it has.
    """

    def __init__(
        self,
        pipeline: Spooled,
        queue: ByteQueue,
        segment: SegmentWriter,
        sending: SendingThread | None,
        stats: Counts,
        unattended: threading.Event,
    ) -> None:
        super().__init__("qitos-mlflow-spooling")
        self.segment = segment
        self.sending = sending
        self.cannot_start = False
        """No thread can be started (3.12, as Python ends): flush and close work themselves."""
        self._queue = queue
        self._stats = stats
        self._unattended = unattended
        self._pipeline = pipeline
        self._sends_here = False  # There is no sending thread: who waits does its work.
        self._taken: deque[Item | Barrier] = deque()  # From the queue, and not worked off yet.
        self._rests: bool | None = None  # Why `_write` is over; None: it is not.
        self._working_here = threading.RLock()
        self._counting = threading.Lock()  # Never released: an atomic flag.
        self._finished = threading.Event()
        (sending or self).when_failed = self.when_failed = self._count_failure

    def begin(self) -> None:
        """Start the thread, which starts the sending thread. Once."""
        if not _start(self):
            self.cannot_start = self._sends_here = True

    def work(self) -> None:
        """Write until the last barrier or a rest, then end the sending thread and the segment."""
        sending = self.sending
        if sending is not None and sending.ident is None:
            self._sends_here = not _start(sending)
        if self._rests is None:
            self._rests = self._write()
        rests = self._rests
        if sending is not None and (rests or self._unattended.is_set()):
            sending.stop(time.monotonic() + REST_WITHIN_S)
        elif self._sends_here:
            return  # The thread that closes does the rest.
        if self._sends_here:
            self._end_here(rests)
        elif sending is not None:
            sending.join(REST_WITHIN_S + STOP_GRACE_S if rests else None)
            check()
            if sending.is_alive():  # It hangs; records that come now must reach the disk.
                self._pipeline.rested()
                sending.join()
                check()
                self._finish()
                return
        if not rests:
            self._refuse()
        self._finish()
        if rests:
            self._pipeline.rested()

    def write_here(self, barrier: Barrier) -> None:
        """Write on the calling thread up to `barrier`, which is in the queue."""
        with self._working_here:
            while not barrier.reached.is_set():
                self._queue.drain(self._taken, wait=False)
                self._append()

    def wait_delivered(self, deadline: float) -> bool:
        """Wait until everything in the segment is acknowledged; False after `deadline`."""
        if self.sending is None:
            return self.nothing_left()
        if self._sends_here:
            with self._working_here:
                return self.sending.send_here(self.segment.end, deadline)
        return self.sending.wait_delivered(self.segment.end, deadline)

    def end(self, deadline: float) -> None:
        """After the last barrier: send until `deadline`, then end the rest."""
        if self._finished.is_set():
            return
        if self.sending is not None:
            self.wait_delivered(deadline)
            self.sending.stop(deadline)
        if self._sends_here:
            self._end_here()
        elif threading.current_thread() not in (self, self.sending):  # Else a finalizer closes.
            self._finished.wait(max(0.0, deadline + STOP_GRACE_S - time.monotonic()))

    def nothing_left(self) -> bool:
        """Whether everything in the segment is delivered; offline, by other processes."""
        if self.sending is not None:
            return self.sending.position >= self.segment.end
        with suppress(OSError, MemoryError):
            return next(waiting_records(self.segment.paths), None) is None
        return False  # What cannot be looked at may be there.

    @property
    def unsaved(self) -> int:
        """How many records only memory has, but the queue, and losses that no file counts."""
        held = tuple(self._taken)  # One call: the spooling thread works them off meanwhile.
        kept, lost = self.segment.unsaved, self._stats.unsaved
        gone = max(kept, lost) if self._counting.locked() else kept + lost  # Counted already?
        return sum(isinstance(item, Item) for item in held) + gone

    def _write(self) -> bool:
        """Work until the last barrier (returns False), or until there is nothing to do (True)."""
        taken, queue = self._taken, self._queue
        while True:
            if not taken:
                # Under load the queue is only looked into every APPEND_EVERY_S. No thread waits in
                # get() then, so an offer needs no system call to wake this one.
                queue.drain(taken, timeout_s=None if self.sending is None else REST_S)
            if not taken:
                if self._is_idle():
                    return True
                continue
            if not queue.more and not any(isinstance(i, Item) and i.urgent for i in taken):
                # A burst of spans is the agent at work: leave it the interpreter.
                queue.linger(APPEND_EVERY_S)
                queue.drain(taken, wait=False)
            while taken:
                if not self._append():
                    return False
                if not queue.more:
                    queue.linger(APPEND_EVERY_S)
                queue.drain(taken, wait=False)

    def _count_failure(self) -> None:
        self._stats.restarted()
        self._stats.save_losses(self.segment.paths)

    def _is_idle(self) -> bool:
        with _guard.shield("delivery.may_rest"):
            # In this order: a trace's last record is in the queue before the trace is over.
            idle = self._pipeline.may_rest() and self._queue.empty and self.nothing_left()
            return idle and self.sending is not None and not self.sending.looks_for_leftovers
        return False

    def _refuse(self) -> None:
        """Count what is taken, and what is in the queue, as offered after the end."""
        self._queue.drain(self._taken, wait=False)
        while self._taken:
            item = self._taken[0]
            if isinstance(item, Item):
                self._lose(item.payload, CLOSED)
            else:
                item.reached.set()
            self._taken.popleft()
            self._queue.drain(self._taken, wait=False)

    def _append(self) -> bool:
        """Append what is taken; False when the last barrier was in it."""
        taken = self._taken
        while taken:
            first = taken[0]
            if isinstance(first, Barrier):
                first.reached.set()
                if first.last:  # It stays: if this thread fails, it finds it again.
                    return False
                taken.popleft()
                continue
            # What is kept may report losses: it is normalized when all before it is settled.
            more = takewhile(lambda i: isinstance(i, Item) and not i.keep, islice(taken, 1, None))
            batch = [first, *(item for item in more if isinstance(item, Item))]
            self._append_batch(batch)
            for _ in batch:  # Not before: if this thread fails, it goes on with them.
                taken.popleft()
        return True

    def _append_batch(self, batch: Sequence[Item]) -> None:
        records: list[Record] = []
        self._stats.add(recorded=len(batch))
        for payload, keep, _ in batch:
            try:
                data = self._pipeline.normalize(payload)
            except Forked:
                raise
            except MemoryError:
                self._lose(payload, NO_MEMORY)
            except BaseException as error:  # noqa: BLE001 - a bug costs this record only
                _guard.report("delivery.normalize", error)
                self._lose(payload, NORMALIZE_FAILED)
            else:
                if data is not None:
                    records.append((data, keep))
        check()  # Other plugins have seen the records, and may have waited.
        if records:
            self._store(records)
            self._stats.save_losses(self.segment.paths)
        if records and self.sending is not None:
            urgent = any(item.urgent for item in batch)
            self.sending.written(self.segment.end, urgent=urgent)

    def _store(self, records: Sequence[Record]) -> None:
        """Append records to the segment."""
        while records:
            try:
                lost, records = self.segment.append(records, time.time_ns()), ()
            except Forked:
                raise
            except BaseException as error:  # noqa: BLE001 - a bug costs the record at hand only
                _guard.report("delivery.spooling", error)
                at = self.segment.settled
                why = NO_MEMORY if isinstance(error, MemoryError) else SPOOLING_FAILED
                lost = [*self.segment.lost, (records[at][0], why)]
                records = records[at + 1 :]
            for data, reason in lost:
                self._lose(data, reason)

    def _end_here(self, rests: bool = False) -> None:
        """What is left to do when all is written, if there is no sending thread."""
        with self._working_here:
            if not self._finished.is_set():
                if self.sending is not None:
                    self.sending.work()
                if not rests:
                    self._refuse()
                self._finish()

    def _lose(self, data: Any, reason: str) -> None:
        self._stats.drop(reason)
        with _guard.shield("delivery.lost"):
            self._pipeline.lost(data, reason)

    def _finish(self) -> None:
        """Count what is lost with the memory, and close the segment. Once."""
        if self._finished.is_set():  # A signal handler has closed while this thread did.
            return
        if self._counting.acquire(blocking=False):
            for part in self.segment.parts():
                if isinstance(part, MemoryPart) and (left := part.records - part.acknowledged):
                    self._stats.drop(part.failure, left)
        self._stats.save_losses(self.segment.paths)
        delivered = self.sending is not None and self.sending.finished
        try:
            self.segment.close(delete=delivered or self.segment.end == 0)
        except OSError as error:
            _guard.warn(
                f"delivery.{self.segment.paths.directory}",
                "files of the spool that are done with stay there: %s",
                error,
            )
        except Exception as error:  # noqa: BLE001 - no caller is left to see it raised
            _guard.report("delivery.finish", error)
        self._finished.set()


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:  # Shutting down, or a limit of the system.
        if "shutdown" not in str(error):
            _guard.warn(
                "delivery.thread",
                "thread %s cannot be started (%s): records wait for a flush or the process's end",
                thread.name,
                error,
            )
        return False
    return True
