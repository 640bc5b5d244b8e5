"""The thread that sends what the spooling thread has written.

Receives positions from the spooling thread (`written`), has a `SegmentTransfer` send the records
before them. Decides when: at once for urgent records, after `SEND_EVERY_S` for others, after a
growing delay while the server fails, at once when a thread waits in `wait_delivered`. Between two
batches of its own it sends a batch of what dead processes left.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from qitos_mlflow import _guard
from qitos_mlflow._inheritance import check
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.leftovers import Leftovers
from qitos_mlflow.delivery.segment_transfer import SEND_TIMEOUT_S, SegmentTransfer
from qitos_mlflow.delivery.sink import steps
from qitos_mlflow.delivery.spool.reader import BATCH_BYTES

SEND_EVERY_S = 1.0
"""Spans gather this long before they are sent: seen within 2 s, and few requests (seconds)."""
LAST_TIMEOUT_S = 0.1
"""Ending what is left open gets at least this long, however late it is (seconds)."""
WAITED_FOR_DELAY_S = 1.0
"""While a thread waits in `wait_delivered`, attempts are no further apart than this (seconds)."""


class SendingThread(OwnThread):
    """Sends until `stop`. `work` is the thread; any other thread may call the other methods.

    Args:
        transfer: sends this process's segment.
        circuit: whether the server may be tried now.
        leftovers: sends the segments of dead processes.
    """

    def __init__(self, transfer: SegmentTransfer, circuit: Circuit, leftovers: Leftovers) -> None:
        super().__init__("qitos-mlflow-sending")
        self._transfer = transfer
        self._circuit = circuit
        self._leftovers = leftovers
        self._leftovers_turn = False
        self._changed = threading.Condition()
        self._written = 0
        self._due_at = 0.0
        self._hurry = False
        self._waiters = 0
        self._stop_by: float | None = None
        self.finished = False
        """Whether everything was sent when it ended, and nothing was left open on the server."""
        self._ended = False

    def written(self, position: int, *, urgent: bool) -> None:
        """Records before `position` can be read; `urgent` ones are sent at once."""
        with self._changed:
            idle = self._written <= self._transfer.position
            if urgent:
                self._due_at = 0.0
            elif idle:
                self._due_at = time.monotonic() + SEND_EVERY_S
            self._written = position
            # Else it sleeps until then: to wake it for every append costs an agent that works.
            if urgent or idle or position - self._transfer.position >= BATCH_BYTES:
                self._changed.notify_all()

    @property
    def position(self) -> int:
        """Every record before it was accepted or refused."""
        return self._transfer.position

    @property
    def progress(self) -> object:
        """Another value whenever it gets on: with each record that is accepted or refused.

        Until an attempt fails, also with each `progressed` and each module that is imported. What
        fails again and again is no progress, however far it gets. None once the thread has ended.
        """
        if self._ended:
            return None
        if self._circuit.online is False:
            return self.position
        return self.position, steps[self.ident or threading.get_ident()], len(sys.modules)

    @property
    def looks_for_leftovers(self) -> bool:
        """Whether the server answers and a dead process may have left something to send."""
        return self._leftovers.pending and self._circuit.online is True

    def wait_delivered(self, position: int, deadline: float) -> bool:
        """Wait until every record before `position` is accepted or refused; True when it is.

        False when `deadline`, a time of the monotonic clock (seconds), passes first, or the thread
        has ended. Has one attempt made at once, even while the circuit is open.
        """
        with self._changed:
            self._waiters += 1
            self._hurry = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(
                    lambda: self._ended or self._transfer.position >= position,
                    max(0.0, deadline - time.monotonic()),
                )
                return self._transfer.position >= position
            finally:
                self._waiters -= 1
                self._changed.notify_all()  # Leftovers wait while another thread waits here.

    def send_here(self, position: int, deadline: float) -> bool:
        """Do on the calling thread what `work` would do, until `position` or `deadline`.

        For a process that cannot start a thread any more.
        """
        while (left := deadline - time.monotonic()) > 0 and self.position < position:
            if self._circuit.online is False:
                time.sleep(min(self._circuit.delay_s, WAITED_FOR_DELAY_S, left))
            left = max(0.01, min(SEND_TIMEOUT_S, deadline - time.monotonic()))
            self.attempt(left, patient=False)
        return self.position >= position

    def stop(self, deadline: float) -> None:
        """End `work` after the step under way; what is not sent stays in the segment.

        Until `deadline` (monotonic), it still ends what the records leave open.
        """
        with self._changed:
            self._stop_by = deadline
            self._changed.notify_all()

    def work(self) -> None:
        """Send until stopped, end what the records sent have left open, close the sinks."""
        while (step := self._wait_for_work()) is not None:
            step()
        if 0 < self._written <= self._transfer.position:
            timeout_s = max(LAST_TIMEOUT_S, (self._stop_by or 0.0) - time.monotonic())
            end = partial(self._transfer.abandon, closed=True)
            # If this fails, the process that takes the segment does it. After a rest another
            # thread uses the pipeline's circuit.
            self.finished = bool(Circuit().attempt(end, min(SEND_TIMEOUT_S, timeout_s)))
        check()  # The sinks are the parent's.
        self._transfer.close()
        self._leftovers.close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def attempt(self, timeout_s: float = SEND_TIMEOUT_S, *, patient: bool = True) -> None:
        """Send one batch, and note how it went. Never raises; see `SegmentTransfer.step`."""
        with self._changed:
            end = self._written
            self._due_at = time.monotonic() + SEND_EVERY_S  # Of what comes while this is sent.
        step = partial(self._transfer.step, end=end, sealed=True, patient=patient)
        self._circuit.attempt(step, timeout_s)
        if self._circuit.problem is not None:
            _guard.warn(
                "delivery.later",
                "records are not delivered yet (%s); they are kept and sent again later",
                self._circuit.problem,
            )
        with self._changed:
            if self._transfer.position < end:  # One step had no room for all of them.
                self._due_at = 0.0
            self._leftovers_turn = True
            self._changed.notify_all()

    def _wait_for_work(self) -> Callable[[], None] | None:
        """Block until a step is due and return it; None when it is time to stop.

        Own records and leftovers take turns if both are due, so that neither waits for more
        than one batch of the other.
        """
        with self._changed:
            while self._stop_by is None:
                own, theirs = self._delay(), self._leftovers_delay()
                if theirs <= 0 and (own > 0 or self._leftovers_turn):
                    self._leftovers_turn = False
                    return self._leftovers.step
                if own <= 0:
                    self._hurry = False
                    return self.attempt
                delay = min(own, theirs)
                self._changed.wait(None if delay == math.inf else delay)
                check()
            return None

    def _delay(self) -> float:
        """In how many seconds the process's own records are due."""
        backlog = self._written - self._transfer.position
        if backlog <= 0:
            self._hurry = False
            return math.inf
        if self._hurry:
            return 0.0
        if self._circuit.online is False:
            return self._circuit.delay_apart_s(WAITED_FOR_DELAY_S if self._waiters else math.inf)
        if self._waiters or backlog >= BATCH_BYTES:
            return 0.0
        return self._due_at - time.monotonic()

    def _leftovers_delay(self) -> float:
        """In how many seconds leftovers are due: not while the server is away or flush waits."""
        if self._waiters or self._circuit.online is not True:
            return math.inf
        return self._leftovers.delay_s
