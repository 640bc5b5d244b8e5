"""The whole way from an agent's thread to the server, as one object.

    offer() -> ByteQueue -> Worker (thread) -> Segment on disk -> Shipper (thread) -> sink

The worker only fills the disk and the shipper only empties it, so a server that hangs does not
delay the moment from which a record survives the process. Import and construction start nothing;
the first offer does. A forked child begins anew: its own queue, segment and threads.
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
from collections.abc import Callable
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.cursor import Cursor
from qitos_mlflow.delivery.parts import MemoryPart
from qitos_mlflow.delivery.queue import Barrier, ByteQueue
from qitos_mlflow.delivery.retry import Circuit
from qitos_mlflow.delivery.segment import Segment
from qitos_mlflow.delivery.shipper import Shipper
from qitos_mlflow.delivery.shipping import Shipping
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool import waiting_records
from qitos_mlflow.delivery.stats import CLOSED, QUEUE_FULL, Snapshot, Stats
from qitos_mlflow.delivery.worker import Worker

DISK_GRACE_S = 0.25
"""close() gives the worker at least this long: what does not reach the disk is lost."""
STOP_GRACE_S = 0.1
"""close() gives the shipper at least this long to see that it shall stop, and free its lock."""

FORK_WAIT_S = 2.0
"""Longest time a fork waits for a sink that is just being opened (seconds)."""


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
            and the reason; the record is as refined, or as offered where refining failed.
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
        dropped: Callable[[bytes, str], None] | None = None,
    ) -> None:
        def running() -> _Running:
            segment = Segment(
                directory,
                header,
                ship=open_sink is not None,
                cap_bytes=spool_bytes,
                memory_bytes=queue_bytes if open_sink is not None else 0,
            )
            queue = ByteQueue(queue_bytes)
            return _Running(queue, segment, refine, open_sink, dropped or (lambda _, __: None))

        self._make_running = running
        self._running = running()
        self._closed = False
        _pipelines.add(self)

    def offer(self, payload: bytes, *, keep: bool = False) -> bool:
        """Take `payload` on its way; False when it is refused, which is counted.

        Any thread, also inside signal handlers and finalizers. Never blocks, never raises.

        Args:
            payload: never changed afterwards.
            keep: take it also when the queue is full, and send it at once.
        """
        running = self._running
        if self._closed:
            running.stats.drop(CLOSED)
            return False
        taken = running.queue.offer(payload, keep)
        if not taken:
            running.stats.drop(QUEUE_FULL)
        if not running.used:
            running.start()
        return taken

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything offered before the call is acknowledged.

        False when `timeout_s` passes first, or offline while nobody else has delivered it. Any
        thread. Tries a server that failed once more at once.
        """
        running = self._running
        return not running.used or running.flush(time.monotonic() + timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Flush, end the threads, give up the locks; True when nothing is left.

        Later offers are refused. Any thread, any number of times. Takes at most `timeout_s`, and
        `DISK_GRACE_S` for the disk where that is less. What is left is in the spool.
        """
        self._closed = True
        running = self._running
        return not running.used or running.close(time.monotonic() + timeout_s)

    @property
    def stats(self) -> Snapshot:
        """What became of the records of this process so far."""
        return self._running.stats.snapshot()

    @property
    def online(self) -> bool | None:
        """Whether the last attempt to reach the server succeeded; None before the first ended."""
        return self._running.circuit.online

    def leftover(self) -> tuple[int, list[Path]]:
        """How many records wait on disk, and the files they are in. Reads them: not for hot paths.

        `waiting_records` gives the records themselves.
        """
        paths = self._running.segment.paths
        records = sum(1 for _ in waiting_records(paths))
        return records, [path for _, path in paths.parts()] if records else []

    def _after_fork(self) -> None:
        self._running.segment.disown()
        self._running = self._make_running()


class _Running:
    """What a pipeline has in one process."""

    def __init__(
        self,
        queue: ByteQueue,
        segment: Segment,
        refine: Callable[[bytes], bytes | None],
        open_sink: Callable[[], Sink] | None,
        dropped: Callable[[bytes, str], None],
    ) -> None:
        self.queue = queue
        self.segment = segment
        self.stats = Stats()
        self.circuit = Circuit()
        self.opening = threading.RLock()
        """Held while a sink is opened, which may import much: no fork in the middle of that."""
        self._shipping: Shipping | None = None
        self._shipper: Shipper | None = None
        if open_sink is not None:
            cursor = Cursor(segment.paths, segment.parts, segment.discard, self.stats)
            self._shipping = Shipping(cursor, self._opener(open_sink))
            self._shipper = Shipper(self._shipping, self.circuit)
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
        return self._reach(Barrier(), deadline) and self._shipped(deadline)

    def close(self, deadline: float) -> bool:
        if not self._closing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            if not self._finished:
                self._close(deadline)
            return self._nothing_left()
        finally:
            self._closing.release()

    def _close(self, deadline: float) -> None:
        spooled_by = max(deadline, time.monotonic() + DISK_GRACE_S)
        if not self._reach(self._last, spooled_by):
            return
        self._refuse_late()
        self._shipped(deadline)
        if self._shipper is not None and not self._no_shipper:
            self._shipper.stop()
            stopped_by = max(deadline, time.monotonic() + STOP_GRACE_S)
            self._shipper_thread.join(max(0.0, stopped_by - time.monotonic()))
        else:
            if self._shipping is not None:
                self._shipping.close()
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

    def _refuse_late(self) -> None:
        """Count what came in between close() refusing offers and the worker's end."""
        for item in self.queue.drain(wait=False):
            if isinstance(item, Barrier):
                item.reached.set()
            else:
                self.stats.drop(CLOSED)

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
        self._shipper.run()
        # The last one out: close() has ended the worker before it stops the shipper, and may
        # itself be gone when a send that hung comes back.
        self._finish()

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
        shipped = self._shipping is not None and self._nothing_left()
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


_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


_forking = threading.local()


def _before_fork() -> None:
    # A module that a thread is importing during a fork stays locked in the child for ever: its
    # own import of mlflow would hang. The wait is bounded, so that it cannot deadlock.
    deadline = time.monotonic() + FORK_WAIT_S
    locks = [pipeline._running.opening for pipeline in list(_pipelines)]
    _forking.locks = [
        lock for lock in locks if lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
    ]


def _after_fork_in_parent() -> None:
    for lock in _forking.locks:
        lock.release()


def _after_fork_in_child() -> None:
    for pipeline in list(_pipelines):
        pipeline._after_fork()


if hasattr(os, "register_at_fork"):  # Where there is no fork there is nothing to repair.
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
