"""The end of a trace says what was lost before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.settings import Settings


@pytest.fixture
def pipeline(tmp_path: Path) -> RecordPipeline:
    """A pipeline that was offered nothing."""
    made = RecordPipeline(b"{}", "key", Settings(offline=True, spool_dir=tmp_path))
    made.field_bytes = 1000
    return made


def record(kind: str, trace_id: str = "t", **fields: object) -> bytes:
    """A record of a trace."""
    return orjson.dumps({"kind": kind, "trace_id": trace_id, **fields})


def end_of(pipeline: RecordPipeline, trace_id: str = "t") -> dict[str, Any]:
    """The end of a trace as it goes to disk."""
    data = pipeline.normalize(record("trace_end", trace_id, dropped={}, lost={}))
    assert data is not None
    end: dict[str, Any] = orjson.loads(data)
    return end


def test_losses_of_both_threads_are_added_up(pipeline: RecordPipeline) -> None:
    """By reason, and for each trace its own; what is not a span apart, with its kind."""
    pipeline.add_loss("t", "span", "queue_full")
    for lost in [record("span"), record("span"), record("span", "other"), record("artifact")]:
        pipeline.lost(lost, "disk_full")
    pipeline.add_loss("t", "span", "queue_full")
    end = end_of(pipeline)
    assert end["dropped"] == {"disk_full": 2, "queue_full": 2}
    assert end["lost"] == {"artifact_disk_full": 1}
    assert end_of(pipeline, "other")["dropped"] == {"disk_full": 1}


def test_nothing_is_remembered_of_a_trace_that_has_ended(pipeline: RecordPipeline) -> None:
    """Spans that come after the end of their trace cost no memory for ever."""
    for trace_id in "abc":
        pipeline.add_loss(trace_id, "span", "queue_full")
        end_of(pipeline, trace_id)
        pipeline.lost(record("span", trace_id, late=1), "disk_full")
        pipeline.lost(record("trace_end", trace_id, dropped={}), "disk_full")
    assert not pipeline._losses


def test_a_trace_without_losses_says_so(pipeline: RecordPipeline) -> None:
    """Its counts are empty, not missing."""
    end = end_of(pipeline, "unknown")
    assert (end["dropped"], end["lost"]) == ({}, {})
