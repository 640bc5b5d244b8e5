"""The segment this process appends to: parts on disk, or in memory while the disk fails.

Receives normalized records from the spooling thread. The sending thread reads them back through a
`SegmentReader`. The first append creates the files. Nothing here runs on the agent's thread.

When the disk fails, the lines that follow go into bounded parts in memory, and from there to the
server in the same order. The disk is tried again every `DISK_RETRY_S`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import (
    DISK_FULL,
    RECORD_TOO_LARGE,
    SPOOL_FULL,
    SPOOL_REMOVED,
    reason_of,
)
from qitos_mlflow.delivery.spool.files import make_directory, sync_directory
from qitos_mlflow.delivery.spool.locks import FileLock
from qitos_mlflow.delivery.spool.parts import DiskPart, MemoryPart, Part
from qitos_mlflow.delivery.spool.paths import Paths, Quota, new_stem

MEMORY_PART_BYTES = 1024 * 1024
"""As `part_bytes` of a part in memory, which is freed as a whole (bytes)."""
DISK_RETRY_S = 5.0
"""How often a disk that failed is tried again (seconds)."""
KEEP_SHARE = 1.1
"""Trace starts and ends are taken until the directory is this many times its cap."""

NEXT = {
    DISK_FULL: "; free some disk",
    SPOOL_FULL: "; deliver what others left there with: qitos-mlflow sync, or raise spool_bytes",
}
"""What to do about a failure, as the log says it."""

Record = tuple[bytes, bool]
"""What is appended, and whether to keep it when space is short."""


class SegmentWriter:
    """The appending side. Spooling thread only, but for `end`, `parts` and `unsaved`.

    Args:
        directory: the spool; created when missing.
        header: the caller's, repeated at the beginning of every part.
        offline: this process does not send the segment: other processes may, at any time.
        cap_bytes: what the whole directory may take, other processes' segments included.
        memory_bytes: what parts in memory may take together, beside records to be kept; 0: no
            parts in memory.
        fsync: what is appended to the disk survives a power cut.
    """

    part_bytes = 16 * 1024 * 1024
    """The next part begins at this size: what is acknowledged frees the disk this soon (bytes)."""

    def __init__(
        self,
        directory: Path,
        header: bytes,
        *,
        offline: bool,
        cap_bytes: int,
        memory_bytes: int,
        fsync: bool = False,
    ) -> None:
        self.end = 0
        """Position behind the last record appended; all before it can be read."""
        self.settled = 0
        """How many records of the last `append` are appended or lost, ..."""
        self.lost: list[tuple[bytes, str]] = []
        """... and the lost ones: it may have raised, because of a bug."""
        self.paths = Paths(directory, new_stem())
        self._header = header
        self._offline = offline
        self._fsync = fsync
        self._memory_bytes = memory_bytes
        self._quota = Quota(directory, cap_bytes)
        self._own = FileLock(self.paths.own)
        self._sending = FileLock(self.paths.ship)
        self._parts: list[Part] = []
        self._tries_again = False
        self._disk_failure = ""
        self._disk_retry_at = 0.0

    def append(self, records: Sequence[Record], time_ns: int) -> list[tuple[bytes, str]]:
        """Append records. Blocks on the disk.

        Returns those that neither disk nor memory took, each with the reason to count it under.
        `time_ns` is the wall clock's time now.
        """
        self.settled, self.lost = 0, []
        self._tries_again = not self._memory_bytes  # Or one failure that passes costs records.
        lines = [line_format.encode(line_format.RECORD, data, time_ns) for data, _ in records]
        now = time.monotonic()
        while (done := self.settled) < len(lines):
            (data, keep), line = records[done], lines[done]
            if len(line) > line_format.LINE_BYTES:
                self.lost.append((data, RECORD_TOO_LARGE))
                self.settled += 1
                continue
            part = self._part_for(keep, line, time_ns, now)
            if isinstance(part, DiskPart):
                self.settled += part.append(lines[done : self._fitting(records, lines, done)])
                if part.failure and part.failure != SPOOL_REMOVED:
                    self._fail(part.failure, part.error)
            else:
                if part is None:
                    self.lost.append((data, self._disk_failure))
                else:
                    part.append(line)
                self.settled += 1
            if part is not None:
                self.end = part.base + part.size
        return self.lost

    def parts(self) -> list[Part]:
        """The parts in order. The sending thread removes those that are acknowledged."""
        return self._parts

    @property
    def unsaved(self) -> int:
        """Records that only memory holds and that are not acknowledged yet. Any thread."""
        memory = [part for part in list(self._parts) if isinstance(part, MemoryPart)]
        return sum(part.records - part.acknowledged for part in memory)

    def close(self, *, delete: bool) -> None:
        """Stop appending and give up the locks; with `delete` remove what is not to stay."""
        try:
            for part in list(self._parts):
                if isinstance(part, DiskPart):
                    part.remove() if delete else part.seal()
            if delete:
                # As in `segments._delete`.
                if any(isinstance(part, DiskPart) and part.base for part in self._parts):
                    sync_directory(self.paths.directory)
                self.paths.ack.unlink(missing_ok=True)
        finally:
            self._sending.release(remove=delete)
            self._own.release(remove=delete)

    def _part_for(self, keep: bool, line: bytes, time_ns: int, now: float) -> Part | None:
        """The part that takes `line`, on disk if that works; None if memory has no room either.

        A disk that has failed since the time `now` is not tried again.
        """
        last = self._parts[-1] if self._parts else None
        # Starts and ends of traces may exceed the cap: try the disk for this one.
        over = keep and self._disk_failure == SPOOL_FULL
        while over or now >= self._disk_retry_at:
            over = False
            try:
                on_disk = self._on_disk(last, keep, line, time_ns)
                if on_disk is not None:
                    self._disk_failure, self._disk_retry_at = "", 0.0
                    return on_disk
                self._fail(SPOOL_FULL)
                break
            except OSError as error:
                self._fail(reason_of(error), error)
        memory = [part for part in list(self._parts) if isinstance(part, MemoryPart)]
        room = self._memory_bytes - sum(part.size for part in memory)
        if len(line) > room and not (keep and self._memory_bytes):
            return None
        if isinstance(last, MemoryPart) and last.size < MEMORY_PART_BYTES:
            return last
        part = MemoryPart(base=self.end, failure=self._disk_failure)
        self._add(part)
        return part

    def _fitting(self, records: Sequence[Record], lines: Sequence[bytes], start: int) -> int:
        """The index of the first line from `start` on that has no room; counts those before."""
        size = 0
        for index in range(start, len(lines)):
            length, (_, keep) = len(lines[index]), records[index]
            size += length
            if index > start and (size > self.part_bytes or length > line_format.LINE_BYTES):
                return index
            if not self._quota.take(length, _share(keep)):
                return index
        return len(lines)

    def _on_disk(self, last: Part | None, keep: bool, line: bytes, time_ns: int) -> DiskPart | None:
        """The last part, or a new one; None if the directory has no room for one with `line`."""
        if isinstance(last, DiskPart) and not last.failure and last.size < self.part_bytes:
            return last if self._quota.has_room(len(line), _share(keep)) else None
        about = {"host": socket.gethostname(), "pid": os.getpid(), "offline": self._offline}
        head = line_format.encode(line_format.FILE, json.dumps(about).encode(), time_ns)
        head += line_format.encode(line_format.CALLER, self._header, time_ns)
        head += head  # So that damage to one line does not hide where the records are to go.
        if not self._quota.has_room(len(head) + len(line), _share(keep)):
            return None
        make_directory(self.paths.directory, fsync=self._fsync)
        # Locks first: a part without an owner looks like that of a dead process.
        for lock in (self._own,) if self._offline else (self._own, self._sending):
            if not lock.acquire_patiently():
                raise OSError(f"{lock.path} is locked by another process")
        part = DiskPart.create(self.end, self.paths.part(self.end), head, fsync=self._fsync)
        self._quota.take(len(head), _share(keep))
        self._add(part)
        return part

    def _fail(self, failure: str, error: OSError | None = None) -> None:
        """Go on in memory until the disk is tried again; without one, a smaller record may fit."""
        if self._tries_again and failure != SPOOL_FULL:
            self._tries_again = False
            return
        if failure != self._disk_failure:
            _guard.warn(
                f"delivery.{self.paths.directory}",
                "the spool %s cannot be written (%s): until it can, records are %s%s",
                self.paths.directory,
                error or failure,
                "sent from memory, and lost beyond its bound" if self._memory_bytes else "lost",
                NEXT.get(failure, ""),
            )
        self._disk_failure = failure
        if self._memory_bytes or failure != SPOOL_FULL:
            self._disk_retry_at = time.monotonic() + DISK_RETRY_S

    def _add(self, part: Part) -> None:
        if self._parts and isinstance(last := self._parts[-1], DiskPart):
            last.seal()
        self._parts.append(part)


def _share(keep: bool) -> float:
    return KEEP_SHARE if keep else 1.0
