"""The thread that ships what the worker has spooled, as it comes and as the server lets it.

Receives positions from the worker (`written`), hands chunks to the sink through `SegmentTransfer`.
Knows when: at once for urgent records, after `LINGER_S` for others, later when the server
fails, now when somebody waits in flush().
"""

from __future__ import annotations

import threading
import time

from qitos_mlflow import _guard
from qitos_mlflow.delivery.backoff import Circuit
from qitos_mlflow.delivery.segment_transfer import BATCH_BYTES, SegmentTransfer
from qitos_mlflow.delivery.sink import OutOfTime, RetryLater

LINGER_S = 1.0
"""Spans gather this long before they are sent: seen within 2 s, and few requests (seconds)."""
SEND_TIMEOUT_S = 15.0
"""Longest a sink is given for one shipment (seconds)."""
PROBE_TIMEOUT_S = 5.0
"""The same right after a failure: enough for a server that is back."""
LAST_TIMEOUT_S = 0.1
"""To end what is left open there is at least this much, however late it is (seconds)."""
WAITED_FOR_DELAY_S = 1.0
"""While somebody waits in flush() or close(), attempts are no further apart than this."""


class SendingThread:
    """Ships until `stop`. `run` is the thread; all else may be called from any other thread."""

    def __init__(self, shipping: SegmentTransfer, circuit: Circuit) -> None:
        self._shipping = shipping
        self._circuit = circuit
        self._changed = threading.Condition()
        self._written = 0
        self._urgent = 0
        self._first_waiting_at = 0.0
        self._hurry = False
        self._waiters = 0
        self._stopping = False
        self._stop_by = 0.0
        self.finished = False
        """Whether all was shipped when it ended, and nothing was left open on the server."""
        self._ended = False

    def written(self, position: int, *, urgent: bool) -> None:
        """Records before `position` can be read; `urgent` ones go out at once."""
        with self._changed:
            if self._written <= self._shipping.position:
                self._first_waiting_at = time.monotonic()
            self._written = position
            if urgent:
                self._urgent = position
            self._changed.notify_all()

    @property
    def waited_for(self) -> bool:
        """Whether somebody is in `wait_shipped`."""
        return self._waiters > 0

    def wait_shipped(self, position: int, deadline: float) -> bool:
        """Wait until all before `position` is accepted or buried; False when that fails.

        It fails when `deadline`, a time of the monotonic clock (seconds), passes, and when the
        thread has ended. Makes one attempt at once, even while the circuit is open.
        """
        with self._changed:
            self._waiters += 1
            self._hurry = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(
                    lambda: self._ended or self._shipping.position >= position,
                    max(0.0, deadline - time.monotonic()),
                )
                return self._shipping.position >= position
            finally:
                self._waiters -= 1

    def ship_here(self, position: int, deadline: float) -> bool:
        """Do on this thread what `run` would do, until `position` or `deadline`.

        For when the interpreter lets no thread start any more.
        """
        while self._shipping.position < position:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._circuit.online is False:
                time.sleep(min(self._circuit.delay_s, WAITED_FOR_DELAY_S, left))
            self.attempt(max(0.01, min(SEND_TIMEOUT_S, deadline - time.monotonic())))
        return True

    def stop(self, deadline: float) -> None:
        """End `run` after the step under way; what is not shipped stays in the segment.

        Until `deadline` (monotonic), it still ends what the records leave open.
        """
        with self._changed:
            self._stop_by = deadline
            self._stopping = True
            self._changed.notify_all()

    def run(self) -> None:
        """Ship until stopped, then close the sink."""
        try:
            while self._wait_for_work():
                self.attempt()
            self.finish(self._stop_by)
        finally:
            self._shipping.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def finish(self, deadline: float) -> None:
        """No more records will come: end what those shipped have left open, close the sink.

        Never raises; `finished` tells whether anything is left to do.
        """
        try:
            if 0 < self._written <= self._shipping.position:
                timeout_s = max(LAST_TIMEOUT_S, deadline - time.monotonic())
                self._shipping.abandon(min(SEND_TIMEOUT_S, timeout_s), closed=True)
                self.finished = True
        except RetryLater:
            pass  # Whoever finds the segment does it.
        except Exception as error:  # noqa: BLE001 - the process ends as it would have
            _guard.report("delivery.finish", error)
        self._shipping.close()

    def attempt(self, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """One step and what follows from how it went. Never raises."""
        if self._circuit.probing:
            timeout_s = min(timeout_s, PROBE_TIMEOUT_S)
        began, end = time.monotonic(), self._written
        try:
            sent = self._shipping.step(end=end, sealed=True, timeout_s=timeout_s)
        except OutOfTime:
            self._circuit.succeeded()
        except RetryLater as later:
            self._circuit.failed(later.after_s)
            _guard.warn(
                "delivery.later",
                "not delivered yet (%s); records are kept and tried again",
                later.reason,
            )
        except OSError as error:
            self._circuit.failed()
            _guard.warn("delivery.read", "cannot read the spool, trying again: %s", error)
        except Exception as error:  # noqa: BLE001 - a bug must not end the thread
            _guard.report("delivery.shipper", error)
            self._circuit.failed()
        else:
            if sent:
                self._circuit.succeeded()
            elif self._shipping.position < end:  # Nothing there where something must be.
                self._circuit.failed()
        with self._changed:
            # What one step had no room for has waited; the rest came while it was sent.
            self._first_waiting_at = began - (LINGER_S if self._shipping.position < end else 0.0)
            self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Block until a step is due; False when it is time to stop."""
        with self._changed:
            while not self._stopping:
                backlog = self._written - self._shipping.position
                if backlog <= 0:
                    self._hurry = False
                    self._changed.wait()
                    continue
                delay = self._delay(backlog)
                if delay <= 0:
                    self._hurry = False
                    return True
                self._changed.wait(delay)
            return False

    def _delay(self, backlog: int) -> float:
        if self._hurry:
            return 0.0
        if self._circuit.online is False:
            delay = self._circuit.delay_s
            if self._waiters and not self._circuit.asked:
                delay = min(delay, WAITED_FOR_DELAY_S)
            return delay
        urgent = self._urgent > self._shipping.position
        if urgent or self._waiters or backlog >= BATCH_BYTES:
            return 0.0
        return self._first_waiting_at + LINGER_S - time.monotonic()
