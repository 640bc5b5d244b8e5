"""What was lost of one trace between the agent and the spool, by reason. One ledger a trace.

Counted on the agent's thread (the queue is full, a span cannot be read) and on the spooling thread
(the disk is full). The record of the trace's end gets the sums when it is normalized: everything
before it is in the spool by then, or known to be lost. Later losses are only in the counts of the
pipeline, which `qitos-mlflow status` shows.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any


class TraceLosses:
    """The loss ledger of one trace. Any thread; waits for nothing longer than an addition."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may record while this thread counts.
        self._lock = threading.RLock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, reason: str, number: int = 1) -> None:
        """Count records of this kind (``span``, ``artifact``, …) that were lost."""
        with self._lock:
            self._counts[kind, reason] += number

    def complete(self, end: dict[str, Any]) -> None:
        """Write the sums into a ``trace_end`` record.

        Its ``dropped`` counts spans by reason, its ``lost`` the other records by kind and reason.
        """
        with self._lock:
            counts = dict(self._counts)
        dropped = {reason: n for (kind, reason), n in counts.items() if kind == "span"}
        end["dropped"] = dropped
        end["lost"] = {
            f"{kind}_{reason}": n for (kind, reason), n in counts.items() if kind != "span"
        }
