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
from qitos_mlflow.delivery.files import Paths
from qitos_mlflow.delivery.locks import is_held
from qitos_mlflow.delivery.retry import Circuit
from qitos_mlflow.delivery.shipper import PROBE_TIMEOUT_S, SEND_TIMEOUT_S
from qitos_mlflow.delivery.shipping import Shipping
from qitos_mlflow.delivery.sink import RetryLater, Sink
from qitos_mlflow.delivery.spool import Claim, claim, find_segments, read_head
from qitos_mlflow.delivery.stats import Stats

POLL_S = 0.5
"""How often `follow` looks for new records and segments (seconds)."""

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
        self._claim = taken
        self._shipping = Shipping(taken.cursor, open_sink)
        self._finished = False

    def step(self, timeout_s: float) -> Outcome | None:
        """Ship some; None when there may be more to do, now or after ``circuit.delay_s``."""
        if self.circuit.online is False:
            timeout_s = min(timeout_s, PROBE_TIMEOUT_S)
        try:
            outcome = self._step(timeout_s)
        except RetryLater as later:
            self.problem = later.reason
            self.circuit.failed(later.after_s)
            return None
        except OSError as error:
            self.problem = f"cannot read or delete {self._claim.paths.stem}: {error}"
            self.circuit.failed()
            _guard.warn("delivery.read", "%s", self.problem)
            return None
        self.problem = None
        self.circuit.succeeded()
        return outcome

    def _step(self, timeout_s: float) -> Outcome | None:
        alive = self._claim.owner_alive()  # Before reading: what it wrote until then is read.
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
    stats: Stats | None = None,
    progress: Callable[[Stats], None] | None = None,
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
    stats = stats or Stats()
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
    stats: Stats | None = None,
    progress: Callable[[Stats], None] | None = None,
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
    stats = stats or Stats()
    deliveries: dict[Paths, Delivery] = {}
    try:
        while True:
            idle = _round(directory, open_sink, deliveries, stats, default_header, stop)
            if progress is not None:
                progress(stats)
            if stop.wait(POLL_S if idle else 0.0):
                return
    finally:
        for delivery in deliveries.values():
            delivery.close()


def _round(
    directory: Path,
    open_sink: OpenSink,
    deliveries: dict[Paths, Delivery],
    stats: Stats,
    default_header: bytes | None,
    stop: threading.Event,
) -> bool:
    """One step for each segment; True when none of them had anything to ship."""
    idle = True
    try:
        segments = find_segments(directory) if directory.is_dir() else []
    except OSError as error:
        _guard.warn("delivery.follow", "cannot look into %s: %s", directory, error)
        return idle
    for paths in segments:
        if stop.is_set():
            break
        try:
            delivery = deliveries.get(paths)
            if delivery is None:
                taken = _take(paths, open_sink, stats, default_header)
                if isinstance(taken, Outcome):
                    if taken is Outcome.UNREADABLE:
                        _guard.warn(
                            f"delivery.header.{paths.stem}",
                            "%s has no readable header, so its destination is not known",
                            paths.stem,
                        )
                    continue
                delivery = deliveries[paths] = taken
            if delivery.circuit.delay_s:
                continue
            outcome = delivery.step(SEND_TIMEOUT_S)
        except OSError as error:
            _guard.warn("delivery.follow", "cannot deliver %s: %s", paths.stem, error)
            continue
        if outcome is None and delivery.problem is None:
            idle = False
        if outcome is Outcome.FINISHED:
            deliveries.pop(paths).close()
    return idle


def _take(
    paths: Paths, open_sink: OpenSink, stats: Stats, default_header: bytes | None
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
