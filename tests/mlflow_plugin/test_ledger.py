"""The end of a trace tells what was lost before it."""

from __future__ import annotations

import orjson

from qitos_mlflow.mlflow_plugin.ledger import Ledger


def record(kind: str, trace_id: str = "t", **fields: object) -> bytes:
    """A record as it is refined."""
    return orjson.dumps({"kind": kind, "trace_id": trace_id, **fields})


def test_losses_are_added_to_those_the_agent_knows() -> None:
    """By reason, and for each trace its own; what is not a span is not counted."""
    ledger = Ledger(lambda payload: payload)
    for lost in [record("span"), record("span"), record("span", "other"), record("artifact")]:
        ledger.lost(lost, "disk_full")
    ledger.lost(record("span"), "queue_full")
    end = ledger.refine(record("trace_end", recorded=9, dropped={"queue_full": 1}))
    assert end is not None
    assert orjson.loads(end)["dropped"] == {"disk_full": 2, "queue_full": 2}
    other = ledger.refine(record("trace_end", "other", recorded=1, dropped={}))
    assert other is not None
    assert orjson.loads(other)["dropped"] == {"disk_full": 1}


def test_nothing_else_is_changed() -> None:
    """Records of traces that lost nothing, spans that speak of ends, and what is dropped."""
    ledger = Ledger(lambda payload: payload)
    ledger.lost(record("span"), "disk_full")
    for same in [record("span", output='"trace_end"'), record("trace_end", "other", dropped={})]:
        assert ledger.refine(same) == same
    assert Ledger(lambda payload: None).refine(b"") is None
