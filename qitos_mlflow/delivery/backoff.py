"""When to try again: exponential backoff with full jitter, as a circuit breaker.

The circuit is closed while the server answers. A failure opens it: no attempt before the delay
has passed. The attempt after it is the probe (half-open); only its success closes the circuit.
Only the monotonic clock counts, so setting the wall clock changes nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

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
    """Whether the server may be tried now. One thread reports attempts; any thread may read."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        self._failures = 0
        self._open_until = 0.0
        self._succeeded = False
        self.asked = False
        """Whether the server named the delay itself (Retry-After)."""

    @property
    def online(self) -> bool | None:
        """Whether the last attempt succeeded; None before the first one ended."""
        return False if self._failures else True if self._succeeded else None

    def timeout_s(self, timeout_s: float) -> float:
        """How long the next attempt may take: `timeout_s`, or less right after a failure."""
        return min(timeout_s, PROBE_TIMEOUT_S) if 0 < self._failures <= PROBES else timeout_s

    @property
    def delay_s(self) -> float:
        """Seconds to wait before the next attempt; 0 when it may be made now."""
        return max(0.0, self._open_until - self._clock()) if self._failures else 0.0

    def succeeded(self) -> None:
        """An attempt got through: close the circuit."""
        self._failures = 0
        self._succeeded = True

    def failed(self, after_s: float | None = None) -> None:
        """An attempt failed: open the circuit, for `after_s` seconds when the server said so."""
        self.asked = after_s is not None
        if after_s is not None:
            delay = min(max(after_s, 0.0), MAX_RETRY_AFTER_S)
            delay += self._uniform(0.0, RETRY_AFTER_SPREAD_S)
        else:
            bound = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._failures, 16))
            delay = self._uniform(0.0, bound)
        self._failures += 1
        self._open_until = self._clock() + delay
