"""The threads and files of a pipeline while it is at work: worker, segment, shipper, adopter.

They begin with a record and end with `end`, or by themselves: where nothing has come for `REST_S`
and no more is expected, they go to rest once everything is delivered, or while the server is away,
or offline, left to another pipeline of this process. The next record begins with new ones. So of
pipelines that nobody uses any more, closed or not, at most one costs anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from qitos_mlflow import _guard
from qitos_mlflow.delivery.adopter import Adopt, Adopter
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.byte_queue import Barrier, ByteQueue
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.sending_thread import SendingThread
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.dead_letters import DeadLetters
from qitos_mlflow.delivery.spool.parts import MemoryPart
from qitos_mlflow.delivery.spool.reader import SegmentReader
from qitos_mlflow.delivery.spool.segments import waiting_records
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from qitos_mlflow.delivery.spooling_thread import SpoolingThread

ASIDE_SHARE = 0.1
"""What is kept aside may take so much of the spool's size, beyond it."""
REST_S = 3.0
"""After so long without a record threads and files may go; waking costs a few requests."""
REST_WITHIN_S = 1.0
"""To end what is left open before a rest (seconds); records that come meanwhile wait in memory."""
STOP_GRACE_S = 0.1
"""The shipper is given this long to see that it shall stop, and free its lock (seconds)."""


class Shared:
    """What a pipeline has in one process, at work or at rest."""

    def __init__(self, queue_bytes: int) -> None:
        self.queue = ByteQueue(queue_bytes)
        self.stats = Counts()
        self.circuit = Circuit()
        self.opening = threading.RLock()
        """Held while a sink is opened, which may import much: no fork in the middle of that."""

    def forget_outage(self) -> None:
        """At rest nobody finds out when the server is back: begin again without an opinion."""
        if not self.circuit.online:
            self.circuit = Circuit()


@dataclass(frozen=True)
class Asks:
    """What a pipeline's threads ask of its owner; see `Pipeline` for each."""

    refine: Callable[[bytes], bytes | None]
    open_sink: Callable[[], Sink] | None
    dropped: Callable[[bytes, str], None]
    adopt: Adopt | None
    may_rest: Callable[[], bool]


class PipelineThreads:
    """A pipeline at work, once started.

    Args:
        shared: what outlasts it.
        segment: where records go; its own.
        asks: what its threads call.
        hand_over: has somebody else deliver what is left in the segment; False: there is nobody.
        rested: told on the worker's thread, as the last that it does, that all is at rest.
    """

    def __init__(
        self,
        shared: Shared,
        segment: SegmentWriter,
        asks: Asks,
        hand_over: Callable[[], bool],
        rested: Callable[[], None],
    ) -> None:
        self.segment = segment
        self.no_worker = False
        """Where no thread can be started (the interpreter is shutting down: 3.12 and later),
        flush and close do its work themselves."""
        self._no_shipper = False
        self._shared = shared
        self._may_rest = asks.may_rest
        self._hand_over = hand_over
        self._rested = rested
        self._aside = DeadLetters(segment.paths, shared.stats, int(segment.cap_bytes * ASIDE_SHARE))
        self._shipping: SegmentTransfer | None = None
        self._shipper: SendingThread | None = None
        self._adopter: Adopter | None = None
        if asks.open_sink is not None:
            cursor = SegmentReader(
                segment.paths, segment.parts, segment.discard, shared.stats, self._aside
            )
            self._shipping = SegmentTransfer(cursor, self._opener(asks.open_sink))
            self._shipper = SendingThread(self._shipping, shared.circuit)
            if asks.adopt is not None:
                self._adopter = self._make_adopter(asks.adopt)
        self._worker = SpoolingThread(
            shared.queue, asks.refine, segment, shared.stats, self._wrote, asks.dropped
        )
        self._worker_thread = threading.Thread(
            target=self._work, name="qitos-mlflow-worker", daemon=True
        )
        self._shipper_thread = threading.Thread(
            target=self._ship, name="qitos-mlflow-shipper", daemon=True
        )
        self._working_here = threading.RLock()
        self._unattended = False
        self._finished = False

    def start(self) -> None:
        """Start the worker's thread; it starts the shipper's. Once."""
        self.no_worker = not _start(self._worker_thread)
        self._no_shipper = self.no_worker

    def work_here(self, barrier: Barrier) -> None:
        """Do the worker's work on this thread until it reaches `barrier`."""
        with self._working_here:
            self._worker.run_to(barrier)

    def shipped(self, deadline: float) -> bool:
        """Wait until all in the segment is acknowledged, or for `deadline` (monotonic)."""
        if self._shipper is None:
            return self.nothing_left()
        if self._no_shipper:
            with self._working_here:
                return self._shipper.ship_here(self.segment.end, deadline)
        return self._shipper.wait_shipped(self.segment.end, deadline)

    def end(self, deadline: float) -> None:
        """After the worker's end: ship until `deadline` and end all else."""
        if not self._finished:
            if self._adopter is not None:
                self._adopter.stop()
            self._worker.refuse()  # What came in between refusing offers and the worker's end.
            self.shipped(deadline)
            self._stop(deadline)

    def adopt(self) -> None:
        """Do not rest before the adopter has looked once more."""
        if self._adopter is not None:
            self._adopter.busy = True

    def leave(self) -> None:
        """Have the worker end all else when it has written what it has: nobody waits for it."""
        self._unattended = True

    def nothing_left(self) -> bool:
        """Whether all in the segment is delivered; offline, by others."""
        if self._shipping is not None:
            return self._shipping.position >= self.segment.end
        return next(waiting_records(self.segment.paths), None) is None

    @property
    def unsaved(self) -> int:
        """How many records are in memory only."""
        return self._shared.queue.records + self._worker.held + self.segment.unsaved

    def save_losses(self) -> None:
        """Have what was lost on disk, for other processes to see."""
        self._aside.save_losses()

    def _wrote(self, urgent: bool) -> None:
        self.save_losses()
        if self._shipper is not None:
            self._shipper.written(self.segment.end, urgent=urgent)

    def _work(self) -> None:
        if self._shipper is not None:
            self._no_shipper = not _start(self._shipper_thread)
        rests = self._worker.run(REST_S, self._is_idle)
        if rests or self._unattended:
            self._stop(time.monotonic() + REST_WITHIN_S)
        if rests:
            self._rested()

    def _is_idle(self) -> bool:
        try:
            # In this order: the end of what was going is in the queue before it is over.
            if not self._may_rest() or not self._shared.queue.empty:
                return False
            if self._shipping is None or not self.nothing_left():
                waited_for = self._shipper is not None and self._shipper.waited_for
                return not waited_for and self._hand_over()
            adopting = self._adopter is not None and self._adopter.busy
            return not (adopting and self._shared.circuit.online)
        except Exception as error:  # noqa: BLE001 - the owner's bug must not end the thread
            _guard.report("delivery.may_rest", error)
            return False

    def _stop(self, deadline: float) -> None:
        if self._adopter is not None:
            self._adopter.stop()
        if self._shipper is not None and not self._no_shipper:
            self._shipper.stop(deadline)
            self._shipper_thread.join(max(0.0, deadline + STOP_GRACE_S - time.monotonic()))
        else:
            if self._shipper is not None:
                self._shipper.finish(deadline)
            self._finish()

    def _ship(self) -> None:
        assert self._shipper is not None
        if self._adopter is not None:
            self._adopter.start()
        self._shipper.run()
        # The last one out: the worker has ended before the shipper is stopped, and who stopped it
        # may itself be gone when a send that hung comes back.
        self._finish()

    def _make_adopter(self, adopt: Adopt) -> Adopter:
        def adopt_undisturbed(header: bytes) -> Callable[[], Sink] | None:
            open_sink = adopt(header)
            return None if open_sink is None else self._opener(open_sink)

        directory = self.segment.paths.directory
        return Adopter(directory, adopt_undisturbed, lambda: self._shared.circuit.online is True)

    def _opener(self, open_sink: Callable[[], Sink]) -> Callable[[], Sink]:
        def open_undisturbed() -> Sink:
            with self._shared.opening:
                return open_sink()

        return open_undisturbed

    def _finish(self) -> None:
        if self._finished:  # A signal handler has closed while this thread did.
            return
        self._finished = True
        for part in self.segment.parts():
            lost = part.records - part.acknowledged
            if isinstance(part, MemoryPart) and lost:
                self._shared.stats.drop(part.failure, lost)
        self.save_losses()
        shipped = self._shipper is not None and self._shipper.finished
        try:
            self.segment.close(delete=shipped or self.segment.end == 0)
        except OSError as error:
            _guard.warn("delivery.finish", "cannot tidy up the spool: %s", error)
        except Exception as error:  # noqa: BLE001 - nobody is left to see it raised
            _guard.report("delivery.finish", error)


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError as error:  # No more threads: shutting down, or a limit of the system.
        if "shutdown" not in str(error):
            _guard.warn(
                "delivery.thread",
                "%s (%s): what is recorded waits for the next flush or the end of the process",
                error,
                thread.name,
            )
        return False
    return True
