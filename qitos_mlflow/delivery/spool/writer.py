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
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import (
    SPOOL_FULL,
    SPOOL_REMOVED,
    SPOOL_UNWRITABLE,
    reason_of,
)
from qitos_mlflow.delivery.spool.locks import FileLock
from qitos_mlflow.delivery.spool.parts import DiskPart, MemoryPart, Part
from qitos_mlflow.delivery.spool.paths import Paths, make_directory, new_stem
from qitos_mlflow.delivery.spool.quota import Quota

PART_BYTES = 16 * 1024 * 1024
"""The next part begins at this size: what is acknowledged frees the disk this soon (bytes)."""
MEMORY_PART_BYTES = 1024 * 1024
"""The same of a part in memory, which is freed as a whole (bytes)."""
DISK_RETRY_S = 5.0
"""How often a disk that failed is tried again (seconds)."""
KEEP_SHARE = 1.1
"""Trace starts and ends are taken until the directory is this many times its cap."""


class Record(NamedTuple):
    """What is appended, and whether to keep it when space is short."""

    data: bytes
    keep: bool


class Loss(NamedTuple):
    """A record that could not be stored, and the reason to count it under."""

    data: bytes
    reason: str


class SegmentWriter:
    """The appending side. Spooling thread only, but for `end`, `parts`, `unsaved` and `discard`.

    Args:
        directory: the spool; created when missing.
        header: the caller's, repeated at the beginning of every part.
        offline: this process does not send the segment: other processes may, at any time.
        cap_bytes: what the whole directory may take, other processes' segments included.
        memory_bytes: what parts in memory may take together, beside records to be kept; 0: no
            parts in memory.
        part_bytes: size at which the next part begins.
    """

    def __init__(
        self,
        directory: Path,
        header: bytes,
        *,
        offline: bool,
        cap_bytes: int,
        memory_bytes: int,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.end = 0
        """Position behind the last record appended; all before it can be read."""
        self.paths = Paths(directory, new_stem())
        self._header = header
        self._offline = offline
        self._memory_bytes = memory_bytes
        self._part_bytes = part_bytes
        self._quota = Quota(directory, cap_bytes)
        self._own = FileLock(self.paths.own)
        self._sending = FileLock(self.paths.ship)
        self._parts: list[Part] = []
        self._parts_lock = threading.Lock()
        self._disk_failure = ""
        self._disk_retry_at = 0.0

    def append(self, records: Sequence[Record], time_ns: int) -> list[Loss]:
        """Append records; returns those that neither disk nor memory took. Blocks on the disk.

        `time_ns` is the wall clock's time now.
        """
        losses: list[Loss] = []
        lines = [line_format.encode(line_format.RECORD, record.data, time_ns) for record in records]
        part = self._writable(records[0], lines[0], time_ns)
        done = 0
        while done < len(lines):
            upto = len(lines)
            if isinstance(part, DiskPart):
                upto = self._fitting(records, lines, done)
            whole = part.append(lines[done:upto])
            self.end = part.base + part.size
            done += whole
            if done == len(lines):
                break
            if isinstance(part, DiskPart) and done < upto:
                failure = part.failure or SPOOL_UNWRITABLE
                if failure == SPOOL_REMOVED:  # The disk itself is well.
                    part = self._disk_or_memory(records[done], lines[done], time_ns)
                else:
                    part = self._fall_back(failure)
            elif isinstance(part, DiskPart) and self._memory_bytes:
                part = self._fall_back(SPOOL_FULL)
            elif isinstance(part, DiskPart):
                losses.append(Loss(records[done].data, SPOOL_FULL))
                done += 1
            elif whole or part.size:
                part = self._add_memory()
            else:  # The part is new and had all the room there is.
                if records[done].keep and self._memory_bytes:
                    part.append_anyway(lines[done])
                    self.end = part.base + part.size
                else:
                    losses.append(Loss(records[done].data, self._disk_failure))
                done += 1
        return losses

    def parts(self) -> list[Part]:
        """The parts that are not discarded, in order."""
        with self._parts_lock:
            return list(self._parts)

    @property
    def unsaved(self) -> int:
        """Records that only memory holds and that are not acknowledged yet. Any thread."""
        return sum(
            part.records - part.acknowledged
            for part in self.parts()
            if isinstance(part, MemoryPart)
        )

    def discard(self, position: int, *, disk: bool) -> None:
        """Free the parts that lie before `position` as a whole. Sending thread only.

        With `disk`, those on disk too; not while the acknowledgement is not on disk itself.
        """
        with self._parts_lock:
            following = [part.base for part in self._parts[1:]]
            done = [
                part
                for part, stop in zip(self._parts, following, strict=False)
                if stop <= position and (disk or isinstance(part, MemoryPart))
            ]
            self._parts = [part for part in self._parts if part not in done]
        for part in done:
            part.remove()

    def close(self, *, delete: bool) -> None:
        """Stop appending and give up the locks; with `delete` remove what is not to stay."""
        try:
            for part in self.parts():
                if isinstance(part, DiskPart):
                    part.remove() if delete else part.seal()
            if delete:
                self.paths.ack.unlink(missing_ok=True)
        finally:
            self._sending.release(remove=delete)
            self._own.release(remove=delete)

    def disown(self) -> None:
        """In a forked child: close what was inherited; the files are the parent's."""
        for part in self._parts:
            if isinstance(part, DiskPart):
                part.seal()

    def _writable(self, record: Record, line: bytes, time_ns: int) -> Part:
        part = self._parts[-1] if self._parts else None
        if isinstance(part, DiskPart) and part.size < self._part_bytes:
            return part
        # Starts and ends of traces may exceed the cap: try the disk for this one.
        now = time.monotonic() >= self._disk_retry_at
        now = now or (record.keep and self._disk_failure == SPOOL_FULL)
        if isinstance(part, MemoryPart) and not now:
            return part if part.size < MEMORY_PART_BYTES else self._add_memory()
        return self._disk_or_memory(record, line, time_ns)

    def _fitting(self, records: Sequence[Record], lines: Sequence[bytes], start: int) -> int:
        """The index of the first line from `start` on that has no room; counts those before."""
        for index in range(start, len(lines)):
            if not self._quota.has_room(len(lines[index]), _share(records[index])):
                return index
            self._quota.add(len(lines[index]))
        return len(lines)

    def _disk_or_memory(self, record: Record, line: bytes, time_ns: int) -> Part:
        """A new part, for `line` and what follows."""
        try:
            return self._add_disk(record, line, time_ns) or self._fall_back(SPOOL_FULL)
        except OSError as error:
            return self._fall_back(reason_of(error), error)

    def _add_disk(self, record: Record, line: bytes, time_ns: int) -> DiskPart | None:
        """A new part on disk; None when the directory has no room for one with `line` in it."""
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "offline": self._offline,
        }
        head = line_format.encode(line_format.FILE, json.dumps(about).encode(), time_ns)
        head += line_format.encode(line_format.CALLER, self._header, time_ns)
        if not self._quota.has_room(len(head) + len(line), _share(record)):
            return None
        make_directory(self.paths.directory)
        # Locks first: a part without an owner looks like that of a dead process.
        for lock in (self._own,) if self._offline else (self._own, self._sending):
            if not lock.acquire_patiently():
                raise OSError(f"{lock.path} is locked by another process")
        part = DiskPart.create(self.paths.part(self.end), self.end, head)
        self._quota.add(len(head))
        self._add(part)
        self._disk_failure = ""
        return part

    def _fall_back(self, failure: str, error: OSError | None = None) -> MemoryPart:
        if failure != self._disk_failure:
            _guard.warn(
                f"delivery.{failure}",
                "the spool %s cannot be written (%s): until it can, records are sent from memory, "
                "and lost beyond its bound; free some disk or raise spool_bytes",
                self.paths.directory,
                error or failure,
            )
        self._disk_failure = failure
        self._disk_retry_at = time.monotonic() + DISK_RETRY_S
        return self._add_memory()

    def _add_memory(self) -> MemoryPart:
        taken = sum(part.size for part in self.parts() if isinstance(part, MemoryPart))
        part = MemoryPart(self.end, self._memory_bytes - taken, self._disk_failure)
        self._add(part)
        return part

    def _add(self, part: Part) -> None:
        with self._parts_lock:
            if self._parts:
                last = self._parts[-1]
                if isinstance(last, DiskPart):
                    last.seal()
                elif not last.size:
                    self._parts.pop()  # It is empty; each part has a position of its own.
            self._parts.append(part)
        self.end = part.base + part.size


def _share(record: Record) -> float:
    return KEEP_SHARE if record.keep else 1.0
