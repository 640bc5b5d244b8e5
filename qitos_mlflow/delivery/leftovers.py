"""Delivers segments of other processes, each to its end or as far as it goes.

`take` claims one, for `qitos-mlflow sync`. `Deliveries` gives all those of a directory their turns,
for `follow` (`sync` as a sidecar) and for `Leftovers` (the sending thread of a living process,
between its own batches). Segments of dead processes are delivered to their end, their open traces
ended, their files deleted. Of living processes, only those that work offline are delivered by
others.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.segment_transfer import SEND_TIMEOUT_S, SegmentTransfer
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.files import check_directory
from qitos_mlflow.delivery.spool.locks import is_held
from qitos_mlflow.delivery.spool.paths import Paths, find_segments
from qitos_mlflow.delivery.spool.segments import Claim, claim, read_head, waiting_records

MAKE_ROOM_AFTER_S = 60.0
"""A segment that has failed for this long makes room for others between attempts (seconds)."""
FOLLOW_EVERY_S = 0.5
"""How often `follow` looks for new records and segments (seconds)."""
FIRST_LOOK_S = 2.0
"""When a process first looks for leftovers: not in one that ends sooner (seconds)."""
LOOK_EVERY_S = 30.0
"""How often a process looks through the spool for leftovers (seconds)."""
BATCH_PAUSE_S = 0.1
"""Between two batches of leftovers, so that they leave the agent the processor (seconds)."""

OpenSink = Callable[[bytes], Sink]
"""Makes the sink for a segment's header; what it raises is a failed attempt."""


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


class Delivery:
    """The delivery of one claimed segment. One thread only; close it."""

    def __init__(self, claimed: Claim, open_sink: Callable[[], Sink]) -> None:
        self.circuit = Circuit()
        self.owner_alive = True
        """Whether the segment's owner was alive at the last step."""
        self._claim = claimed
        self.transfer = SegmentTransfer(claimed.reader, open_sink)

    def step(self, timeout_s: float = SEND_TIMEOUT_S) -> Outcome | None:
        """Send a batch; None when there may be more to do, now or after ``circuit.delay_s``.

        Never raises; ``circuit.problem`` says why it failed, if it did.
        """
        return self.circuit.attempt(self._step, timeout_s)

    def _step(self, timeout_s: float) -> Outcome | None:
        # Before reading: what the owner wrote until then is read.
        alive = self.owner_alive = is_held(self._claim.paths.own)
        if self.transfer.step(timeout_s, end=None, sealed=not alive):
            return None
        if alive:
            return Outcome.UP_TO_DATE
        self.transfer.abandon(timeout_s)
        self._claim.finish()
        return Outcome.FINISHED

    def close(self) -> None:
        """Close the sink and release the segment for others."""
        self.transfer.close()
        self._claim.release()


def take(
    paths: Paths, open_sink: OpenSink, stats: Counts, default_header: bytes | None = None
) -> Delivery | Outcome:
    """Claim a segment for delivery; an outcome where that is impossible or not needed.

    Args:
        paths: the segment, see `find_segments`.
        open_sink: given the segment's header, on the thread that takes the steps.
        stats: counts what is delivered.
        default_header: for a segment whose own cannot be read.

    Raises:
        OSError: the spool cannot be read or written.
    """
    head = read_head(paths)
    if is_held(paths.own) and not head.offline:  # `claim` would wait for its other lock.
        return Outcome.BUSY
    claimed = claim(paths, stats)
    if claimed is None:
        return Outcome.BUSY if paths.parts() and paths.parts(now=True) else Outcome.FINISHED
    header = default_header if head.caller is None else head.caller
    if header is None:
        if any(waiting_records(paths)):
            claimed.release()
            return Outcome.UNREADABLE
        claimed.reader.state = None  # A power cut has left nothing to send, so no sink is opened.
    return Delivery(claimed, partial(open_sink, header or b""))


class Deliveries:
    """The segments of a directory that this process delivers for others. One thread only.

    A segment that fails keeps its place for `MAKE_ROOM_AFTER_S`. From then on it is open for its
    attempts only, so that other segments and other processes have their chance.

    Args:
        directory: the spool; may not exist yet.
        take: claims a segment; None leaves it alone for now. May raise.
    """

    most_open = 64
    """How many segments may be open at once: each is a lock, a connection and some MiB."""
    turn_s = 5.0
    """How long a dead process's segment is sent before the next one has its turn (seconds)."""
    timeout_s = SEND_TIMEOUT_S
    """About how long one step may take (seconds)."""

    def __init__(self, directory: Path, take: Callable[[Paths], Delivery | None]) -> None:
        self._directory = directory
        self._take = take
        self._open: dict[Paths, Delivery] = {}
        self._failed: dict[Paths, Circuit] = {}
        """The segments that have made room, and when they may be tried again."""

    def round(self) -> Iterator[bool | None]:
        """Give each segment a turn, if it needs one.

        Yields after each step whether the segment may go on at once, and None after each segment.
        """
        try:
            check_directory(self._directory)
            found = find_segments(self._directory) if self._directory.is_dir() else []
        except OSError as error:
            _guard.warn(
                f"delivery.{self._directory}",
                "%s cannot be read (%s); it is tried again",
                self._directory,
                error,
            )
            self.close()  # The open segments may have all the descriptors there are.
            return
        for gone in self._open.keys() - set(found):
            self._open.pop(gone).close()
        self._failed = {paths: self._failed[paths] for paths in found if paths in self._failed}
        for paths in found:
            try:
                delivery = self._open.get(paths) or self._begin(paths)
                if delivery is not None and not delivery.circuit.delay_s:
                    yield from self._turn(paths, delivery)
            except OSError as error:
                _guard.warn("delivery.look", "%s cannot be delivered yet: %s", paths.stem, error)
            except Exception as error:  # noqa: BLE001 - a bug costs this segment its turn, no more
                _guard.report("delivery.take", error)
            yield None

    def close(self) -> None:
        """Release the segments for others; what is delivered of them is on the disk."""
        while self._open:
            self._open.popitem()[1].close()

    def _begin(self, paths: Paths) -> Delivery | None:
        """Open a segment; None where that is impossible, now or at all."""
        circuit = self._failed.get(paths)
        if len(self._open) >= self.most_open or (circuit is not None and circuit.delay_s):
            return None
        delivery = self._take(paths)
        if delivery is not None:
            delivery.circuit = self._failed.pop(paths, delivery.circuit)
            self._open[paths] = delivery
        return delivery

    def _turn(self, paths: Paths, delivery: Delivery) -> Iterator[bool]:
        """One step; if the owner is gone, as many as it takes to finish the segment."""
        until = time.monotonic() + self.turn_s
        goes_on = True
        while goes_on:
            outcome = delivery.step(self.timeout_s)
            failing = delivery.circuit.problem is not None
            more = outcome is None and not failing
            goes_on = more and not delivery.owner_alive and time.monotonic() < until
            if failing:
                over = delivery.circuit.failing_s >= MAKE_ROOM_AFTER_S
                if over:
                    self._failed[paths] = delivery.circuit
            else:  # If others wait for room, it is opened again for its next turn.
                full = len(self._open) >= self.most_open
                over = not goes_on and full and not delivery.transfer.halfway
            if over or outcome is Outcome.FINISHED:
                self._open.pop(paths).close()
            yield more


def follow(
    directory: Path,
    opener: Callable[[Paths], OpenSink | None],
    stats: Counts,
    default_header: bytes | None = None,
) -> Iterator[float]:
    """Deliver all segments of `directory`, later ones included, until the iterator is closed.

    One thread for all of them: a segment whose server is away does not delay the others. Yields
    after each step, after each segment and after each look at the directory: how long the caller
    may wait, because there is nothing to do (seconds).

    Args:
        directory: the spool; may not exist yet.
        opener: what opens the sinks of a segment, on this thread; None leaves it alone for now.
        stats: counts what is delivered.
        default_header: for segments whose own cannot be read.
    """

    def take_readable(paths: Paths) -> Delivery | None:
        open_sink = opener(paths)
        if open_sink is None:
            return None
        taken = take(paths, open_sink, stats, default_header)
        if taken is Outcome.UNREADABLE:
            _guard.warn(
                f"delivery.header.{paths.stem}",
                "%s has no readable header, so its destination is not known; name one with "
                "`qitos-mlflow sync --tracking-uri URI`",
                paths.stem,
            )
        return taken if isinstance(taken, Delivery) else None

    with contextlib.closing(Deliveries(directory, take_readable)) as deliveries:
        while True:
            idle = True
            for more in deliveries.round():
                yield 0.0
                idle = idle and not more
            yield FOLLOW_EVERY_S if idle else 0.0


class Leftovers(Deliveries):
    """What dead processes of this machine left in the spool. Sending thread, but for `pending`.

    Leaves alone what other machines recorded (they see to it), what was recorded offline (its user
    decides when it is delivered), and what another user may have written: `sync` asks about that.

    Args:
        spool: the directory.
        opens: returns what opens a sink for a header, None to leave its segment alone.
    """

    most_open = 4
    """One that gets on, and some that are stuck: each has to fail for a while to be understood."""
    turn_s = math.inf
    timeout_s = 1.0
    """How long a step may keep a process's own records waiting, about (seconds). A server that
    needs longer for one request gets leftovers from `qitos-mlflow sync` alone."""

    def __init__(self, spool: Path, opens: Callable[[bytes], Callable[[], Sink] | None]) -> None:
        super().__init__(spool, self._take_left)
        self.pending = True
        """Whether a look is due or under way. Any thread."""
        self._opens = opens
        self._due_at = time.monotonic() + FIRST_LOOK_S
        self._steps = self._looks()

    @property
    def delay_s(self) -> float:
        """In how many seconds the next step is due."""
        return self._due_at - time.monotonic()

    def step(self) -> None:
        """Send one batch of a leftover segment, if there is one.

        Raises only what another thread injects; the next step begins a new look then.
        """
        try:
            self._due_at = time.monotonic() + next(self._steps)
        except BaseException:
            self._steps = self._looks()
            raise

    def _looks(self) -> Iterator[float]:
        """Each step; yields how long to pause before the next one (seconds)."""
        while True:
            self.pending = True
            for more in self.round():
                if more is not None:
                    yield BATCH_PAUSE_S
            self.pending = bool(self._open)
            # A server may ask for minutes.
            delays = [LOOK_EVERY_S, *(left.circuit.delay_s for left in self._open.values())]
            yield max(BATCH_PAUSE_S, min(delays))

    def _take_left(self, paths: Paths) -> Delivery | None:
        if is_held(paths.own) or not paths.all_own():
            return None
        head = read_head(paths)
        if head.caller is None or head.offline or head.machine != socket.gethostname():
            return None
        open_sink = self._opens(head.caller)
        claimed = None if open_sink is None else claim(paths, Counts())
        return None if open_sink is None or claimed is None else Delivery(claimed, open_sink)
