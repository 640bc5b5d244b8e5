"""The segment this process appends to: parts on disk while there is one, in memory otherwise.

Receives refined records from the worker; the shipper reads them back through a `Cursor`. The
first append creates the files. Nothing here is called on the agent's thread.

The disk failing is no reason to stop: the lines that follow go into parts in memory, bounded, and
from there to the server in the same order. The disk is tried again every `DISK_RETRY_S`.
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
from qitos_mlflow.delivery import codec
from qitos_mlflow.delivery.files import Paths, make_directory, new_stem
from qitos_mlflow.delivery.locks import FileLock, boot_id
from qitos_mlflow.delivery.parts import DiskPart, MemoryPart
from qitos_mlflow.delivery.stats import SPOOL_FULL, SPOOL_REMOVED, SPOOL_UNWRITABLE, reason_of

MAGIC = "qitos-mlflow-spool"
PART_BYTES = 16 * 1024 * 1024
"""A part is followed by the next at this size: what is acknowledged frees the disk this soon."""
MEMORY_PART_BYTES = 1024 * 1024
DISK_RETRY_S = 5.0
"""How often a disk that failed is tried again (seconds)."""
SCAN_S = 2.0
"""How often the size of the whole directory is looked up, at most (seconds)."""
KEEP_SHARE = 1.1
"""Trace starts and ends are taken until the directory is this many times its cap."""


class Record(NamedTuple):
    """What is appended, and whether it is to be kept when space is short."""

    data: bytes
    keep: bool


class Loss(NamedTuple):
    """A record that could not be stored, and the reason to count it under."""

    data: bytes
    reason: str


class Segment:
    """The appending side. Worker only, but for `end`, `parts`, `unsaved` and `discard`.

    Args:
        directory: the spool; created when missing.
        header: the caller's, repeated at the head of every part.
        ship: this process ships the segment too; otherwise others may at any time (offline).
        cap_bytes: what the whole directory may take, other processes' segments included.
        memory_bytes: what parts in memory may take together, but for records to be kept; 0: there
            are none.
        part_bytes: size at which the next part begins.
    """

    def __init__(
        self,
        directory: Path,
        header: bytes,
        *,
        ship: bool,
        cap_bytes: int,
        memory_bytes: int,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.end = 0
        """Position behind the last record appended; all before it can be read."""
        self.paths = Paths(directory, new_stem())
        self._header = header
        self._ship = ship
        self._memory_bytes = memory_bytes
        self._part_bytes = part_bytes
        self._cap = _Cap(directory, cap_bytes)
        self._own = FileLock(self.paths.own)
        self._shipping = FileLock(self.paths.ship)
        self._parts: list[DiskPart | MemoryPart] = []
        self._parts_lock = threading.Lock()
        self._disk_failure = ""
        self._disk_retry_at = 0.0

    def append(self, records: Sequence[Record], time_ns: int) -> list[Loss]:
        """Append records; returns those that neither disk nor memory took. Blocks on the disk.

        `time_ns` is the wall clock's time now.
        """
        losses: list[Loss] = []
        part = self._writable(time_ns)
        on_disk = isinstance(part, DiskPart)
        lines: list[bytes] = []
        taken: list[Record] = []
        for record in records:
            line = codec.encode(codec.RECORD, record.data, time_ns)
            if on_disk and not self._cap.take(len(line), record.keep):
                losses.append(Loss(record.data, SPOOL_FULL))
            else:
                lines.append(line)
                taken.append(record)
        done = 0
        while done < len(lines):
            whole = part.append(lines[done:])
            self.end = part.base + part.size
            done += whole
            if done == len(lines):
                break
            if isinstance(part, DiskPart):
                part = self._after(part.failure or SPOOL_UNWRITABLE, time_ns)
            elif whole or part.size:
                part = self._add_memory()
            else:  # It was made with all the room there is.
                if taken[done].keep and self._memory_bytes:
                    part.append_anyway(lines[done])
                    self.end = part.base + part.size
                else:
                    losses.append(Loss(taken[done].data, self._disk_failure))
                done += 1
        return losses

    def parts(self) -> list[DiskPart | MemoryPart]:
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
        """Free the parts that lie before `position` as a whole. Shipper only.

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
        for part in self.parts():
            if isinstance(part, DiskPart):
                part.remove() if delete else part.seal()
        if delete:
            self.paths.ack.unlink(missing_ok=True)
        self._shipping.release(remove=delete)
        self._own.release(remove=delete)

    def disown(self) -> None:
        """In a forked child: close what was inherited; the files are the parent's."""
        for part in self._parts:
            if isinstance(part, DiskPart):
                part.seal()

    def _writable(self, time_ns: int) -> DiskPart | MemoryPart:
        part = self._parts[-1] if self._parts else None
        if isinstance(part, DiskPart) and part.size < self._part_bytes:
            return part
        if isinstance(part, MemoryPart) and time.monotonic() < self._disk_retry_at:
            return part if part.size < MEMORY_PART_BYTES else self._add_memory()
        return self._disk_or_memory(time_ns)

    def _after(self, failure: str, time_ns: int) -> DiskPart | MemoryPart:
        # A file that somebody deleted says nothing against the disk.
        removed = failure == SPOOL_REMOVED
        return self._disk_or_memory(time_ns) if removed else self._fall_back(failure)

    def _disk_or_memory(self, time_ns: int) -> DiskPart | MemoryPart:
        try:
            return self._add_disk(time_ns)
        except OSError as error:
            return self._fall_back(reason_of(error), error)

    def _add_disk(self, time_ns: int) -> DiskPart:
        make_directory(self.paths.directory)
        # Locks first: who sees a part without an owner takes it for a dead process's.
        for lock in (self._own, self._shipping) if self._ship else (self._own,):
            if not lock.acquire_patiently():
                raise OSError(f"{lock.path} is locked by another process")
        about = {
            "magic": MAGIC,
            "host": socket.gethostname(),
            "boot": boot_id(),
            "pid": os.getpid(),
            "offline": not self._ship,
        }
        head = codec.encode(codec.FILE, json.dumps(about).encode(), time_ns)
        head += codec.encode(codec.CALLER, self._header, time_ns)
        part = DiskPart.create(self.paths.part(self.end), self.end, head)
        self._cap.take(len(head), keep=True)
        self._add(part)
        self._disk_failure = ""
        return part

    def _fall_back(self, failure: str, error: OSError | None = None) -> MemoryPart:
        if failure != self._disk_failure:
            _guard.warn(
                f"delivery.{failure}",
                "the spool %s cannot be written (%s); records are sent from memory, as far as "
                "it goes, until it can",
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

    def _add(self, part: DiskPart | MemoryPart) -> None:
        with self._parts_lock:
            if self._parts:
                last = self._parts[-1]
                if isinstance(last, DiskPart):
                    last.seal()
                elif not last.size:
                    self._parts.pop()  # It took nothing; parts have positions of their own.
            self._parts.append(part)
        self.end = part.base + part.size


class _Cap:
    """What the whole directory may still take, looked up now and then, counted in between."""

    def __init__(self, directory: Path, cap_bytes: int) -> None:
        self._directory = directory
        self._cap_bytes = cap_bytes
        self._used_bytes = 0
        self._scan_at = float("-inf")

    def take(self, size: int, keep: bool) -> bool:
        """Count `size` bytes in, unless they go beyond the cap."""
        if time.monotonic() >= self._scan_at:
            self._used_bytes = directory_bytes(self._directory)
            self._scan_at = time.monotonic() + SCAN_S
        limit = self._cap_bytes * KEEP_SHARE if keep else self._cap_bytes
        if self._used_bytes + size > limit:
            return False
        self._used_bytes += size
        return True


def directory_bytes(directory: Path) -> int:
    """What the files of `directory` take; files that vanish meanwhile count as nothing."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_size
                except OSError:
                    pass
    except OSError:
        pass
    return total
