"""Counts of what became of the records, losses by reason. There is no loss without a count."""

from __future__ import annotations

import errno
import json
import threading
from collections import Counter
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool.files import json_object, read_whole, replace_private
from qitos_mlflow.delivery.spool.paths import Paths

ASIDE_FULL = "aside_full"
"""Refused by the server or damaged, and not kept: what is kept aside has reached its bound."""
CLOSED = "closed"
"""Offered after close()."""
DISK_FULL = "disk_full"
"""The disk took no more, and the memory that stands in for it was full, or there was none."""
NO_MEMORY = "no_memory"
"""The process had too little memory to encode or decode the record."""
NORMALIZE_FAILED = "normalize_failed"
"""The function that decodes and redacts raised; what cannot be redacted is not stored."""
QUEUE_FULL = "queue_full"
"""The queue had reached its bound: records came faster than the disk takes them."""
SPOOLING_FAILED = "spooling_failed"
"""A bug on the spooling thread cost these records; the log has the exception."""
RECORD_TOO_LARGE = "record_too_large"
"""No line of the spool may be as large as this record."""
SPOOL_FULL = "spool_full"
"""The spool directory has reached its cap."""
SPOOL_REMOVED = "spool_removed"
"""The segment's file was deleted or cut short before its records were sent."""
SPOOL_UNREADABLE = "spool_unreadable"
"""A part could not be read for long and is kept aside; another process's counts as one record."""
LOSSES_UNREADABLE = "losses_unreadable"
"""The file that counts the losses of a segment is damaged: there were some."""
SPOOL_UNWRITABLE = "spool_unwritable"
"""The spool directory cannot be written, and the memory that stands in for it was full."""
RESTARTED = "threads_restarted"
"""No loss, but kept beside them: how often a thread of ours failed and went on."""

LOST_BYTES = 64 * 1024
"""A file that counts losses is smaller (bytes)."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def reason_of(error: OSError) -> str:
    """Why the spool could not be written, as a reason to count under."""
    return DISK_FULL if error.errno in _FULL else SPOOL_UNWRITABLE


class Counts:
    """Numbers of records. Any thread may add to them and read them.

    Args:
        total: other counts, which everything is added to as well.
    """

    def __init__(self, total: Counts | None = None) -> None:
        self.recorded = 0
        """Reached the spooling thread (those that `offer` refused are in `dropped` only)."""
        self.delivered = 0
        """Accepted by the server and acknowledged."""
        self.dead_letters = 0
        """Refused by the server for good or damaged on disk, and kept in the dead-letter file."""
        self.put_off = 0
        """Of these, files that `sync` sends again."""
        self._total = total
        # Reentrant: a signal handler may offer a record while this thread counts one.
        self._lock = threading.RLock()
        self._dropped: Counter[str] = Counter()
        self._restarts = 0
        self._saved: Counter[str] = Counter()
        self._saving = threading.Lock()

    @property
    def dropped(self) -> dict[str, int]:
        """Lost, by reason, at this moment."""
        with self._lock:
            return dict(self._dropped)

    @property
    def unsaved(self) -> int:
        """How many losses are in no file yet."""
        return sum((Counter(self.dropped) - self._saved).values())

    def add(
        self, *, recorded: int = 0, delivered: int = 0, dead_letters: int = 0, put_off: int = 0
    ) -> None:
        """Count records that were not lost."""
        with self._lock:
            self.recorded += recorded
            self.delivered += delivered
            self.dead_letters += dead_letters
            self.put_off += put_off
        if self._total is not None:
            self._total.add(
                recorded=recorded, delivered=delivered, dead_letters=dead_letters, put_off=put_off
            )

    def drop(self, reason: str, records: int = 1) -> None:
        """Count records lost for `reason`."""
        with self._lock:
            self._dropped[reason] += records
        if self._total is not None:
            self._total.drop(reason, records)

    def restarted(self) -> None:
        """Count that a thread failed and went on."""
        self._restarts += 1

    def save_losses(self, paths: Paths) -> None:
        """Add losses and restarts that are not saved yet to a segment's file, for other processes.

        Any thread; blocks on the disk. What cannot be saved now, or what another thread is saving,
        is left for the next call.
        """
        if not self._saving.acquire(blocking=False):
            return
        try:
            dropped = Counter(self.dropped) + Counter({RESTARTED: self._restarts})
            if new := dropped - self._saved:
                # A sync that delivers the segment of an offline process adds its own.
                losses = load_losses(paths.lost) + new
                # Durable: an empty file would take the earlier losses with it.
                replace_private(paths.lost, [json.dumps(losses).encode()], durable=True)
                self._saved = dropped
        except OSError as error:
            _guard.warn(
                f"delivery.{paths.directory}",  # Once for a spool that cannot be written.
                "%s cannot be written (%s): `qitos-mlflow status` does not show all losses",
                paths.lost,
                error,
            )
        finally:
            self._saving.release()


def load_losses(path: Path) -> Counter[str]:
    """The losses by reason in a file; none if there is no file, or it cannot be opened."""
    try:
        losses = json_object(read_whole(path, LOST_BYTES))
    except OSError as error:
        return Counter({LOSSES_UNREADABLE: 1} if error.errno == errno.EFBIG else ())
    if losses and all(type(n) is int and 0 < n < 1 << 63 for n in losses.values()):
        return Counter(losses)
    return Counter({LOSSES_UNREADABLE: 1})
