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
from collections.abc import Callable, Iterator
from pathlib import Path

from qitos_mlflow.delivery.adopter import Adopt
from qitos_mlflow.delivery.files import Paths
from qitos_mlflow.delivery.queue import ByteQueue
from qitos_mlflow.delivery.running import Running
from qitos_mlflow.delivery.segment import Segment
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool import waiting_records
from qitos_mlflow.delivery.stats import CLOSED, QUEUE_FULL, Snapshot

FORK_WAIT_S = 10.0
"""Longest time a fork waits for a sink that is just being opened (seconds): `import mlflow` and
the creation of a local store take five; a sink for a server, 0.2."""


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
        adopt: given the header of what a dead process has left in the spool, says how to open a
            sink for it; None: it is none of this pipeline's business. Not asked offline.
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
        adopt: Adopt | None = None,
    ) -> None:
        def running() -> Running:
            segment = Segment(
                directory,
                header,
                ship=open_sink is not None,
                cap_bytes=spool_bytes,
                memory_bytes=queue_bytes if open_sink is not None else 0,
            )
            queue = ByteQueue(queue_bytes)
            lost = dropped or (lambda _, __: None)
            return Running(queue, segment, refine, open_sink, lost, adopt)

        self._make_running = running
        self._running = running()
        self._closed = False
        _pipelines.add(self)

    def offer(self, payload: bytes, *, keep: bool = False, urgent: bool = False) -> bool:
        """Take `payload` on its way; False when it is refused, which is counted.

        Any thread, also inside signal handlers and finalizers. Never blocks, never raises.

        Args:
            payload: never changed afterwards.
            keep: take it also when the queue is full.
            urgent: send it at once: somebody waits for what comes of it.
        """
        running = self._running
        if self._closed:
            running.stats.drop(CLOSED)
            return False
        taken = running.queue.offer(payload, keep, urgent)
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
        a quarter of a second for the disk where that is less. What is left is in the spool.
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

    @property
    def paths(self) -> Paths:
        """The files of this process's segment; there are none before the first record."""
        return self._running.segment.paths

    def waiting(self) -> Iterator[bytes]:
        """The records that wait on disk, in order. Reads them: not for hot paths."""
        return waiting_records(self.paths)

    @property
    def unsaved(self) -> int:
        """How many records wait in memory, in place of a disk: lost if the process ends now."""
        return self._running.segment.unsaved

    def _after_fork(self) -> None:
        self._running.segment.disown()
        self._running = self._make_running()


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
    for lock in getattr(_forking, "locks", ()):
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
