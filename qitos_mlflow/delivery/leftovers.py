"""Delivers segments of other processes, each to its end or as far as it goes.

`deliver_segment` is one call of `qitos-mlflow sync`; `Leftovers` is what the sending thread of a
living process takes over between its own batches. Segments of dead processes are delivered to
their end, their open traces ended, their files deleted. Of living processes, only those that work
offline are delivered by others.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Generator
from enum import Enum
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.segment_transfer import SEND_TIMEOUT_S, SegmentTransfer
from qitos_mlflow.delivery.sink import OutOfTime, RetryLater, Sink
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.locks import is_held
from qitos_mlflow.delivery.spool.paths import Paths, find_segments
from qitos_mlflow.delivery.spool.segments import Claim, claim, read_head

REPORT_EVERY_S = 0.5
"""How often `deliver_segment` reports progress while it waits (seconds)."""
MAKE_ROOM_AFTER_S = 60.0
"""A segment that has failed for this long makes room for others (seconds)."""
FIRST_LOOK_S = 2.0
"""When a process first looks for leftovers: not in one that ends sooner (seconds)."""
LOOK_EVERY_S = 30.0
"""How often a process looks through the spool for leftovers (seconds)."""
LEFTOVERS_STEP_S = 1.0
"""How long one step with leftovers may keep a process's own records waiting, about (seconds). A
server that needs longer for one request gets leftovers from `qitos-mlflow sync` alone."""
BATCH_PAUSE_S = 0.1
"""Between two batches of leftovers, so that they leave the agent the processor (seconds)."""

OpenSink = Callable[[bytes], Sink]
"""Makes a sink for a segment's header; may raise, then it is tried again."""
OpenLeftovers = Callable[[bytes], "Callable[[], Sink] | None"]
"""Returns what opens the sink for a segment with this header; None leaves the segment alone."""


class Outcome(Enum):
    """How far the delivery of a segment has come."""

    FINISHED = "finished"
    """Everything is delivered, the owner is gone, the files are deleted; or there was nothing."""
    UP_TO_DATE = "up to date"
    """Everything so far is delivered; the owner lives and may write more."""
    BUSY = "busy"
    """Another process delivers it: its owner, or another sync."""
    UNREADABLE = "unreadable"
    """The header is damaged in every part, so the destination is not known."""
    UNFINISHED = "unfinished"
    """The delivery was stopped; the rest is kept."""


class Delivery:
    """The delivery of one claimed segment. One thread only; close it."""

    def __init__(self, claimed: Claim, open_sink: Callable[[], Sink]) -> None:
        self.circuit = Circuit()
        self.problem: str | None = None
        """Why the last step failed; None after a success."""
        self.owner_alive = True
        """Whether the segment's owner was alive at the last step."""
        self._claim = claimed
        self._transfer = SegmentTransfer(claimed.reader, open_sink)
        self._failing_since = 0.0
        self._out_of_time = False

    @property
    def may_wait(self) -> bool:
        """Whether it may make room for others without sending a batch from the beginning again."""
        return self.gives_up or (self.problem is None and not self._out_of_time)

    @property
    def gives_up(self) -> bool:
        """Whether it has failed for so long that others should have its place."""
        failing_s = time.monotonic() - self._failing_since
        return self.problem is not None and failing_s >= MAKE_ROOM_AFTER_S

    def step(self, timeout_s: float = SEND_TIMEOUT_S) -> Outcome | None:
        """Send a batch; None when there may be more to do, now or after ``circuit.delay_s``."""
        self._out_of_time = False
        try:
            outcome = self._step(self.circuit.timeout_s(timeout_s))
        except OutOfTime:
            self._out_of_time = True
            outcome = None
        except RetryLater as later:
            self._failed(later.reason, later.after_s)
            return None
        except OSError as error:
            self._failed(f"{self._claim.paths.stem} cannot be read or deleted: {error}")
            _guard.warn("delivery.read", "%s; it is tried again later", self.problem)
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
        # Before reading: what the owner wrote until then is read.
        alive = self.owner_alive = self._claim.owner_alive()
        if self._transfer.step(end=None, sealed=not alive, timeout_s=timeout_s):
            return None
        if alive:
            return Outcome.UP_TO_DATE
        self._transfer.abandon(timeout_s)
        self._claim.finish()
        return Outcome.FINISHED

    def close(self) -> None:
        """Close the sink and release the segment for others."""
        self._transfer.close()
        self._claim.release()


def take(
    paths: Paths, open_sink: OpenSink, stats: Counts, default_header: bytes | None = None
) -> Delivery | Outcome:
    """Claim a segment for delivery; an outcome where that is impossible or not needed.

    Raises:
        OSError: the spool cannot be read or written.
    """
    head = read_head(paths)
    if is_held(paths.own) and not head.offline:
        return Outcome.BUSY
    claimed = claim(paths, stats)
    if claimed is None:
        return Outcome.BUSY if paths.parts() and paths.parts(now=True) else Outcome.FINISHED
    header = default_header if head.caller is None else head.caller
    if header is None:
        claimed.release()
        return Outcome.UNREADABLE
    return Delivery(claimed, lambda: open_sink(header))


def deliver_segment(
    paths: Paths,
    open_sink: OpenSink,
    *,
    stop: threading.Event | None = None,
    stats: Counts | None = None,
    progress: Callable[[Counts], None] | None = None,
    failed: Callable[[str], None] | None = None,
    default_header: bytes | None = None,
) -> Outcome:
    """Deliver what a segment has now. Blocks, and waits for the server until `stop` is set.

    Args:
        paths: the segment, see `find_segments`.
        open_sink: given the segment's header, on this thread.
        stop: ends it, after the step under way.
        stats: counts what is delivered.
        progress: called with `stats` after each step and every `REPORT_EVERY_S` while waiting.
        failed: called with the reason when a step fails that is tried again.
        default_header: for a segment whose own cannot be read.

    Raises:
        OSError: the spool cannot be read or written.
    """
    stop = stop or threading.Event()
    stats = stats or Counts()
    taken = take(paths, open_sink, stats, default_header)
    if isinstance(taken, Outcome):
        return taken
    with contextlib.closing(taken) as delivery:
        while not stop.is_set():
            outcome = None
            if delay := delivery.circuit.delay_s:
                stop.wait(min(delay, REPORT_EVERY_S))  # A server may ask for minutes.
            else:
                outcome = delivery.step()
                if failed is not None and delivery.problem is not None:
                    failed(delivery.problem)
            if progress is not None:
                progress(stats)
            if outcome is not None:
                return outcome
    return Outcome.UNFINISHED


class Leftovers:
    """What dead processes of this host left in the spool. Sending thread only, but for `pending`.

    Leaves alone what other hosts recorded (they see to it) and what was recorded offline (its user
    decides when it is delivered). A segment that fails keeps its place for `MAKE_ROOM_AFTER_S`, and
    is tried again at the next look.

    Args:
        directory: the spool.
        open_leftovers: returns what opens a sink for a header, None to leave its segment alone.
    """

    def __init__(self, directory: Path, open_leftovers: OpenLeftovers) -> None:
        self.pending = True
        """Whether a look is due or under way. Any thread."""
        self._directory = directory
        self._open_leftovers = open_leftovers
        self._due_at = time.monotonic() + FIRST_LOOK_S
        self._steps = self._looks()

    @property
    def delay_s(self) -> float:
        """In how many seconds the next step is due."""
        return self._due_at - time.monotonic()

    def step(self) -> None:
        """Send one batch of a leftover segment, if there is one. Never raises."""
        self._due_at = time.monotonic() + next(self._steps)

    def close(self) -> None:
        """Release the segment at hand for others. Nothing is sent afterwards."""
        self._steps.close()

    def _looks(self) -> Generator[float, None, None]:
        """Each step; yields how long to pause before the next one (seconds)."""
        while True:
            self.pending = True
            try:
                found = find_segments(self._directory)
            except OSError:  # The directory is gone, or cannot be read now.
                found = []
            for paths in found:
                yield from self._deliver(paths)
            self.pending = False
            yield LOOK_EVERY_S

    def _deliver(self, paths: Paths) -> Generator[float, None, None]:
        try:
            delivery = self._take(paths)
            if delivery is None:
                return
            with contextlib.closing(delivery):
                while not delivery.gives_up:
                    if delay_s := delivery.circuit.delay_s:
                        yield min(delay_s, LOOK_EVERY_S)  # A server may ask for minutes.
                    elif delivery.step(LEFTOVERS_STEP_S) is None:
                        yield BATCH_PAUSE_S
                    else:
                        break
        except OSError as error:
            _guard.warn(
                "delivery.leftovers",
                "records of a dead process cannot be read (%s); they are tried again later",
                error,
            )
        except Exception as error:  # noqa: BLE001 - a bug costs this segment its turn, no more
            _guard.report("delivery.leftovers", error)
        yield BATCH_PAUSE_S

    def _take(self, paths: Paths) -> Delivery | None:
        if is_held(paths.own):
            return None
        head = read_head(paths)
        if head.caller is None or head.offline:
            return None
        if head.host != socket.gethostname():
            return None
        open_sink = self._open_leftovers(head.caller)
        if open_sink is None:
            return None
        claimed = claim(paths, Counts())
        return None if claimed is None else Delivery(claimed, open_sink)
