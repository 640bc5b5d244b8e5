"""A processor that writes to a spool only, and what it has written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.delivery import find_segments, living, waiting_records


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Path]:
    """The spool; taken away at the end, or the tests' own process would tell of what it keeps.

    A score may have a pipeline that no processor uses. Offline, it would stay awake.
    """
    directory = tmp_path / "spool"
    yield directory
    for pipeline in list(living.values()):
        if pipeline.paths.directory == directory:
            pipeline.close(10.0)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def attach(spool: Path) -> Iterator[Callable[..., MlflowTraceProcessor]]:
    """Register a processor that writes to the spool only: ``attach(capture_content=False, …)``."""
    attached: list[MlflowTraceProcessor] = []

    def attach(**options: Any) -> MlflowTraceProcessor:
        processor = MlflowTraceProcessor(offline=True, **options)
        tracing.add_trace_processor(processor)
        attached.append(processor)
        return processor

    yield attach
    for processor in attached:
        tracing.remove_trace_processor(processor)
        processor.shutdown()


@pytest.fixture
def records(
    attach: Callable[..., MlflowTraceProcessor], spool: Path
) -> Callable[[], list[dict[str, Any]]]:
    """Close what `attach` made, and read everything that it has written."""

    def read() -> list[dict[str, Any]]:
        for processor in tracing.processors():
            if isinstance(processor, MlflowTraceProcessor):
                processor.shutdown()
        for pipeline in list(living.values()):  # Those that no processor uses.
            pipeline.flush(10.0)
        found = [waiting_records(segment) for segment in find_segments(spool)]
        return [orjson.loads(record) for segment in found for record in segment]

    return read
