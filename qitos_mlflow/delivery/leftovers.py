"""Delivers segments of other processes: for `qitos-mlflow sync`, once or as a sidecar.

Segments of dead processes are delivered to their end, their open traces ended, their files
deleted. Of living processes only those that are offline are shipped, as far as they go.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.sending_thread import PROBE_TIMEOUT_S, SEND_TIMEOUT_S
from qitos_mlflow.delivery.sink import OutOfTime, RetryLater, Sink
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.locks import is_held
from qitos_mlflow.delivery.spool.paths import Paths
from qitos_mlflow.delivery.spool.segments import Claim, claim, find_segments, read_head

POLL_S = 0.5
"""How often `follow` looks for new records and segments (seconds)."""
OPEN = 64
"""So many segments `follow` has in hand: a lock, a connection and some MiB of records each."""
TURN_S = 5.0
"""So long the segment of a dead process may go on before the next one has its turn (seconds)."""
PATIENCE_S = 60.0
"""A segment that has failed for this long makes room for others (seconds)."""

OpenSink = Callable[[bytes], Sink]
"""Makes a sink for a segment's header; may raise, then it is tried again."""


class Outcome(Enum):
    """Where the delivery of a segment stands."""

    FINISHED = "finished"
    """All delivered, owner gone, files deleted; or there was nothing to begin with."""
    UP_TO_DATE = "up to date"
    """All delivered so far; the owner lives and may write more."""
    BUSY = "busy"
    """Somebody else is shipping it: its owner, or another sync."""
    UNREADABLE = "unreadable"
    """The header is damaged in every part: nobody knows where the records are to go."""
    UNFINISHED = "unfinished"
    """The deadline passed or it was stopped; the rest is kept."""


class Delivery:
    """One claimed segment on its way. One thread only; close it."""

    def __init__(self, taken: Claim, open_sink: Callable[[], Sink]) -> None:
        self.circuit = Circuit()
        self.problem: str | None = None
        """Why the last step failed; None after a success."""
        self.owner_alive = True
        """Whether its owner was alive at the last step."""
        self._claim = taken
        self._shipping = SegmentTransfer(taken.cursor, open_sink)
        self._finished = False
        self._failing_since = 0.0
        self._out_of_time = False

    @property
    def may_wait(self) -> bool:
        """Whether others may have its place: it does not fail, or has done so for long."""
        if self._out_of_time:
            return False  # It would begin anew with what it is sending.
        return self.problem is None or time.monotonic() - self._failing_since >= PATIENCE_S

    def step(self, timeout_s: float) -> Outcome | None:
        """Ship some; None when there may be more to do, now or after ``circuit.delay_s``."""
        if self.circuit.probing:
            timeout_s = min(timeout_s, PROBE_TIMEOUT_S)
        self._out_of_time = False
        try:
            outcome = self._step(timeout_s)
        except OutOfTime:
            self._out_of_time = True
            outcome = None
        except RetryLater as later:
            self._failed(later.reason, later.after_s)
            return None
        except OSError as error:
            self._failed(f"cannot read or delete {self._claim.paths.stem}: {error}")
            _guard.warn("delivery.read", "%s", self.problem)
            return None
        self.problem = None
        self.circuit.succeeded()
        return outcome

    def _failed(self, problem: str, after_s: float | None = None) -> None:
        if self.problem is None:
            self._failing_since = time.monotonic()
        self.problem = problem
        self.circuit.failed(after_s)

    def _step(self, timeout_s: float) -> Outcome | None:
        # Before reading: what it wrote until then is read.
        alive = self.owner_alive = self._claim.owner_alive()
        if self._shipping.step(end=None, sealed=not alive, timeout_s=timeout_s):
            return None
        if alive:
            return Outcome.UP_TO_DATE
        self._shipping.abandon(timeout_s)
        self._claim.finish()
        self._finished = True
        return Outcome.FINISHED

    def close(self) -> None:
        """Close the sink and let others have the segment."""
        self._shipping.close()
        if not self._finished:
            self._claim.release()


def deliver_segment(
    paths: Paths,
    open_sink: OpenSink,
    *,
    timeout_s: float | None = None,
    stop: threading.Event | None = None,
    stats: Counts | None = None,
    progress: Callable[[Counts], None] | None = None,
    failed: Callable[[str], None] | None = None,
    default_header: bytes | None = None,
) -> Outcome:
    """Deliver what a segment has now; blocks, and waits while the server is away.

    Args:
        paths: the segment, see `find_segments`.
        open_sink: given the segment's header, on this thread.
        timeout_s: give up after this long; None waits for the server for ever.
        stop: set it to end early.
        stats: counts what is delivered, by default nobody's.
        progress: called after each step and every `POLL_S` while waiting, with `stats`.
        failed: told why a step failed that is tried again.
        default_header: for a segment whose own cannot be read.

    Raises:
        OSError: the spool cannot be read or written.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    stop = stop or threading.Event()
    stats = stats or Counts()
    taken = _take(paths, open_sink, stats, default_header)
    if isinstance(taken, Outcome):
        return taken
    try:
        while not stop.is_set():
            left = SEND_TIMEOUT_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            if delay := taken.circuit.delay_s:
                stop.wait(min(delay, left, POLL_S))  # A server may ask for minutes.
                outcome = None
            else:
                outcome = taken.step(min(SEND_TIMEOUT_S, left))
                if failed is not None and taken.problem is not None:
                    failed(taken.problem)
            if progress is not None:
                progress(stats)
            if outcome is not None:
                return outcome
        return Outcome.UNFINISHED
    finally:
        taken.close()


def follow(
    directory: Path,
    open_sink: OpenSink,
    *,
    stop: threading.Event,
    stats: Counts | None = None,
    progress: Callable[[Counts], None] | None = None,
    default_header: bytes | None = None,
) -> None:
    """Deliver all segments of `directory`, those to come as well, until `stop` is set.

    One thread for all: a segment whose server is away does not hold up the others' turns.

    Args:
        directory: the spool; may be missing yet.
        open_sink: given a segment's header, on this thread.
        stop: ends it, after the step under way.
        stats: counts what is delivered, by default nobody's.
        progress: called after each round, with `stats`.
        default_header: for segments whose own cannot be read.
    """
    stats = stats or Counts()
    following = _Following(directory, open_sink, stats, default_header, stop)
    try:
        while True:
            idle = following.round()
            if progress is not None:
                progress(stats)
            if stop.wait(POLL_S if idle else 0.0):
                return
    finally:
        following.close()


class _Following:
    """The segments of a directory that `follow` has in hand, `OPEN` at most."""

    def __init__(
        self,
        directory: Path,
        open_sink: OpenSink,
        stats: Counts,
        default_header: bytes | None,
        stop: threading.Event,
    ) -> None:
        self._directory = directory
        self._open_sink = open_sink
        self._stats = stats
        self._default_header = default_header
        self._stop = stop
        self._deliveries: dict[Paths, Delivery] = {}
        self._put_off: dict[Paths, float] = {}
        """Those that made room for others because they failed, and when (monotonic)."""

    def round(self) -> bool:
        """A turn for each segment; True when none of them has more to ship now."""
        idle = True
        try:
            segments = find_segments(self._directory) if self._directory.is_dir() else []
        except OSError as error:
            _guard.warn("delivery.follow", "cannot look into %s: %s", self._directory, error)
            self.close()  # It may be for want of the descriptors that they have.
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
                _guard.warn("delivery.follow", "cannot deliver %s: %s", paths.stem, error)
                continue
            if outcome is None and delivery.problem is None:
                idle = False
            if outcome is Outcome.FINISHED:
                self._deliveries.pop(paths).close()
        return idle

    def close(self) -> None:
        """Let others have the segments; what is delivered of them is on the disk."""
        while self._deliveries:
            self._deliveries.popitem()[1].close()

    def _begin(self, paths: Paths) -> Delivery | None:
        """Take a segment in hand; None where that is impossible, now or at all."""
        spare = None
        if len(self._deliveries) >= OPEN:
            # The one taken last, so that most of them keep their connections from round to round.
            waiting = (p for p, delivery in reversed(self._deliveries.items()) if delivery.may_wait)
            spare = next(waiting, None)
            if spare is None:
                return None
        taken = _take(paths, self._open_sink, self._stats, self._default_header)
        if isinstance(taken, Outcome):
            if taken is Outcome.UNREADABLE:
                _guard.warn(
                    f"delivery.header.{paths.stem}",
                    "%s has no readable header, so its destination is not known",
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
        """A step; where the owner is gone, as many as it takes to be rid of the segment."""
        until = time.monotonic() + TURN_S
        while True:
            outcome = delivery.step(SEND_TIMEOUT_S)
            over = outcome is not None or delivery.problem is not None or delivery.owner_alive
            if over or self._stop.is_set() or time.monotonic() >= until:
                return outcome


def _take(
    paths: Paths, open_sink: OpenSink, stats: Counts, default_header: bytes | None
) -> Delivery | Outcome:
    head = read_head(paths)
    if is_held(paths.own) and not head.about.get("offline"):
        return Outcome.BUSY
    taken = claim(paths, stats)
    if taken is None:
        return Outcome.BUSY if paths.parts() and paths.parts(now=True) else Outcome.FINISHED
    header = default_header if head.caller is None else head.caller
    if header is None:
        taken.release()
        return Outcome.UNREADABLE
    return Delivery(taken, lambda: open_sink(header))
