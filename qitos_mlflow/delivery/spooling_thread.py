"""The thread between memory and disk: queue -> normalize -> segment.

It waits for nothing but the disk, so a server that hangs never delays the moment from which
records survive the process. A bug costs the records at hand, which are counted, never the thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qitos_mlflow import _guard
from qitos_mlflow.delivery.byte_queue import Barrier, ByteQueue, Item
from qitos_mlflow.delivery.spool.counts import CLOSED, NORMALIZE_FAILED, SPOOLING_FAILED, Counts
from qitos_mlflow.delivery.spool.writer import Record, SegmentWriter

APPEND_EVERY_S = 0.02
"""Records gather this long between two appends (seconds): with the append itself, what a kill
costs."""


class SpoolingThread:
    """Appends what is offered until the last barrier. `run` is the thread.

    Args:
        queue: where the records come from.
        normalize: decodes and redacts; None drops the record on purpose, an exception counts it.
        segment: where the records go.
        stats: counts what is recorded and what is lost.
        dropped: called with every record lost here, and the reason.
        wrote: called after each append, with whether it held an urgent record.
    """

    def __init__(
        self,
        queue: ByteQueue,
        normalize: Callable[[bytes], bytes | None],
        segment: SegmentWriter,
        stats: Counts,
        dropped: Callable[[bytes, str], None],
        wrote: Callable[[bool], None],
    ) -> None:
        self._queue = queue
        self._normalize = normalize
        self._segment = segment
        self._stats = stats
        self._dropped = dropped
        self._wrote = wrote
        self.held = 0
        """Records taken from the queue that are not appended yet."""

    def run(self, idle_s: float | None, may_rest: Callable[[], bool]) -> bool:
        """Work until the last barrier (returns False), or until there is nothing to do (True).

        Args:
            idle_s: how long the queue stays empty before `may_rest` is asked; None: it never is.
            may_rest: whether to end then.
        """
        while True:
            # Under load the queue is only looked into every APPEND_EVERY_S. No thread waits in
            # get() then, so an offer needs no system call to wake this one.
            items = self._queue.drain(timeout_s=idle_s)
            if not items:
                # In this order: a trace's last record is in the queue before the trace is over.
                if may_rest() and self._queue.empty:
                    return True
                continue
            if not self._queue.more and not any(isinstance(i, Item) and i.urgent for i in items):
                # A burst of spans is the agent at work: leave it the interpreter.
                self._queue.linger(APPEND_EVERY_S)
                items += self._queue.drain(wait=False)
            while items:
                if not self._append(items):
                    return False
                if not self._queue.more:
                    self._queue.linger(APPEND_EVERY_S)
                items = self._queue.drain(wait=False)

    def run_to(self, barrier: Barrier) -> None:
        """Do on the calling thread what `run` would do, up to `barrier`, which is in the queue."""
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
                if item.keep:  # It may report losses: normalized when all before it is settled.
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
                data = self._normalized(payload)
                if data is not None:
                    records.append(Record(data, keep))
            if not records:
                return
            for data, reason in self._segment.append(records, time.time_ns()):
                self._lose(data, reason)
            self._wrote(any(item.urgent for item in batch))
        except Exception as error:  # noqa: BLE001 - a bug must not end the thread
            _guard.report("delivery.spooling", error)
            for record in records:
                self._lose(record.data, SPOOLING_FAILED)
        finally:
            self.held -= len(batch)

    def _normalized(self, payload: bytes) -> bytes | None:
        try:
            return self._normalize(payload)
        except Exception as error:  # noqa: BLE001 - the caller's bug costs this record only
            _guard.report("delivery.normalize", error)
            self._lose(payload, NORMALIZE_FAILED)
            return None

    def _lose(self, data: bytes, reason: str) -> None:
        self._stats.drop(reason)
        try:
            self._dropped(data, reason)
        except Exception as error:  # noqa: BLE001 - the caller's ledger must not stop ours
            _guard.report("delivery.dropped", error)
