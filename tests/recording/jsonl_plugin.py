"""A second durable plugin: it appends each record as a line of JSON to a file.

It shows what `recording` and `delivery` give to any plugin, without a word of MLflow: spans survive
`kill -9` in the spool, credentials are redacted, and leftovers are delivered by the next process.
Copy it as a start for a plugin of your own; only the sink is about JSON lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pluggy

from qitos_mlflow.delivery import (
    Counts,
    DeadLetter,
    Delivery,
    RetryLater,
    Sink,
    find_segments,
    take,
)
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings

hookimpl = pluggy.HookimplMarker("qitos")


class JsonlSink:
    """A `Sink`. A line depends on no other line, so there is no state to keep."""

    patience = 1.0

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data = b""

    def restore(self, state: bytes) -> None:
        """Nothing to go back to."""

    def prepare(self, records: Sequence[bytes]) -> None:
        self._data = b"".join(record + b"\n" for record in records)

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        return False

    def send(self, timeout_s: float) -> list[DeadLetter]:
        """Append what has not been written yet.

        Raises:
            RetryLater: the file cannot be written now.
        """
        try:
            with self._file.open("ab", buffering=0) as file:
                while self._data:
                    self._data = self._data[file.write(self._data) :]
        except OSError as error:
            raise RetryLater(f"{error.strerror}: {self._file}") from error
        return []

    def state(self) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing is open between two batches."""


def open_sink(header: bytes) -> Sink:
    """The sink for a segment with this header."""
    return JsonlSink(Path(json.loads(header)["file"]))


def deliver(spool: Path) -> None:
    """Deliver what dead processes left in this spool."""
    for paths in find_segments(spool):
        taken = take(paths, open_sink, Counts())
        if isinstance(taken, Delivery):
            with closing(taken):
                while taken.step() is None:
                    time.sleep(taken.circuit.delay_s)


class JsonlPipeline(RecordPipeline):
    """The way of the records into one file."""

    def open_sink(self) -> Sink:
        return open_sink(self.header)

    def open_leftovers(self, header: bytes) -> Callable[[], Sink] | None:
        return partial(open_sink, header) if header == self.header else None


class JsonlPlugin:
    """The hooks. Nothing starts before the first trace.

    Args:
        file: where the lines go.
        spool: where records wait.
    """

    def __init__(self, file: Path, spool: Path) -> None:
        self._header = json.dumps({"file": str(file)}).encode()
        self._recorder: Recorder[TraceRecorder] = Recorder(Settings(spool_dir=spool))

    @hookimpl
    def qitos_trace_start(self, trace: Any) -> None:
        pipeline = self._recorder.pipeline_to(self._header, partial(JsonlPipeline, self._header))
        recorded = TraceRecorder(trace, pipeline, self._recorder.settings)
        self._recorder.add(trace.trace_id, recorded)
        recorded.start(trace)

    @hookimpl
    def qitos_span_start(self, span: Any) -> None:
        if (recorded := self._recorder.get(span.trace_id)) is not None:
            recorded.start_span(span)

    @hookimpl
    def qitos_span_end(self, span: Any) -> None:
        if (recorded := self._recorder.get(span.trace_id)) is not None:
            recorded.end_span(span)

    @hookimpl
    def qitos_trace_end(self, trace: Any) -> None:
        if (recorded := self._recorder.get(trace.trace_id)) is not None:
            recorded.end(trace)

    @hookimpl
    def qitos_force_flush(self, timeout_s: float | None) -> bool:
        return self._recorder.flush(timeout_s)

    @hookimpl
    def qitos_shutdown(self) -> None:
        self._recorder.close()
