"""What stays of a segment when it is delivered: what nobody could take, and how much was lost.

    <stem>.dead   records the server refused for good
    <stem>.bad    torn and corrupt lines; with a part's base in its name, an unreadable part
    <stem>.lost   losses by reason: JSON

All of it has a share of the spool of its own, so that it never keeps records out; what goes beyond
is counted only.
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
"""What is kept aside may take this much where nobody has said otherwise (bytes)."""


@dataclass(frozen=True)
class DeadLetter:
    """A record the server refused for good, and why."""

    record: bytes
    reason: str


class DeadLetters:
    """Where one segment's are put. By whoever ships it, but for `save_losses`.

    Args:
        paths: the segment.
        stats: counts what is put here, and tells the losses.
        cap_bytes: bound of what is kept aside in the whole directory.
    """

    def __init__(self, paths: Paths, stats: Counts, cap_bytes: int = ASIDE_BYTES) -> None:
        self._paths = paths
        self._stats = stats
        self._cap = Quota(paths.directory, cap_bytes, aside=True)

    def bury(self, dead: Sequence[DeadLetter]) -> None:
        """Keep what the server refused for good, with the reasons."""
        if dead:
            _guard.warn(
                "delivery.dead",
                "the server refused %s record(s) for good, the first one because: %s; see %s",
                len(dead),
                dead[0].reason,
                self._paths.dead,
            )
            self._stats.add(dead_letters=self._keep(self._paths.dead, map(_dead_line, dead)))

    def keep_bad(self, lines: Sequence[bytes]) -> None:
        """Keep torn and corrupt lines."""
        if lines:
            _guard.warn(
                "delivery.bad",
                "%s torn or corrupt line(s), kept in %s",
                len(lines),
                self._paths.bad,
            )
            kept = self._keep(self._paths.bad, (line + line_format.LF for line in lines))
            self._stats.add(bad_lines=kept)

    def keep_part(self, path: Path) -> None:
        """Keep a part that cannot be read, for somebody who can."""
        _guard.warn("delivery.part", "%s cannot be read; its records are given up", path)
        try:
            size = path.stat().st_size
            if self._cap.has_room(size):
                path.rename(path.with_suffix(".bad"))
                self._cap.add(size)
        except OSError as error:
            _guard.warn("delivery.aside", "cannot keep %s: %s", path, error)

    def save_losses(self) -> None:
        """Bring the losses on disk up to date, for other processes. Any thread; blocks on it."""
        try:
            self._stats.save_losses(self._add_losses)
        except OSError as error:
            _guard.warn("delivery.losses", "cannot write %s: %s", self._paths.lost, error)

    def _add_losses(self, losses: Counter[str]) -> None:
        # Whoever ships the segment of a process that works offline adds its own.
        losses = load_losses(self._paths.lost) + losses
        replace_private(self._paths.lost, json.dumps(losses).encode(), durable=False)

    def _keep(self, path: Path, lines: Iterable[bytes]) -> int:
        """Append lines as far as there is room; returns how many, and counts the others."""
        kept: list[bytes] = []
        for line in lines:
            if self._cap.has_room(len(line)):
                self._cap.add(len(line))
                kept.append(line)
            else:
                self._stats.drop(ASIDE_FULL)
        if not kept:
            return 0
        try:
            append_private(path, b"".join(kept))
        except OSError as error:
            _guard.warn("delivery.aside", "cannot write %s: %s", path, error)
            self._stats.drop(reason_of(error), len(kept))
            return 0
        return len(kept)


def load_losses(path: Path) -> Counter[str]:
    """The losses by reason that a file tells; none where it cannot be read."""
    try:
        return Counter({str(key): int(n) for key, n in json.loads(path.read_bytes()).items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return Counter()


def _dead_line(letter: DeadLetter) -> bytes:
    content: dict[str, object] = {"time_ns": time.time_ns(), "reason": letter.reason}
    try:
        content["record"] = letter.record.decode()
    except UnicodeDecodeError:
        content["record_base64"] = base64.b64encode(letter.record).decode()
    return json.dumps(content).encode() + line_format.LF
