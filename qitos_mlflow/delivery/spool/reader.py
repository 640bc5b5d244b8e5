"""The reading side of a segment: records in order, and how far they have been accepted.

The same for the process that appends and for any other that delivers the segment later.
"""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import SPOOL_REMOVED, SPOOL_UNREADABLE, Counts
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter, bury
from qitos_mlflow.delivery.spool.files import (
    FILE_BYTES,
    Untrusted,
    read_whole,
    replace_private,
    sync_directory,
)
from qitos_mlflow.delivery.spool.line_format import LINE_BYTES
from qitos_mlflow.delivery.spool.parts import DiskPart, Part
from qitos_mlflow.delivery.spool.paths import Paths, Quota

BATCH_BYTES = 1024 * 1024
"""No further record is read once those of a chunk have this size together (bytes). On its way to
the server a chunk takes some five times as much memory."""
READ_BYTES = 1024 * 1024
"""Read at once (bytes); four times as much if one line is longer."""
LINE_COST_BYTES = 200
"""What a line takes beside its content, about (bytes)."""
DAMAGED_BYTES = 4 * 1024 * 1024
"""Kept of one damaged line (bytes)."""
ACK_BYTES = 48 * 1024 * 1024
"""An acknowledgement is smaller (bytes)."""
READ_TRIES = 4
"""A part that cannot be read is tried at least this often, ..."""
READ_S = 20.0
"""... and for this long, then given up: sooner than `qitos-mlflow sync` gives up (seconds)."""
ASIDE_BYTES = 100 * 1024 * 1024
"""What is kept aside in the whole directory may take this much (bytes)."""
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What the process or the system lacks: says nothing about the file, however long it lasts."""


class Ack(NamedTuple):
    """How far records were accepted, the sink's state there, the time of the last one (ns).

    The state is None when it is empty: then a sink has nothing to restore.
    """

    position: int
    state: bytes | None
    time_ns: int


NO_ACK = Ack(0, None, 0)
_POSITION = re.compile(rb"([0-9a-f]{1,17}) ")


@dataclass
class Chunk:
    """Records that follow each other in one part, and where the next ones begin."""

    end: int
    time_ns: int
    part: Part | None = None
    records: list[bytes] = field(default_factory=list)
    damaged: list[DeadLetter] = field(default_factory=list)
    """Damaged lines, each with its place as the reason."""
    lost: int = 0
    """Records of the part that are gone, as far as their number is known."""
    unreadable: OSError | None = None
    """Why the part cannot be read; what is lost is the rest of it."""


def load_ack(paths: Paths) -> Ack:
    """The acknowledgement on disk; if there is none or it is corrupt, all is sent again.

    Raises:
        OSError: there is one, and the process has no descriptor or memory left to read it with.
    """
    try:
        lines = read_whole(paths.ack, ACK_BYTES).rstrip(line_format.LF).split(line_format.LF)
    except OSError as error:
        if error.errno in EXHAUSTED and paths.ack.exists():
            raise
        return NO_ACK
    for raw in lines:
        for line in line_format.decode_all(raw)[0]:
            if line.kind == line_format.ACK and (start := _POSITION.match(line.payload)):
                return Ack(int(start[1], 16), line.payload[start.end() :] or None, line.time_ns)
    return NO_ACK


class SegmentReader:
    """Reads on from an acknowledgement. One thread only, but for `position`.

    Args:
        paths: where the acknowledgement and the dead letters are kept.
        parts: returns the list of the parts there are now, in order. Parts that are acknowledged as
            a whole are removed from it.
        stats: counts dead letters, losses and deliveries.
        ack: where to go on.
    """

    def __init__(
        self,
        paths: Paths,
        parts: Callable[[], list[Part]],
        stats: Counts,
        ack: Ack = NO_ACK,
    ) -> None:
        self.position, self.state, self.last_time_ns = ack
        """As of the last acknowledgement."""
        self._aside = Quota(paths.directory, ASIDE_BYTES, aside=True)
        self._paths = paths
        self._parts = parts
        self._stats = stats
        self._patient = True
        self._read_failures = 0
        self._failing_since = 0.0

    def read(self, *, end: int | None, sealed: bool, max_records: int) -> Chunk:
        """The next records; `end` of the chunk is `position` when there are none.

        Args:
            end: read no further than this position; None for everything there is.
            sealed: no process appends before `end` any more (always true if that is given), so an
                incomplete last line is a torn one. Otherwise it is left until it is complete.
            max_records: most records to read.

        Raises:
            OSError: a part cannot be read; if that lasts, a later call goes on behind it.
        """
        chunk = Chunk(self.position, self.last_time_ns)
        # Parts are listed before they are read: one with a successor was complete by then.
        parts = list(self._parts())
        for index, part in enumerate(parts):
            stop = parts[index + 1].base if index + 1 < len(parts) else None
            if stop is not None and chunk.end >= stop:
                continue
            chunk.part = part
            chunk.end = max(chunk.end, part.base)
            limit = stop if end is None else end if stop is None else min(stop, end)
            try:
                full = _read_part(part, chunk, limit, sealed or stop is not None, max_records)
            except OSError as error:
                full = False
                # What is in the place of a file of this process has replaced it.
                gone = isinstance(error, Untrusted) and part.records
                if not (gone or isinstance(error, FileNotFoundError)):
                    if chunk.records or chunk.damaged:
                        break  # Those first.
                    if not self._gives_up(error):
                        raise
                    chunk.unreadable = error
                    chunk.lost = max(1, _missing(part, chunk))
                    chunk.end = part.base + FILE_BYTES if limit is None else limit
            if not full and limit is not None and chunk.end < limit:
                # The part is complete, so the file was deleted or cut short. Or the records that
                # followed were in the memory of a process that is gone.
                chunk.lost = _missing(part, chunk)
                chunk.end = limit
            if chunk.records or chunk.damaged or chunk.lost:
                break
        self._read_failures = 0
        return chunk

    def _gives_up(self, error: OSError) -> bool:
        """Whether reading has failed for long enough, and because of the file."""
        if self._patient and error.errno in EXHAUSTED:
            return False
        if not self._read_failures:
            self._failing_since = time.monotonic()
        self._read_failures += 1
        failing_s = time.monotonic() - self._failing_since
        return not self._patient or (self._read_failures >= READ_TRIES and failing_s >= READ_S)

    def inspect(self) -> Iterator[Chunk]:
        """Read all there is in chunks. Changes nothing, and skips a part that cannot be read."""
        self._patient = False
        while True:
            chunk = self.read(end=None, sealed=True, max_records=sys.maxsize)
            if chunk.end == self.position:
                return
            yield chunk
            self.position, self.last_time_ns = chunk.end, chunk.time_ns

    def bury(self, dead: Sequence[DeadLetter]) -> None:
        """Keep what can never be delivered, as far as there is room for it."""
        bury(dead, self._paths.dead, self._aside, self._stats)
        self._stats.save_losses(self._paths)

    def acknowledge(self, chunk: Chunk, state: bytes | None, dead: Sequence[DeadLetter]) -> None:
        """Note that every record up to the chunk's end was accepted or is a dead letter."""
        if chunk.lost:
            self._stats.drop(SPOOL_UNREADABLE if chunk.unreadable else SPOOL_REMOVED, chunk.lost)
        self.bury([*dead, *chunk.damaged])
        if chunk.unreadable is not None and isinstance(chunk.part, DiskPart):
            _keep_for_a_person(chunk.part, chunk.unreadable)
        parts = self._parts()
        done = [part for part, after in pairwise(list(parts)) if after.base <= chunk.end]
        # Once a part is gone, this is the only place where the sink's state is.
        last_copy = bool(done) or any(part.base for part in parts[:1])
        line = line_format.encode(
            line_format.ACK, b"%x %b" % (chunk.end, state or b""), chunk.time_ns
        )
        stored = False
        try:
            # Twice, so that damage to one line does not cost the state.
            lines = [line] * (2 if last_copy else 1)
            replace_private(self._paths.ack, lines, durable=last_copy)
            if any(isinstance(part, DiskPart) for part in done):
                sync_directory(self._paths.directory)
            stored = True
        except OSError as error:
            _guard.warn(
                f"delivery.{self._paths.directory}",  # Once for all that fails there.
                "%s cannot be written (%s); after a crash, records are sent a second time",
                self._paths.ack,
                error,
            )
        self.position, self.state, self.last_time_ns = chunk.end, state, chunk.time_ns
        if chunk.part is not None:
            settled = len(chunk.records) + len(chunk.damaged) + chunk.lost
            chunk.part.acknowledged += settled
        # The server may refuse many items of one record.
        self._stats.add(delivered=max(0, len(chunk.records) - len(dead)))
        for part in done:
            if isinstance(part, DiskPart):
                if not stored:
                    continue
                part.remove()
            parts.remove(part)


def _keep_for_a_person(part: DiskPart, unreadable: OSError) -> None:
    _guard.warn(
        "delivery.part", "%s is unreadable (%s); its records are lost", part.path, unreadable
    )
    try:
        part.path.rename(part.path.with_suffix(".bad"))
    except OSError as error:
        _guard.warn("delivery.aside", "%s cannot be kept: %s", part.path, error)


def _missing(part: Part, chunk: Chunk) -> int:
    """How many records of `part` are neither settled nor in `chunk`; 0 of other processes'."""
    return max(0, part.records - part.acknowledged - len(chunk.records) - len(chunk.damaged))


def _read_part(part: Part, chunk: Chunk, limit: int | None, sealed: bool, max_records: int) -> bool:
    """Read lines of `part` into `chunk` up to the position `limit`; True when it is full."""
    taken_bytes = 0
    size = READ_BYTES
    while limit is None or chunk.end < limit:
        want = size if limit is None else min(size, limit - chunk.end)
        data = part.read(chunk.end - part.base, want)
        complete = data.rfind(line_format.LF) + 1
        if not complete:
            if len(data) == want and want == size:
                if size >= LINE_BYTES:
                    raise OSError(errno.EFBIG, f"It has a line of more than {LINE_BYTES} bytes")
                size *= 4  # One line is longer than what was read.
                continue
            if data and sealed:
                _take(data, part, chunk)
                chunk.end += len(data)
            return False
        lines, at = memoryview(data), 0
        while at < complete:
            end = line_format.end_of_line(data, at, complete)
            _take(lines[at : end - 1], part, chunk)
            chunk.end += end - at
            taken_bytes += end - at + LINE_COST_BYTES
            at = end
            taken = len(chunk.records) + len(chunk.damaged)
            if taken >= max_records or taken_bytes >= BATCH_BYTES:
                return True
    return False


def _take(raw: bytes | memoryview, part: Part, chunk: Chunk) -> None:
    """Add the records of a line at the chunk's end to the chunk."""
    lines, intact = line_format.decode_all(raw)
    if not intact:
        place = part.path.name if isinstance(part, DiskPart) else "memory"
        reason = f"damaged line of the spool, at byte {chunk.end - part.base} of {place}"
        chunk.damaged.append(DeadLetter(bytes(raw[:DAMAGED_BYTES]), reason))
    for line in lines:
        if line.kind == line_format.RECORD:
            chunk.records.append(line.payload)
            chunk.time_ns = max(chunk.time_ns, line.time_ns)
