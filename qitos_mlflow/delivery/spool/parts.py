"""A part of a segment: lines one after the other, on disk or in memory.

Positions count bytes from the segment's beginning through all of its parts. A part holds those
from `base` on. So a place in the segment is one number, wherever it is stored. The spooling thread
appends, the sending thread reads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow._inheritance import disown_in_child
from qitos_mlflow.delivery.spool.counts import SPOOL_REMOVED, reason_of
from qitos_mlflow.delivery.spool.files import (
    check_file,
    is_at,
    open_file,
    read_at,
    sync_directory,
    write_all,
)


@dataclass(eq=False, kw_only=True)
class _Part:
    base: int
    """Position of its first line."""
    failure: str = ""
    """Why the disk could not be used: the reason of a loss."""
    records: int = 0
    """Records appended by this object; 0 if another process appends."""
    acknowledged: int = 0
    """Records of it that are acknowledged, or given up."""


@dataclass(eq=False, kw_only=True)
class DiskPart(_Part):
    """A part in a file: one that `create` has made, or that another process has written."""

    path: Path
    _fsync: bool = False
    _descriptor: int | None = None
    _size: int = 0
    error: OSError | None = None
    """What the system said when the disk could not be used."""

    @classmethod
    def create(cls, base: int, path: Path, head: bytes, *, fsync: bool = False) -> DiskPart:
        """A new file beginning with `head`, open for appending.

        With `fsync`, what is appended is on the disk when `append` returns.

        Raises:
            OSError: it cannot be created; nothing is left behind.
        """
        part = cls(base=base, path=path, _fsync=fsync)
        part._descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        disown_in_child(part)
        try:
            write_all(part._descriptor, head)
            if fsync:
                sync_directory(path.parent)
        except OSError:
            part.remove()
            raise
        part._size = len(head)
        return part

    @property
    def size(self) -> int:
        """Bytes appended; of another process's part, bytes in the file."""
        return self._size if self._descriptor is not None else check_file(self.path)

    def append(self, lines: Sequence[bytes]) -> int:
        """Append lines; returns how many are whole in the file. Blocks on the disk."""
        assert self._descriptor is not None
        data = memoryview(b"".join(lines))
        written = 0
        try:
            there = is_at(self._descriptor, self.path)
            if not there or os.fstat(self._descriptor).st_size != self._size:  # Or cut short.
                self.failure = SPOOL_REMOVED
                return 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            if self._fsync:  # If it fails, the lines can be read all the same.
                os.fsync(self._descriptor)
        except OSError as error:
            self.failure, self.error = reason_of(error), error.with_traceback(None)
        except BaseException:  # The lines are appended again.
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        ends = [end for end in accumulate(map(len, lines)) if end <= written]
        self._size += ends[-1] if ends else 0
        self.records += len(ends)
        if self.failure:  # A reader would skip a torn line, but count it as damage.
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
        return len(ends)

    def disown(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def seal(self) -> None:
        """Close the file: nothing will be appended any more."""
        try:
            self.disown()
        except OSError as error:  # Reading shows whether the lines are there.
            _guard.warn(
                "delivery.close",
                "%s cannot be closed (%s): its last records may be lost",
                self.path,
                error,
            )

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the file; fewer only at the end. Keeps nothing open.

        Raises:
            FileNotFoundError: the file is gone.
            OSError: it cannot be read.
        """
        return read_at(self.path, offset, size)

    def remove(self) -> None:
        """Delete the file."""
        self.seal()
        self.path.unlink(missing_ok=True)


@dataclass(eq=False, kw_only=True)
class MemoryPart(_Part):
    """A part in memory while the disk fails; lost with the process."""

    _lines: bytearray = field(default_factory=bytearray)

    @property
    def size(self) -> int:
        """Bytes appended so far."""
        return len(self._lines)

    def append(self, line: bytes) -> None:
        """Append a line."""
        self._lines += line
        self.records += 1

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes."""
        return bytes(self._lines[offset : offset + size])


Part = DiskPart | MemoryPart
