"""Delivers all segments of a directory as they come: `qitos-mlflow sync` as a sidecar."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.leftovers import Delivery, OpenSink, Outcome, take
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.paths import Paths, find_segments

FOLLOW_EVERY_S = 0.5
"""How often `follow` looks for new records and segments (seconds)."""
OPEN_SEGMENTS = 64
"""Most segments that `follow` has open: each is a lock, a connection and some MiB of records."""
TURN_S = 5.0
"""How long a dead process's segment is sent before the next one has its turn (seconds)."""


def follow(
    directory: Path,
    open_sink: OpenSink,
    *,
    stop: threading.Event,
    stats: Counts | None = None,
    progress: Callable[[Counts], None] | None = None,
    default_header: bytes | None = None,
) -> None:
    """Deliver all segments of `directory`, later ones included, until `stop` is set.

    One thread for all of them: a segment whose server is away does not delay the others.

    Args:
        directory: the spool; may not exist yet.
        open_sink: given a segment's header, on this thread.
        stop: ends it, after the step under way.
        stats: counts what is delivered.
        progress: called with `stats` after each round.
        default_header: for segments whose own cannot be read.
    """
    stats = stats or Counts()
    following = _Following(
        directory, lambda paths: take(paths, open_sink, stats, default_header), stop
    )
    try:
        while True:
            idle = following.round()
            if progress is not None:
                progress(stats)
            if stop.wait(FOLLOW_EVERY_S if idle else 0.0):
                return
    finally:
        following.close()


class _Following:
    """The segments of a directory that `follow` has open, `OPEN_SEGMENTS` at most."""

    def __init__(
        self, directory: Path, take: Callable[[Paths], Delivery | Outcome], stop: threading.Event
    ) -> None:
        self._directory = directory
        self._take = take
        self._stop = stop
        self._deliveries: dict[Paths, Delivery] = {}
        self._put_off: dict[Paths, float] = {}
        """Segments that made room for others because they failed, and when (monotonic)."""

    def round(self) -> bool:
        """Give each segment a turn; True when none of them has more to send now."""
        idle = True
        try:
            segments = find_segments(self._directory) if self._directory.is_dir() else []
        except OSError as error:
            _guard.warn(
                "delivery.follow",
                "%s cannot be read (%s); it is tried again",
                self._directory,
                error,
            )
            self.close()  # The open segments may have all the descriptors there are.
            return idle
        for paths in sorted(segments, key=lambda paths: self._put_off.get(paths, 0.0)):
            if self._stop.is_set():
                break
            try:
                delivery = self._deliveries.get(paths) or self._begin(paths)
                if delivery is None or delivery.circuit.delay_s:
                    continue
                outcome = self._turn(delivery)
            except OSError as error:
                _guard.warn("delivery.follow", "%s cannot be delivered yet: %s", paths.stem, error)
                continue
            if outcome is None and delivery.problem is None:
                idle = False
            if outcome is Outcome.FINISHED:
                self._deliveries.pop(paths).close()
        return idle

    def close(self) -> None:
        """Release the segments for others; what is delivered of them is on the disk."""
        while self._deliveries:
            self._deliveries.popitem()[1].close()

    def _begin(self, paths: Paths) -> Delivery | None:
        """Open a segment; None where that is impossible, now or at all."""
        spare = None
        if len(self._deliveries) >= OPEN_SEGMENTS:
            # The one opened last, so that most of them keep their connections from round to round.
            waiting = (p for p, delivery in reversed(self._deliveries.items()) if delivery.may_wait)
            spare = next(waiting, None)
            if spare is None:
                return None
        taken = self._take(paths)
        if isinstance(taken, Outcome):
            if taken is Outcome.UNREADABLE:
                _guard.warn(
                    f"delivery.header.{paths.stem}",
                    "%s has no readable header, so its destination is not known; name one with "
                    "`qitos-mlflow sync --tracking-uri URI`",
                    paths.stem,
                )
            return None
        if spare is not None:
            leaving = self._deliveries.pop(spare)
            leaving.close()
            if leaving.problem is not None:
                self._put_off[spare] = time.monotonic()
        self._put_off.pop(paths, None)
        self._deliveries[paths] = taken
        return taken

    def _turn(self, delivery: Delivery) -> Outcome | None:
        """One step; if the owner is gone, as many as it takes to finish the segment."""
        until = time.monotonic() + TURN_S
        while True:
            outcome = delivery.step()
            over = outcome is not None or delivery.problem is not None or delivery.owner_alive
            if over or self._stop.is_set() or time.monotonic() >= until:
                return outcome
