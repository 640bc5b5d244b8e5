"""The end of a trace says what was lost before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from qitos_mlflow.recording.losses import TraceLosses
from qitos_mlflow.recording.pipelines import Destination, RecordPipeline
from qitos_mlflow.settings import Settings


class Trace:
    """An open trace."""

    is_quiet = ended = False

    def __init__(self, trace_id: str) -> None:
        self.id = trace_id

    def kill(self, why: str) -> None:
        """Nothing is to be done."""


@pytest.fixture
def pipeline(tmp_path: Path) -> RecordPipeline:
    """A pipeline that was offered nothing."""
    destination = Destination(b"{}", lambda find: pytest.fail("offline"), lambda header: None)
    made = RecordPipeline("key", destination, Settings(offline=True, spool_dir=tmp_path))
    made.field_bytes = 1000
    return made


def record(kind: str, trace_id: str = "t", **fields: object) -> bytes:
    """A record of a trace."""
    return orjson.dumps({"kind": kind, "trace_id": trace_id, **fields})


def end_of(pipeline: RecordPipeline, trace_id: str = "t") -> dict[str, Any]:
    """The end of a trace as it goes to disk."""
    data = pipeline._normalize(record("trace_end", trace_id, dropped={}, lost={}))
    assert data is not None
    end: dict[str, Any] = orjson.loads(data)
    return end


def test_losses_of_both_threads_are_one_account(pipeline: RecordPipeline) -> None:
    """By reason, and for each trace its own; what is not a span apart, with its kind."""
    own = Trace("t"), Trace("other")  # Held, as the plugin does.
    ledger, _ = map(pipeline.add, own)
    ledger.add("span", "queue_full")
    for lost in [record("span"), record("span"), record("span", "other"), record("artifact")]:
        pipeline._dropped(lost, "disk_full")
    ledger.add("span", "queue_full")
    end = end_of(pipeline)
    assert end["dropped"] == {"disk_full": 2, "queue_full": 2}
    assert end["lost"] == {"artifact_disk_full": 1}
    assert end_of(pipeline, "other")["dropped"] == {"disk_full": 1}


def test_nothing_is_remembered_of_a_trace_that_has_ended(pipeline: RecordPipeline) -> None:
    """Spans that come after the end of their trace cost no memory for ever."""
    for number in range(3):
        trace = Trace(str(number))
        pipeline.add(trace)
        end_of(pipeline, trace.id)
        pipeline._dropped(record("span", trace.id), "disk_full")
        pipeline._dropped(record("trace_end", trace.id, dropped={}), "disk_full")
    assert not pipeline._losses


def test_the_end_of_an_unknown_trace_stays_as_it_is(pipeline: RecordPipeline) -> None:
    """It is that of another process, or comes again."""
    end = end_of(pipeline, "unknown")
    assert (end["dropped"], end["lost"]) == ({}, {})


def test_a_trace_without_losses_says_so() -> None:
    """Its account is empty, not missing."""
    end: dict[str, Any] = {}
    TraceLosses().complete(end)
    assert end == {"dropped": {}, "lost": {}}
