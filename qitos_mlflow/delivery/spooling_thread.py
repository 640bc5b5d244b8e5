"""The thread between memory and disk: queue -> refine -> segment.

It waits for nothing but the disk, so that a server that hangs never delays the moment from which
records survive the process. A bug costs the records at hand, counted, never the thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qitos_mlflow import _guard
from qitos_mlflow.delivery.byte_queue import Barrier, ByteQueue, Item
from qitos_mlflow.delivery.spool.counts import CLOSED, REFINE_FAILED, WORKER_FAILED, Counts
from qitos_mlflow.delivery.spool.writer import Record, SegmentWriter

LINGER_S = 0.02
"""Records gather this long between two appends: what a kill costs at most, beside the append."""


class SpoolingThread:
    """Appends what is offered until the last barrier. `run` is the thread.

    Args:
        refine: decodes and redacts; None drops the record on purpose, an exception counts it.
        wrote: told after each append whether it held an urgent record.
        dropped: told every record lost here, with the reason.
    """

    def __init__(
        self,
        queue: ByteQueue,
        refine: Callable[[bytes], bytes | None],
        segment: SegmentWriter,
        stats: Counts,
        wrote: Callable[[bool], None],
        dropped: Callable[[bytes, str], None],
    ) -> None:
        self._queue = queue
        self._refine = refine
        self._segment = segment
        self._stats = stats
        self._wrote = wrote
        self._dropped = dropped
        self.held = 0
        """Records taken from the queue that are not appended yet."""

    def run(self, idle_s: float, may_rest: Callable[[], bool]) -> bool:
        """Work until the last barrier is reached (False), or there is nothing to do (True).

        Args:
            idle_s: how long nothing has to come before `may_rest` is asked.
            may_rest: whether that is reason enough.
        """
        while True:
            # Under load the queue is only looked into every LINGER_S; nobody waits in get(), so
            # that an offer needs no system call to wake this thread.
            items = self._queue.drain(timeout_s=idle_s)
            if not items:
                if may_rest():
                    return True
                continue
            if not self._queue.more and not any(isinstance(i, Item) and i.urgent for i in items):
                # A burst of spans is the agent at work: let it have the interpreter to itself.
                self._queue.linger(LINGER_S)
                items += self._queue.drain(wait=False)
            while items:
                if not self._append(items):
                    return False
                if not self._queue.more:
                    self._queue.linger(LINGER_S)
                items = self._queue.drain(wait=False)

    def run_to(self, barrier: Barrier) -> None:
        """Do on this thread what `run` would do, up to `barrier`, which is in the queue."""
        while not barrier.reached.is_set():
            self._append(self._queue.drain(wait=False))

    def refuse(self, items: Sequence[Item | Barrier] = ()) -> None:
        """Count `items`, and what is in the queue, as offered after the end."""
        while items or (items := self._queue.drain(wait=False)):
            for item in items:
                if isinstance(item, Item):
                    self._lose(item.payload, CLOSED)
                else:
                    item.reached.set()
            items = ()

    def _append(self, items: Sequence[Item | Barrier]) -> bool:
        """Append the items; False when the last barrier was among them."""
        batch: list[Item] = []
        self.held = sum(isinstance(item, Item) for item in items)
        for index, item in enumerate(items):
            if isinstance(item, Item):
                if item.keep:  # It may tell what was lost: refined when all before it is settled.
                    self._append_batch(batch)
                    batch = []
                batch.append(item)
                continue
            self._append_batch(batch)
            batch = []
            if item.last:
                self.held = 0
                self.refuse(items[index + 1 :])
            item.reached.set()
            if item.last:
                return False
        self._append_batch(batch)
        return True

    def _append_batch(self, batch: Sequence[Item]) -> None:
        if not batch:
            return
        records: list[Record] = []
        try:
            self._stats.add(recorded=len(batch))
            for payload, keep, _ in batch:
                data = self._refined(payload)
                if data is not None:
                    records.append(Record(data, keep))
            if not records:
                return
            for data, reason in self._segment.append(records, time.time_ns()):
                self._lose(data, reason)
            self._wrote(any(item.urgent for item in batch))
        except Exception as error:  # noqa: BLE001 - a bug must not end the thread
            _guard.report("delivery.worker", error)
            for record in records:
                self._lose(record.data, WORKER_FAILED)
        finally:
            self.held -= len(batch)

    def _refined(self, payload: bytes) -> bytes | None:
        try:
            return self._refine(payload)
        except Exception as error:  # noqa: BLE001 - the caller's bug costs this record only
            _guard.report("delivery.refine", error)
            self._lose(payload, REFINE_FAILED)
            return None

    def _lose(self, data: bytes, reason: str) -> None:
        self._stats.drop(reason)
        try:
            self._dropped(data, reason)
        except Exception as error:  # noqa: BLE001 - the caller's ledger must not stop ours
            _guard.report("delivery.dropped", error)
