"""What stays of a segment when it is delivered: what could not be delivered, and counts of losses.

The files `.dead`, `.bad` and `.lost` (see `paths`) have a share of the spool of their own, so that
they never take the space of records. What goes beyond that share is counted only.
"""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import ASIDE_FULL, Counts, reason_of
from qitos_mlflow.delivery.spool.paths import Paths, append_private, replace_private
from qitos_mlflow.delivery.spool.quota import Quota

ASIDE_BYTES = 100 * 1024 * 1024
"""What is kept aside may take this much unless the caller says otherwise (bytes)."""


@dataclass(frozen=True)
class DeadLetter:
    """A record the server refused for good, and why."""

    record: bytes
    reason: str


@dataclass(frozen=True)
class Damage:
    """A torn or corrupt line, as it was found."""

    file: str
    """The name of the part."""
    offset: int
    """Where the line begins in that file (bytes)."""
    line: bytes


class DeadLetters:
    """Keeps those of one segment. Used by the process that sends it, `save_losses` by any thread.

    Args:
        paths: the segment.
        stats: counts what is kept here; its losses are saved.
        cap_bytes: bound of what is kept aside in the whole directory.
    """

    def __init__(self, paths: Paths, stats: Counts, cap_bytes: int = ASIDE_BYTES) -> None:
        self._paths = paths
        self._stats = stats
        self._quota = Quota(paths.directory, cap_bytes, aside=True)

    def bury(self, dead: Sequence[DeadLetter]) -> None:
        """Keep what the server refused for good, with the reasons."""
        if dead:
            _guard.warn(
                "delivery.dead",
                "the server refused %s record(s) for good, the first one because: %s; they are "
                "kept in %s",
                len(dead),
                dead[0].reason,
                self._paths.dead,
            )
            lines = (_json_line("record", letter.record, reason=letter.reason) for letter in dead)
            self._stats.add(dead_letters=self._keep(self._paths.dead, lines))

    def keep_damaged(self, damaged: Sequence[Damage]) -> None:
        """Keep torn and corrupt lines, with where they were found."""
        if damaged:
            _guard.warn(
                "delivery.bad",
                "%s damaged line(s) of the spool cannot be delivered, the first one at byte %s of "
                "%s; they are kept in %s",
                len(damaged),
                damaged[0].offset,
                damaged[0].file,
                self._paths.bad,
            )
            lines = (_json_line("line", d.line, file=d.file, offset=d.offset) for d in damaged)
            self._stats.add(bad_lines=self._keep(self._paths.bad, lines))

    def keep_part(self, path: Path) -> None:
        """Keep a part that cannot be read, for a person who can read it."""
        _guard.warn("delivery.part", "%s cannot be read; its records are lost", path)
        try:
            size = path.stat().st_size
            if self._quota.has_room(size):
                path.rename(path.with_suffix(".bad"))
                self._quota.add(size)
        except OSError as error:
            _guard.warn("delivery.aside", "%s cannot be kept: %s", path, error)

    def save_losses(self) -> None:
        """Bring the losses on disk up to date, for other processes. Any thread; blocks on it."""
        try:
            self._stats.save_losses(self._add_losses)
        except OSError as error:
            _guard.warn(
                "delivery.losses",
                "%s cannot be written (%s): `qitos-mlflow status` does not show all losses",
                self._paths.lost,
                error,
            )

    def _add_losses(self, losses: Counter[str]) -> None:
        # A sync that delivers the segment of an offline process adds its own.
        losses = load_losses(self._paths.lost) + losses
        replace_private(self._paths.lost, json.dumps(losses).encode(), durable=False)

    def _keep(self, path: Path, lines: Iterable[bytes]) -> int:
        """Append lines as far as there is room; returns how many, and counts the others."""
        kept: list[bytes] = []
        for line in lines:
            if self._quota.has_room(len(line)):
                self._quota.add(len(line))
                kept.append(line)
            else:
                self._stats.drop(ASIDE_FULL)
        if not kept:
            return 0
        try:
            append_private(path, b"".join(kept))
        except OSError as error:
            _guard.warn(
                "delivery.aside", "%s cannot be written (%s): it lacks some entries", path, error
            )
            self._stats.drop(reason_of(error), len(kept))
            return 0
        return len(kept)


def load_losses(path: Path) -> Counter[str]:
    """The losses by reason in a file; none if it cannot be read."""
    try:
        return Counter({str(key): int(n) for key, n in json.loads(path.read_bytes()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return Counter()


def damaged_places(path: Path) -> list[str]:
    """Where the damaged lines in a file were found; version 0.1.0 did not note that."""
    places: list[str] = []
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    found = json.loads(line)
                    places.append(f"{found['file']} at byte {found['offset']}")
                except (ValueError, TypeError, KeyError):
                    continue
    except OSError:
        pass
    return places


def _json_line(key: str, data: bytes, **what: object) -> bytes:
    content: dict[str, object] = {"time_ns": time.time_ns(), **what}
    try:
        content[key] = data.decode()
    except UnicodeDecodeError:
        content[f"{key}_base64"] = base64.b64encode(data).decode()
    return json.dumps(content).encode() + line_format.LF
