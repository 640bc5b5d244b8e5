"""Memory between the agent's threads and the spooling thread: bounded in bytes, never blocks.

Receives payloads on any thread, hands them to the spooling thread in order. Nothing here takes a
lock that another thread or an interrupted frame of this one could hold: `queue.SimpleQueue.put` is
documented to be reentrant, so a signal handler or a finalizer may offer at any moment.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sized
from functools import partial
from itertools import islice
from typing import NamedTuple

from qitos_mlflow._inheritance import check

ITEM_OVERHEAD_BYTES = 120
"""What CPython needs beside the payload (bytes): header, tuple, slot (measured: 97-121)."""

DRAIN_BYTES = 256 * 1024
"""Taken from the queue at once (bytes): small, as it adds to what the bound allows."""


class Item(NamedTuple):
    """A payload, whether to keep it when space is short, and whether a thread waits for it.

    `len` of the payload is what it takes in memory (bytes).
    """

    payload: Sized
    keep: bool
    urgent: bool


class Barrier:
    """A place in the queue: everything offered before it has passed when it is reached."""

    def __init__(self, *, last: bool = False) -> None:
        self.reached = threading.Event()
        self.last = last


class ByteQueue:
    """A queue of payloads holding at most `max_bytes`; `keep` payloads are always taken."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # Not exact: without a GIL, two threads that add at once may lose one addition.
        # drain() sets it right whenever it finds the queue empty.
        self._held_bytes = 0
        self.more = False
        """Whether the last drain stopped because it had enough. Spooling thread only."""
        self._barriers = 0  # Not exact either.
        self._items: queue.SimpleQueue[Item | Barrier] = queue.SimpleQueue()
        self._hurry = threading.Lock()  # A binary semaphore: held while no thread is in a hurry.
        self._hurry.acquire()

    def offer(self, payload: Sized, keep: bool = False, urgent: bool = False) -> bool:
        """Take `payload`, or refuse it: the queue is full, or there is no memory. Never blocks.

        Any thread. An urgent one ends `linger`.
        """
        try:
            size = len(payload) + ITEM_OVERHEAD_BYTES
            if not keep and self._held_bytes + size > self._max_bytes:
                return False
            self._items.put(Item(payload, keep, urgent))
            self._held_bytes += size
        except MemoryError:
            return False
        if urgent:
            self._end_linger()
        return True

    def put(self, barrier: Barrier) -> None:
        """Place a barrier behind everything offered so far and end `linger`."""
        self._barriers += 1
        self._items.put(barrier)
        self._end_linger()

    @property
    def empty(self) -> bool:
        """Whether `drain` would find nothing."""
        return self._items.empty()

    @property
    def records(self) -> int:
        """How many payloads wait, about."""
        return max(0, self._items.qsize() - self._barriers)

    def _end_linger(self) -> None:
        try:
            self._hurry.release()
        except RuntimeError:  # Already released: another thread is in a hurry too.
            pass

    def linger(self, timeout_s: float) -> None:
        """Let payloads gather for up to `timeout_s`; a barrier ends it. Spooling thread only."""
        self._hurry.acquire(timeout=timeout_s)
        check()

    def drain(
        self, into: deque[Item | Barrier], *, wait: bool = True, timeout_s: float | None = None
    ) -> None:
        """Move the oldest items, about `DRAIN_BYTES` of them. Spooling thread only.

        Args:
            into: what the caller has not worked off yet: they must not be lost with its thread.
            wait: block until there is one.
            timeout_s: block no longer than this.
        """
        taken_bytes = 0
        self.more = False
        get: Callable[[], Item | Barrier] = partial(self._items.get, wait, timeout_s)
        try:
            while True:
                # In C: what another thread injects into this one cannot come between the two.
                into.extend(islice(iter(get, None), 1))
                item = into[-1]
                if isinstance(item, Item):
                    taken_bytes += len(item.payload) + ITEM_OVERHEAD_BYTES
                else:
                    self._barriers -= 1
                if taken_bytes >= DRAIN_BYTES:
                    self.more = True
                    break
                get = self._items.get_nowait
        except queue.Empty:
            self._held_bytes = 0
        else:
            self._held_bytes = max(0, self._held_bytes - taken_bytes)
        check()
