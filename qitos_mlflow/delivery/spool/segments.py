"""The spool as other processes see it: what a segment holds, who has it, taking it over.

For `qitos-mlflow status`, `sync` and `spool purge`, and for the next process that finds what a
dead one left. Safe beside running agents: locks alone decide which process may do what.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import RESTARTED, Counts, load_losses
from qitos_mlflow.delivery.spool.dead_letters import letter_of, lines_of, load_dead_letters
from qitos_mlflow.delivery.spool.files import (
    FILE_BYTES,
    check_file,
    json_object,
    read_at,
    replace_private,
    sync_directory,
)
from qitos_mlflow.delivery.spool.line_format import LINE_BYTES
from qitos_mlflow.delivery.spool.locks import FileLock, is_held
from qitos_mlflow.delivery.spool.parts import DiskPart, Part
from qitos_mlflow.delivery.spool.paths import ASIDE_SUFFIXES, Paths
from qitos_mlflow.delivery.spool.reader import SegmentReader, load_ack
from qitos_mlflow.delivery.spool.writer import SegmentWriter

HEAD_LINES = 4
"""What a part begins with: two lines, each twice. Once each in format 1."""
HEAD_BYTES = 1024 * 1024
"""These lines are shorter together (bytes)."""
_NOT_OPENED = (".bad", ".tmp")


class Head(NamedTuple):
    """The first two lines of a part: what a segment says about itself."""

    caller: bytes | None = None
    """The caller's header; None when it cannot be read."""
    machine: str = ""
    pid: int = 0
    offline: bool = False
    """The owner does not deliver it: other processes may while it lives."""
    started_ns: int = 0


@dataclass
class SegmentInfo:
    """One segment at the moment it was inspected."""

    paths: Paths
    head: Head
    owner_alive: bool
    delivering: bool
    """A process is delivering it now."""
    dead_letters: Mapping[str, int]
    """Records that can never be delivered, by reason."""
    losses: Mapping[str, int]
    """Records lost, by reason."""
    restarts: int
    """How often a thread of its process failed and went on."""
    last_time_ns: int
    """When the last record was written, by the wall clock; `head.started_ns` if there is none."""
    waiting: int = 0
    """Records not acknowledged yet."""
    size_bytes: int = 0
    error: OSError | None = None
    """Why some of it cannot be read; then the numbers are of the rest."""


def inspect_segment(paths: Paths) -> SegmentInfo:
    """Inspect one segment; reads all of its records. Changes nothing.

    A segment that `find_segments` has found is taken to have the parts it had then.
    """
    head, losses = read_head(paths), load_losses(paths.lost)
    restarts = losses.pop(RESTARTED, 0)
    info = SegmentInfo(
        paths=paths,
        head=head,
        owner_alive=is_held(paths.own),
        delivering=is_held(paths.ship),
        dead_letters={},
        losses=losses,
        restarts=restarts,
        last_time_ns=head.started_ns,
    )
    try:
        _check(paths)
        info.dead_letters = load_dead_letters(paths)
        for chunk in _reader(paths).inspect():
            info.waiting += len(chunk.records)
            info.last_time_ns = max(info.last_time_ns, chunk.time_ns)
            info.error = info.error or chunk.unreadable
    except OSError as error:
        info.error = error
    for _, path in paths.parts():
        with suppress(OSError):
            info.size_bytes += path.lstat().st_size
    return info


def _check(paths: Paths) -> None:
    """Check each file, so that one that is none of ours has the whole segment left alone.

    Raises:
        OSError: a file is refused by `check_file`.
    """
    for path in paths.files():
        if path.suffix not in _NOT_OPENED:
            with suppress(FileNotFoundError):  # Delivered meanwhile.
                check_file(path)


def waiting_records(paths: Paths) -> Iterator[bytes]:
    """The records not acknowledged yet, in order, as far as they can be read. Changes nothing."""
    for chunk in _reader(paths).inspect():
        yield from chunk.records


def read_head(paths: Paths) -> Head:
    """What the segment says about itself. Every part repeats it, so one may be damaged."""
    # If there were parts when they were listed, there may be others by now.
    for now in (False, True) if paths.parts() else ():
        for _, path in paths.parts(now=now):
            with suppress(OSError):
                raw = read_at(path, 0, HEAD_BYTES).split(line_format.LF, HEAD_LINES)[:HEAD_LINES]
                found = {line.kind: line for one in raw for line in line_format.decode_all(one)[0]}
                first, second = map(found.get, (line_format.FILE, line_format.CALLER))
                if first and second:
                    about = json_object(first.payload)
                    machine, pid = about.get("host"), about.get("pid")
                    return Head(
                        second.payload,
                        machine if isinstance(machine, str) else "",
                        pid if type(pid) is int and 0 <= pid < 1 << 31 else 0,
                        about.get("offline") is True,
                        first.time_ns,
                    )
    return Head()


class Claim:
    """A segment that this process alone may deliver, until `finish` or `release`."""

    def __init__(self, paths: Paths, lock: FileLock, stats: Counts) -> None:
        self.paths = paths
        self.reader = SegmentReader(paths, self.parts, Counts(stats), load_ack(paths))
        self._lock = lock
        self._parts: list[Part] = []
        self._complete = False

    def finish(self) -> None:
        """Delete the segment, whose records are all delivered; what is kept aside stays.

        Raises:
            OSError: something cannot be deleted; another claim may try again.
        """
        _delete(self.paths, self._lock, aside=False)

    def release(self) -> None:
        """Let other processes deliver it."""
        self._lock.release()

    def parts(self) -> list[Part]:
        """The parts there are now, in order."""
        if not self._complete:
            # In this order: a dead owner adds no part after the directory is read.
            self._complete = not is_held(self.paths.own)
            self._parts = _parts(self.paths, now=True)
        return self._parts


def claim(paths: Paths, stats: Counts) -> Claim | None:
    """Take over the delivery of a segment; None when a process has it already, or it is gone.

    Removes what is left by a process that died before it wrote or after it deleted the records.

    Raises:
        OSError: the spool cannot be read or written.
    """
    lock = FileLock(paths.ship)
    if not paths.parts() and not any(map(Path.exists, (paths.ship, paths.own, paths.ack))):
        return None
    _check(paths)
    if not lock.acquire_patiently():
        return None
    try:
        alive = is_held(paths.own)  # Before the sizes are read: a dead owner writes no more.
        taken = Claim(paths, lock, stats)
        if any(part.size for part in taken.parts()):
            return taken
    except BaseException:
        lock.release()
        raise
    if alive or is_held(paths.own):
        lock.release()  # Its owner is about to write the first part, or to delete the last.
    else:
        taken.finish()
    return None


def send_again(paths: Paths) -> Paths | None:
    """Move the dead letters that may be sent again to a new segment; None if there are none.

    Does nothing while a process uses the segment.

    Raises:
        OSError: the spool cannot be read or written.
    """
    _check(paths)
    lock = FileLock(paths.ship)
    if not paths.dead.exists() or is_held(paths.own) or not lock.acquire():
        return None
    try:
        letters = map(letter_of, lines_of(paths.dead, LINE_BYTES))
        if (first := next(filter(None, letters), None)) is None:
            return None
        new = SegmentWriter(
            paths.directory,
            first.header,
            offline=False,
            cap_bytes=sys.maxsize,
            memory_bytes=0,
            fsync=True,
        )
        try:
            for letter in chain([first], letters):
                if letter is not None and letter.header == first.header:
                    for _, reason in new.append([(letter.record, True)], time.time_ns()):
                        raise OSError(f"the spool cannot be written: {reason}")
        except BaseException:
            new.close(delete=True)
            raise
        new.close(delete=False)
        stays = (
            line
            for line in lines_of(paths.dead, FILE_BYTES)
            if (letter := letter_of(line)) is None or letter.header != first.header
        )
        if (line := next(stays, None)) is None:
            paths.dead.unlink()
        else:
            replace_private(paths.dead, chain([line], stays), durable=True)
        return new.paths
    finally:
        lock.release(remove=True)


def purge(paths: Paths) -> bool:
    """Delete a segment with all its records and what is kept aside; False while it is in use.

    Raises:
        OSError: something cannot be deleted.
    """
    lock = FileLock(paths.ship)
    if is_held(paths.own) or not lock.acquire():
        return False
    _delete(paths, lock, aside=True)
    return True


def _delete(paths: Paths, lock: FileLock, *, aside: bool) -> None:
    try:
        # Parts come first: without them an acknowledgement does no harm, but not the other way.
        behind_others = any(base for base, _ in paths.parts(now=True))
        for path in paths.files(now=True):
            if path == paths.ack and behind_others:  # Not after a power cut either.
                sync_directory(paths.directory)
            if path not in (paths.own, paths.ship) and (
                aside or not path.name.endswith(ASIDE_SUFFIXES)
            ):
                path.unlink(missing_ok=True)
        own = FileLock(paths.own)
        if own.acquire(create=False):
            own.release(remove=True)
    except OSError:
        lock.release()
        raise
    lock.release(remove=True)


def _reader(paths: Paths) -> SegmentReader:
    parts = _parts(paths)
    return SegmentReader(paths, lambda: parts, Counts(), load_ack(paths))


def _parts(paths: Paths, *, now: bool = False) -> list[Part]:
    return [DiskPart(base=base, path=path) for base, path in paths.parts(now=now)]
