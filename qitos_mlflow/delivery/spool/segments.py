"""The spool as other processes see it: which segments there are, who has them, taking one over.

For `qitos-mlflow status`, `sync` and `spool purge`, and for the next process that finds what a
dead one left. Safe beside running agents: locks alone decide which process may do what.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.dead_letters import damaged_places, load_losses
from qitos_mlflow.delivery.spool.locks import FileLock, is_held
from qitos_mlflow.delivery.spool.parts import DiskPart, Part
from qitos_mlflow.delivery.spool.paths import Paths, list_directory, stem_of, temporary_of
from qitos_mlflow.delivery.spool.reader import Chunk, SegmentReader

INSPECT_RECORDS = 1000
"""Most records that are in memory at once while a segment is inspected."""
INSPECT_BYTES = 1024 * 1024
"""The same in bytes."""


@dataclass(frozen=True)
class SegmentInfo:
    """One segment at the moment it was inspected."""

    paths: Paths
    header: bytes | None
    """The caller's header; None when it cannot be read."""
    host: str
    pid: int
    offline: bool
    """The owner does not deliver it: other processes may while it lives."""
    started_ns: int
    last_time_ns: int
    """When the last record was written, by the wall clock; `started_ns` when there is none."""
    owner_alive: bool
    delivering: bool
    """A process is delivering it now."""
    waiting: int
    """Records not acknowledged yet."""
    size_bytes: int
    dead_letters: int
    bad_lines: int
    """Torn or corrupt lines kept aside so far."""
    losses: Mapping[str, int]
    """Records lost, by reason."""
    damaged: Sequence[str] = ()
    """Where the damaged lines were, such as "<stem>.0000000000000000.seg at byte 512"."""


def find_segments(path: Path) -> list[Paths]:
    """The segments in the directory `path`, oldest first, or the one whose file `path` is."""
    if path.is_dir():
        found = [Paths(path, stem, names) for stem, names in list_directory(path).items()]
        return sorted(found, key=lambda paths: _age(paths.stem))
    stem = stem_of(path.name)
    return [Paths(path.parent, stem)] if stem else []


def inspect_segment(paths: Paths) -> SegmentInfo:
    """Inspect one segment; reads all of its records. Changes nothing.

    A segment that `find_segments` has found is taken to have the parts it had then.
    """
    alive = is_held(paths.own)
    head = read_head(paths)
    reader = _inspecting(paths)
    waiting = sum(len(chunk.records) for chunk in _chunks(reader, sealed=not alive))
    return SegmentInfo(
        paths=paths,
        header=head.caller,
        host=str(head.about.get("host", "")),
        pid=int(head.about.get("pid", 0)),
        offline=bool(head.about.get("offline")),
        started_ns=head.time_ns,
        last_time_ns=reader.last_time_ns or head.time_ns,
        owner_alive=alive,
        delivering=is_held(paths.ship),
        waiting=waiting,
        size_bytes=sum(_size(path) for _, path in paths.parts()),
        dead_letters=_lines(paths.dead),
        bad_lines=_lines(paths.bad),
        losses=load_losses(paths.lost),
        damaged=damaged_places(paths.bad),
    )


def waiting_records(paths: Paths) -> Iterator[bytes]:
    """The records not acknowledged yet, in order. Changes nothing."""
    for chunk in _chunks(_inspecting(paths), sealed=False):
        yield from chunk.records


class Head(NamedTuple):
    """The first two lines of a part; `caller` is None when they cannot be read."""

    about: dict[str, Any]
    caller: bytes | None
    time_ns: int


def read_head(paths: Paths) -> Head:
    """What the segment says about itself. Every part repeats it, so one may be damaged."""
    # If there were parts when they were listed, there may be others by now.
    for now in (False, True) if paths.parts() else ():
        for _, path in paths.parts(now=now):
            try:
                with path.open("rb") as file:
                    lines = [
                        line_format.decode(file.readline().rstrip(line_format.LF)) for _ in range(2)
                    ]
            except OSError:
                continue
            first, second = lines
            if (
                first
                and first.kind == line_format.FILE
                and second
                and second.kind == line_format.CALLER
            ):
                return Head(json.loads(first.payload), second.payload, first.time_ns)
    return Head({}, None, 0)


class Claim:
    """A segment that this process alone may deliver, until `finish` or `release`."""

    def __init__(self, paths: Paths, lock: FileLock, stats: Counts) -> None:
        self.paths = paths
        self.reader = SegmentReader(paths, self.parts, self._discard, Counts(stats))
        self._lock = lock
        self._listed: list[Part] = []
        self._complete = False

    def owner_alive(self) -> bool:
        """Whether more records may come."""
        return is_held(self.paths.own)

    def finish(self) -> None:
        """Delete the segment, whose records are all delivered; dead letters and bad lines stay.

        Raises:
            OSError: something cannot be deleted; another claim may try again.
        """
        _delete(self.paths, self._lock, self.parts())

    def release(self) -> None:
        """Let other processes deliver it."""
        self._lock.release()

    def parts(self) -> list[Part]:
        """The parts there are now, in order."""
        if not self._complete:
            # In this order: a dead owner adds no part after the directory is read.
            self._complete = not self.owner_alive()
            self._listed = _parts(self.paths, now=True)
        return self._listed

    def _discard(self, position: int, *, disk: bool) -> None:
        parts = self.parts()
        done = [part for part, after in pairwise(parts) if disk and after.base <= position]
        self._listed = [part for part in parts if part not in done]
        for part in done:
            part.remove()


def claim(paths: Paths, stats: Counts) -> Claim | None:
    """Take over the delivery of a segment; None when a process has it already, or it is gone.

    Removes what is left by a process that died before it wrote or after it deleted the records.

    Raises:
        OSError: the spool cannot be read or written.
    """
    lock = FileLock(paths.ship)
    if not paths.parts() and not any(map(Path.exists, (paths.ship, paths.own, paths.ack))):
        return None
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
        _delete(paths, lock, taken.parts())
    return None


def purge(paths: Paths) -> bool:
    """Delete a segment with all its records, dead letters and bad lines; False while it is in use.

    Raises:
        OSError: something cannot be deleted.
    """
    lock = FileLock(paths.ship)
    if is_held(paths.own) or not lock.acquire():
        return False
    _delete(paths, lock, _parts(paths, now=True))
    for path in paths.kept_aside():
        path.unlink(missing_ok=True)
    return True


def _delete(paths: Paths, lock: FileLock, parts: Sequence[Part]) -> None:
    try:
        for part in parts:
            part.remove()
        for path in (paths.ack, temporary_of(paths.ack)):
            path.unlink(missing_ok=True)
        own = FileLock(paths.own)
        if own.acquire(create=False):
            own.release(remove=True)
    except OSError:
        lock.release()
        raise
    lock.release(remove=True)


def _inspecting(paths: Paths) -> SegmentReader:
    parts = _parts(paths)
    return SegmentReader(paths, lambda: parts, lambda *_, **__: None, Counts(), patient=False)


def _chunks(reader: SegmentReader, *, sealed: bool) -> Iterator[Chunk]:
    while True:
        chunk = reader.read(
            end=None, sealed=sealed, max_records=INSPECT_RECORDS, max_bytes=INSPECT_BYTES
        )
        if chunk.end == reader.position:
            return
        yield chunk
        reader.skip(chunk)


def _parts(paths: Paths, *, now: bool = False) -> list[Part]:
    return [DiskPart(path, base) for base, path in paths.parts(now=now)]


def _age(stem: str) -> int:
    try:
        return int(stem.rsplit("-", 2)[1], 16)
    except (IndexError, ValueError):
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
