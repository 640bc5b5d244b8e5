"""Attempts to send, and when to try again: exponential backoff with full jitter.

A circuit breaker: closed while the server answers. A failure opens it: no attempt before the delay
has passed. The attempt after it is the probe (half-open); only its success closes the circuit.
Only the monotonic clock counts, so setting the wall clock changes nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from qitos_mlflow import _guard
from qitos_mlflow.delivery.sink import Hopeless, OutOfTime, RetryLater

T = TypeVar("T")

FIRST_DELAY_S = 0.5
"""Upper bound of the first delay (seconds); each further failure in a row doubles the bound."""
MAX_DELAY_S = 60.0
"""Upper bound of delays without Retry-After: a server that is back is noticed by then (seconds)."""
PROBES = 2
"""This many attempts after a failure get `PROBE_TIMEOUT_S` only; then time may be the cause."""
PROBE_TIMEOUT_S = 5.0
"""The time of an attempt right after a failure: enough for a server that is back (seconds)."""
MAX_RETRY_AFTER_S = 300.0
"""Longest Retry-After that is obeyed: a wrong header must not stop delivery for days (seconds)."""
RETRY_AFTER_SPREAD_S = 1.0
"""Added at random to Retry-After, so that agents do not all come back at once (seconds)."""


class Circuit:
    """Whether the server may be tried now. One thread makes attempts; any thread may read."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at = self._open_until = 0.0
        self._failing_since = 0.0
        self.online: bool | None = None
        """Whether the last attempt succeeded; None before the first one ended."""
        self.problem: str | None = None
        """Why the last attempt failed; None after one that succeeded."""
        self.hopeless = False
        """Whether time alone will not help."""
        self.got_on = False
        """Whether an attempt has carried out a part or all of its work, ever."""
        self._asked = False  # Whether the server named the delay itself (Retry-After).

    @property
    def failing_s(self) -> float:
        """How long ago the first one of the last failures in a row began (seconds)."""
        return time.monotonic() - self._failing_since if self._failures else 0.0

    @property
    def delay_s(self) -> float:
        """Seconds to wait before the next attempt; 0 when it may be made now."""
        return max(0.0, self._open_until - time.monotonic()) if self._failures else 0.0

    def delay_apart_s(self, apart_s: float) -> float:
        """`delay_s`, but no later than `apart_s` after the last attempt, if we chose the delay."""
        sooner_s = self._opened_at + apart_s - time.monotonic()
        return self.delay_s if self._asked else max(0.0, min(self.delay_s, sooner_s))

    def attempt(self, send: Callable[[float], T], timeout_s: float) -> T | None:
        """Call `send` with the seconds that it may take; None if it failed or is not done yet.

        Right after a failure these are fewer than `timeout_s`. Never raises: `problem` says what
        the matter is.
        """
        began, after_s, self.hopeless = time.monotonic(), None, False
        probe = 0 < self._failures <= PROBES
        try:
            done = send(min(timeout_s, PROBE_TIMEOUT_S) if probe else timeout_s)
        except OutOfTime:
            done, self.problem, self.got_on = None, None, True
        except RetryLater as later:
            done, self.problem, after_s = None, later.reason, later.after_s
            self.hopeless = isinstance(later, Hopeless)
            if later.got_on:  # What failed before has succeeded.
                self._failures, began, self.got_on = 0, time.monotonic(), True
        except OSError as error:
            done, self.problem = None, f"the spool cannot be read or written: {error}"
            _guard.warn("delivery.spool", "%s; it is tried again later", self.problem)
        except BaseException as error:  # noqa: BLE001 - a bug must not end the thread
            _guard.contain("delivery.sending", error)
            done, self.problem = None, _guard.in_words(error)
        else:
            self.problem, self.got_on = None, True
        self.online = self.problem is None
        if self.online:
            self._failures = 0
        else:
            self._open(began, after_s)
        return done

    def _open(self, began: float, after_s: float | None) -> None:
        if not self._failures:
            self._failing_since = began
        self._asked = after_s is not None
        if after_s is not None:
            least = min(max(after_s, 0.0), MAX_RETRY_AFTER_S)
            most = least + RETRY_AFTER_SPREAD_S
        else:
            least, most = 0.0, min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        self._opened_at = time.monotonic()
        self._open_until = self._opened_at + random.uniform(least, most)  # noqa: S311 - no secret
