"""Spans lost between the agent and the spool, told by the end of their trace.

On the worker's thread only: whatever comes before a trace's end is on disk, or known to be lost,
when that is refined. A trace that does not end tells nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import orjson


class Ledger:
    """Wraps a pipeline's `refine` and hears of its losses.

    Args:
        refine: makes the record that goes to disk; None drops it on purpose.
    """

    def __init__(self, refine: Callable[[bytes], bytes | None]) -> None:
        self._refine = refine
        self._lost: dict[str, Counter[str]] = defaultdict(Counter)

    def lost(self, record: bytes, reason: str) -> None:
        """Count a record that was lost, as refined or, where that failed, as captured."""
        fields = orjson.loads(record)
        if fields["kind"] == "span":
            self._lost[fields["trace_id"]][reason] += 1

    def refine(self, payload: bytes) -> bytes | None:
        """The refined record; a trace's end with the losses that are known by now."""
        record = self._refine(payload)
        if not self._lost or record is None or b'"trace_end"' not in record:
            return record
        fields = orjson.loads(record)
        if fields["kind"] != "trace_end" or fields["trace_id"] not in self._lost:
            return record
        lost = self._lost.pop(fields["trace_id"])
        fields["dropped"] = dict(lost + Counter(fields["dropped"]))
        return orjson.dumps(fields)
