"""The threads and files of a pipeline at work: spooling thread, segment, sending thread.

They begin with a record. They end with `end`, or by themselves when no record has come for
`REST_S`, none is expected and everything is delivered: then the pipeline rests, and the next record
begins with new ones. Offline, and while the server is away, they stay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qitos_mlflow import _guard
from qitos_mlflow.delivery.byte_queue import Barrier
from qitos_mlflow.delivery.sending_thread import SendingThread
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.parts import MemoryPart
from qitos_mlflow.delivery.spool.segments import waiting_records
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from qitos_mlflow.delivery.spooling_thread import SpoolingThread

REST_S = 3.0
"""Threads and files may go after this long without a record; waking costs a few requests."""
REST_WITHIN_S = 1.0
"""To end what is left open before a rest (seconds); records that come meanwhile wait in memory."""
STOP_GRACE_S = 0.1
"""How long the sending thread has to notice that it is to stop, and free its lock (seconds)."""


class PipelineThreads:
    """A pipeline at work, once started.

    Args:
        spooling: what the spooling thread does.
        sending: what the sending thread does; None offline.
        segment: where records go; its own.
        stats: what is lost from memory at the end is counted here.
        unattended: set if no thread will call `end`. Then the spooling thread ends the rest once it
            has written what it has.
        may_rest: asked on the spooling thread whether no more records are expected.
        rested: called on the spooling thread, last, when threads and files are gone.
    """

    def __init__(
        self,
        spooling: SpoolingThread,
        sending: SendingThread | None,
        segment: SegmentWriter,
        stats: Counts,
        unattended: threading.Event,
        may_rest: Callable[[], bool],
        rested: Callable[[], None],
    ) -> None:
        self.segment = segment
        self.cannot_start = False
        """No thread can be started (the interpreter is shutting down: 3.12 and later): flush and
        close do the work themselves."""
        self._spooling = spooling
        self._sending = sending
        self._stats = stats
        self._unattended = unattended
        self._may_rest = may_rest
        self._rested = rested
        self._no_sending_thread = False
        self._spooling_thread = threading.Thread(
            target=self._spool, name="qitos-mlflow-spooling", daemon=True
        )
        self._sending_thread = threading.Thread(
            target=self._send, name="qitos-mlflow-sending", daemon=True
        )
        self._working_here = threading.RLock()
        self._finished = False

    def start(self) -> None:
        """Start the spooling thread; it starts the sending thread. Once."""
        self.cannot_start = self._no_sending_thread = not _start(self._spooling_thread)

    def spool_here(self, barrier: Barrier) -> None:
        """Do the spooling thread's work on the calling thread until it reaches `barrier`."""
        with self._working_here:
            self._spooling.run_to(barrier)

    def wait_delivered(self, deadline: float) -> bool:
        """Wait until everything in the segment is acknowledged; False after `deadline`."""
        if self._sending is None:
            return self.nothing_left()
        if self._no_sending_thread:
            with self._working_here:
                return self._sending.send_here(self.segment.end, deadline)
        return self._sending.wait_delivered(self.segment.end, deadline)

    def end(self, deadline: float) -> None:
        """After the spooling thread's last barrier: send until `deadline`, then end the rest."""
        if not self._finished:
            self._spooling.refuse()  # Records that came between `refuse` and the last barrier.
            self.wait_delivered(deadline)
            self._stop(deadline)

    def nothing_left(self) -> bool:
        """Whether everything in the segment is delivered; offline, by other processes."""
        if self._sending is not None:
            return self._sending.position >= self.segment.end
        return next(waiting_records(self.segment.paths), None) is None

    @property
    def unsaved(self) -> int:
        """How many records are in memory only, the queue's not counted."""
        return self._spooling.held + self.segment.unsaved

    def _spool(self) -> None:
        if self._sending is not None:
            self._no_sending_thread = not _start(self._sending_thread)
        rests = self._spooling.run(None if self._sending is None else REST_S, self._is_idle)
        if rests or self._unattended.is_set():
            self._stop(time.monotonic() + REST_WITHIN_S)
        if rests:
            self._rested()

    def _is_idle(self) -> bool:
        try:
            if not self._may_rest():
                return False
        except Exception as error:  # noqa: BLE001 - the owner's bug must not end the thread
            _guard.report("delivery.may_rest", error)
            return False
        assert self._sending is not None  # Offline this is never asked.
        return self.nothing_left() and not self._sending.looks_for_leftovers

    def _stop(self, deadline: float) -> None:
        if self._sending is not None and not self._no_sending_thread:
            self._sending.stop(deadline)
            if threading.current_thread() is not self._sending_thread:  # Else a finalizer closes.
                self._sending_thread.join(max(0.0, deadline + STOP_GRACE_S - time.monotonic()))
        else:
            if self._sending is not None:
                self._sending.finish(deadline)
            self._finish()

    def _send(self) -> None:
        assert self._sending is not None
        self._sending.run()
        # The last thread out: the spooling thread ends before the sending thread is stopped, and
        # the thread that stopped it may be gone when a send that hung comes back.
        self._finish()

    def _finish(self) -> None:
        if self._finished:  # A signal handler has closed while this thread did.
            return
        self._finished = True
        for part in self.segment.parts():
            lost = part.records - part.acknowledged
            if isinstance(part, MemoryPart) and lost:
                self._stats.drop(part.failure, lost)
        self._stats.save_losses(self.segment.paths)
        delivered = self._sending is not None and self._sending.finished
        try:
            self.segment.close(delete=delivered or self.segment.end == 0)
        except OSError as error:
            _guard.warn(
                "delivery.finish", "files of the spool that are done with stay there: %s", error
            )
        except Exception as error:  # noqa: BLE001 - no caller is left to see it raised
            _guard.report("delivery.finish", error)


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError as error:  # No more threads: shutting down, or a limit of the system.
        if "shutdown" not in str(error):
            _guard.warn(
                "delivery.thread",
                "the thread %s cannot be started (%s): records wait for the next flush or the end "
                "of the process",
                thread.name,
                error,
            )
        return False
    return True
