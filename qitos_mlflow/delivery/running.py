"""What a pipeline has in one process: queue, segment, threads. Wires them, starts and ends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qitos_mlflow import _guard
from qitos_mlflow.delivery.adopter import Adopt, Adopter
from qitos_mlflow.delivery.cursor import Cursor
from qitos_mlflow.delivery.parts import MemoryPart
from qitos_mlflow.delivery.queue import Barrier, ByteQueue
from qitos_mlflow.delivery.retry import Circuit
from qitos_mlflow.delivery.segment import Segment
from qitos_mlflow.delivery.shipper import Shipper
from qitos_mlflow.delivery.shipping import Shipping
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool import waiting_records
from qitos_mlflow.delivery.stats import Stats
from qitos_mlflow.delivery.worker import Worker

DISK_GRACE_S = 0.25
"""close() gives the worker at least this long: what does not reach the disk is lost."""
STOP_GRACE_S = 0.1
"""close() gives the shipper at least this long to see that it shall stop, and free its lock."""


class Running:
    """What a pipeline has in one process."""

    def __init__(
        self,
        queue: ByteQueue,
        segment: Segment,
        refine: Callable[[bytes], bytes | None],
        open_sink: Callable[[], Sink] | None,
        dropped: Callable[[bytes, str], None],
        adopt: Adopt | None,
    ) -> None:
        self.queue = queue
        self.segment = segment
        self.stats = Stats()
        self.circuit = Circuit()
        self.opening = threading.RLock()
        """Held while a sink is opened, which may import much: no fork in the middle of that."""
        self._shipping: Shipping | None = None
        self._shipper: Shipper | None = None
        self._adopter: Adopter | None = None
        if open_sink is not None:
            cursor = Cursor(segment.paths, segment.parts, segment.discard, self.stats)
            self._shipping = Shipping(cursor, self._opener(open_sink))
            self._shipper = Shipper(self._shipping, self.circuit)
            if adopt is not None:
                self._adopter = self._make_adopter(adopt)
        self._worker = Worker(queue, refine, segment, self.stats, self._wrote, dropped)
        self._worker_thread = threading.Thread(
            target=self._work, name="qitos-mlflow-worker", daemon=True
        )
        self._shipper_thread = threading.Thread(
            target=self._ship, name="qitos-mlflow-shipper", daemon=True
        )
        self._once = threading.Lock()  # Taken by the first offer and never released.
        # Where no thread can be started (the interpreter is shutting down: 3.12 and later), flush
        # and close do its work themselves.
        self._no_worker = False
        self._no_shipper = False
        self._working_here = threading.Lock()
        self._closing = threading.Lock()
        self._last = Barrier(last=True)
        self._finished = False

    @property
    def used(self) -> bool:
        """Whether anything was ever offered."""
        return self._once.locked()

    def start(self) -> None:
        """Start the worker's thread, once; it starts the shipper's."""
        if self._once.acquire(blocking=False):
            self._no_worker = not _start(self._worker_thread)
            self._no_shipper = self._no_worker

    def flush(self, deadline: float) -> bool:
        """Wait until all offered so far is acknowledged, or for `deadline` (monotonic)."""
        return self._reach(Barrier(), deadline) and self._shipped(deadline)

    def close(self, deadline: float) -> bool:
        """Flush and end both threads; True when nothing is left."""
        if not self._closing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            if not self._finished:
                self._close(deadline)
            return self._nothing_left()
        finally:
            self._closing.release()

    def _close(self, deadline: float) -> None:
        if self._adopter is not None:
            self._adopter.stop()
        spooled_by = max(deadline, time.monotonic() + DISK_GRACE_S)
        if not self._reach(self._last, spooled_by):
            return
        self._worker.refuse()  # What came in between refusing offers and the worker's end.
        self._shipped(deadline)
        if self._shipper is not None and not self._no_shipper:
            self._shipper.stop(deadline)
            stopped_by = max(deadline, time.monotonic() + STOP_GRACE_S)
            self._shipper_thread.join(max(0.0, stopped_by - time.monotonic()))
        else:
            if self._shipper is not None:
                self._shipper.finish(deadline)
            self._finish()

    def _reach(self, barrier: Barrier, deadline: float) -> bool:
        """Bring everything offered so far to the segment."""
        if self._last.reached.is_set():
            return True
        if self._no_worker:
            with self._working_here:
                self._worker.run_to(barrier)
            return True
        self.queue.put(barrier)
        return barrier.reached.wait(max(0.0, deadline - time.monotonic()))

    def _shipped(self, deadline: float) -> bool:
        if self._shipper is None:
            return self._nothing_left()
        if self._no_shipper:
            with self._working_here:
                return self._shipper.ship_here(self.segment.end, deadline)
        return self._shipper.wait_shipped(self.segment.end, deadline)

    def _nothing_left(self) -> bool:
        if self._shipping is not None:
            return self._shipping.position >= self.segment.end
        return next(waiting_records(self.segment.paths), None) is None

    def _wrote(self, urgent: bool) -> None:
        if self._shipper is not None:
            self._shipper.written(self.segment.end, urgent=urgent)

    def _work(self) -> None:
        if self._shipper is not None:
            self._no_shipper = not _start(self._shipper_thread)
        self._worker.run()

    def _ship(self) -> None:
        assert self._shipper is not None
        if self._adopter is not None:
            self._adopter.start()
        self._shipper.run()
        # The last one out: close() has ended the worker before it stops the shipper, and may
        # itself be gone when a send that hung comes back.
        self._finish()

    def _make_adopter(self, adopt: Adopt) -> Adopter:
        def adopt_undisturbed(header: bytes) -> Callable[[], Sink] | None:
            open_sink = adopt(header)
            return None if open_sink is None else self._opener(open_sink)

        directory = self.segment.paths.directory
        return Adopter(directory, adopt_undisturbed, lambda: self.circuit.online is True)

    def _opener(self, open_sink: Callable[[], Sink]) -> Callable[[], Sink]:
        def open_undisturbed() -> Sink:
            with self.opening:
                return open_sink()

        return open_undisturbed

    def _finish(self) -> None:
        self._finished = True
        for part in self.segment.parts():
            lost = part.records - part.acknowledged
            if isinstance(part, MemoryPart) and lost:
                self.stats.drop(part.failure, lost)
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
    except RuntimeError:  # No more threads: shutting down, or a limit of the system.
        return False
    return True
