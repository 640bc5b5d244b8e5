"""How much may still be written to the spool directory: of records, and of what is kept aside.

What is kept aside (dead letters, unreadable parts) stays until it is purged, so it has a bound of
its own: it never takes the space of records.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from qitos_mlflow.delivery.spool.paths import ASIDE_SUFFIXES

SCAN_S = 2.0
"""The sizes of the whole directory are read at most this often (seconds)."""


class Quota:
    """A bound of the directory's size, read now and then, counted in between. One thread.

    Args:
        directory: the spool; files of all processes count.
        cap_bytes: the bound.
        aside: bounds what is kept aside; otherwise everything else.
    """

    def __init__(self, directory: Path, cap_bytes: int, *, aside: bool = False) -> None:
        self._directory = directory
        self._cap_bytes = cap_bytes
        self._aside = aside
        self._used_bytes = 0
        self._scan_at = float("-inf")

    def has_room(self, size: int, share: float = 1.0) -> bool:
        """Whether `size` bytes more stay within `share` of the bound."""
        if time.monotonic() >= self._scan_at:
            self._used_bytes = 0
            with suppress(OSError), os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.endswith(ASIDE_SUFFIXES) == self._aside:
                        with suppress(OSError):  # It is gone meanwhile.
                            self._used_bytes += entry.stat(follow_symlinks=False).st_size
            self._scan_at = time.monotonic() + SCAN_S
        return self._used_bytes + size <= self._cap_bytes * share

    def take(self, size: int, share: float = 1.0) -> bool:
        """Count `size` bytes that are about to be written, if there is room for them."""
        room = self.has_room(size, share)
        self._used_bytes += size if room else 0
        return room
