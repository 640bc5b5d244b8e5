"""The end of a trace tells what was lost before it."""

from __future__ import annotations

import orjson

from qitos_mlflow.recording.losses import LossLedger


def record(kind: str, trace_id: str = "t", **fields: object) -> bytes:
    """A record as it is refined."""
    return orjson.dumps({"kind": kind, "trace_id": trace_id, **fields})


def test_losses_are_added_to_those_the_agent_knows() -> None:
    """By reason, and for each trace its own; what is not a span apart, with its kind."""
    ledger = LossLedger(lambda payload: payload)
    for start in [record("trace_start"), record("trace_start", "other")]:
        assert ledger.refine(start) == start
    for lost in [record("span"), record("span"), record("span", "other"), record("artifact")]:
        ledger.lost(lost, "disk_full")
    ledger.lost(record("span"), "queue_full")
    end = ledger.refine(record("trace_end", recorded=9, dropped={"queue_full": 1}))
    assert end is not None
    assert orjson.loads(end)["dropped"] == {"disk_full": 2, "queue_full": 2}
    assert orjson.loads(end)["lost"] == {"artifact_disk_full": 1}
    other = ledger.refine(record("trace_end", "other", recorded=1, dropped={}))
    assert other is not None
    assert orjson.loads(other)["dropped"] == {"disk_full": 1}


def test_nothing_is_remembered_of_a_trace_that_has_ended() -> None:
    """Spans of a worker thread that come after the end of their trace cost no memory for ever."""
    ledger = LossLedger(lambda payload: payload)
    for number in range(3):
        ledger.refine(record("trace_start", str(number)))
        ledger.refine(record("trace_end", str(number), dropped={}))
        ledger.lost(record("span", str(number)), "disk_full")
        ledger.lost(record("trace_end", str(number), dropped={}), "disk_full")
    assert not ledger._lost


def test_nothing_else_is_changed() -> None:
    """Records of traces that lost nothing, spans that speak of ends, and what is dropped."""
    ledger = LossLedger(lambda payload: payload)
    ledger.refine(record("trace_start"))
    ledger.lost(record("span"), "disk_full")
    for same in [record("span", output='"trace_end"'), record("trace_end", "other", dropped={})]:
        assert ledger.refine(same) == same
    assert LossLedger(lambda payload: None).refine(b"") is None
