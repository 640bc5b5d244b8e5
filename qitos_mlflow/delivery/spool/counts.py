"""Counts of what became of the records, losses by reason. There is no loss without a count."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ASIDE_FULL = "aside_full"
"""Refused by the server or damaged, and not kept: what is kept aside has reached its share."""
CLOSED = "closed"
"""Offered after close()."""
DISK_FULL = "disk_full"
"""The disk took no more, and the memory that stands in for it was full, or there was none."""
NORMALIZE_FAILED = "normalize_failed"
"""The function that decodes and redacts raised; what cannot be redacted is not stored."""
QUEUE_FULL = "queue_full"
"""The queue had reached its bound: records came faster than the disk takes them."""
SPOOLING_FAILED = "spooling_failed"
"""A bug on the spooling thread cost these records; the log has the exception."""
SPOOL_FULL = "spool_full"
"""The spool directory has reached its cap."""
SPOOL_REMOVED = "spool_removed"
"""The segment's file was deleted or cut short before its records were sent."""
SPOOL_UNREADABLE = "spool_unreadable"
"""A part could not be read for long and is kept aside; another process's counts as one record."""
SPOOL_UNWRITABLE = "spool_unwritable"
"""The spool directory cannot be written, and the memory that stands in for it was full."""

_FULL = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)
}  # Windows has no quota error.


def reason_of(error: OSError) -> str:
    """Why the spool could not be written, as a reason to count under."""
    return DISK_FULL if error.errno in _FULL else SPOOL_UNWRITABLE


@dataclass(frozen=True)
class CountsSnapshot:
    """The counts at one moment, in records, except `bad_lines`."""

    dropped: Mapping[str, int]
    """Lost, by reason."""
    recorded: int = 0
    """Reached the spooling thread (those that `offer` refused are in `dropped` only)."""
    delivered: int = 0
    """Accepted by the server and acknowledged."""
    dead_letters: int = 0
    """Refused by the server for good, kept in the dead-letter file."""
    bad_lines: int = 0
    """Torn or corrupt lines of the spool, kept aside."""


class Counts:
    """Counts that any thread may add to and read.

    Args:
        total: other counts, which everything is added to as well.
    """

    def __init__(self, total: Counts | None = None) -> None:
        self._total = total
        # Reentrant: a signal handler may offer a record while this thread counts one.
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._saved: Counter[str] = Counter()
        self._saving = threading.Lock()

    def add(self, **counts: int) -> None:
        """Add to the counts, which have the names of `CountsSnapshot`."""
        with self._lock:
            self._counts.update(counts)
        if self._total is not None:
            self._total.add(**counts)

    def drop(self, reason: str, records: int = 1) -> None:
        """Count records lost for `reason`."""
        with self._lock:
            self._dropped[reason] += records
        if self._total is not None:
            self._total.drop(reason, records)

    def save_losses(self, save: Callable[[Counter[str]], None]) -> None:
        """Call `save` with the losses that are not saved yet, if any; still so when it raises.

        If another thread is doing that now, it is left for the next call.
        """
        if not self._saving.acquire(blocking=False):
            return
        try:
            with self._lock:
                dropped = self._dropped.copy()
            if new := dropped - self._saved:
                save(new)
                self._saved = dropped
        finally:
            self._saving.release()

    def snapshot(self) -> CountsSnapshot:
        """The counts now; what one thread has added is seen whole."""
        with self._lock:
            return CountsSnapshot(dict(self._dropped), **self._counts)
