"""What was lost between the agent and the spool, told by the end of its trace.

On the worker's thread only: whatever comes before a trace's end is on disk, or known to be lost,
when that is refined. What is lost later, or of a trace that does not end, only the spool tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import orjson


class LossLedger:
    """Wraps a pipeline's `refine` and hears of its losses.

    Args:
        refine: makes the record that goes to disk; None drops it on purpose.
    """

    def __init__(self, refine: Callable[[bytes], bytes | None]) -> None:
        self._refine = refine
        self._lost: dict[str, Counter[tuple[str, str]]] = {}  # Of the traces that are going.

    def lost(self, record: bytes, reason: str) -> None:
        """Count a record that was lost, as refined or, where that failed, as captured."""
        fields = orjson.loads(record)
        if (lost := self._lost.get(fields["trace_id"])) is not None:
            lost[fields["kind"], reason] += 1

    def refine(self, payload: bytes) -> bytes | None:
        """The refined record; a trace's end with the losses that are known by now.

        Its `dropped` counts spans by reason, its `lost` the rest by kind and reason.
        """
        record = self._refine(payload)
        if record is None or b'"kind":"trace_' not in record:
            return record
        fields = orjson.loads(record)
        if fields["kind"] == "trace_start":
            self._lost[fields["trace_id"]] = Counter()
        if fields["kind"] != "trace_end" or not (lost := self._lost.pop(fields["trace_id"], None)):
            return record
        for (kind, reason), number in lost.items():
            counts, key = ("dropped", reason) if kind == "span" else ("lost", f"{kind}_{reason}")
            known = fields.setdefault(counts, {})
            known[key] = known.get(key, 0) + number
        return orjson.dumps(fields)
