"""A second durable plugin: it appends each record as a line of JSON to a file.

It shows what `recording` and `delivery` give to any plugin, without a word of MLflow: spans survive
`kill -9` in the spool, credentials are redacted, and leftovers are delivered by the next process.
Copy it as a start for a plugin of your own; only the sink is about JSON lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pluggy

from qitos_mlflow.delivery import (
    DeadLetter,
    Pipeline,
    RetryLater,
    Shipment,
    Sink,
    deliver_segment,
    find_segments,
)
from qitos_mlflow.recording import snapshot
from qitos_mlflow.recording.contributions import ask_plugins
from qitos_mlflow.recording.normalize import normalize

hookimpl = pluggy.HookimplMarker("qitos")

FIELD_BYTES = 1024 * 1024
QUEUE_BYTES = 64 * 1024 * 1024
SPOOL_BYTES = 1024 * 1024 * 1024


class Lines:
    """One batch of records on its way into the file."""

    def __init__(self, file: Path, records: Sequence[bytes]) -> None:
        self._file = file
        self._data = b"".join(record + b"\n" for record in records)

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


class JsonlSink:
    """A `Sink`. A line depends on no other line, so there is no state to keep."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def restore(self, state: bytes) -> None:
        """Nothing to go back to."""

    def prepare(self, records: Sequence[bytes]) -> Shipment:
        return Lines(self._file, records)

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> Shipment | None:
        return None

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
        deliver_segment(paths, open_sink)


class JsonlPlugin:
    """The hooks. Nothing starts before the first trace.

    Args:
        file: where the lines go.
        spool: where records wait.
    """

    def __init__(self, file: Path, spool: Path) -> None:
        header = json.dumps({"file": str(file)}).encode()
        self._pipeline = Pipeline(
            header=header,
            normalize=partial(normalize, field_bytes=FIELD_BYTES, contributions=ask_plugins),
            open_sink=partial(open_sink, header),
            open_leftovers=lambda theirs: partial(open_sink, header) if theirs == header else None,
            directory=spool,
            queue_bytes=QUEUE_BYTES,
            spool_bytes=SPOOL_BYTES,
        )

    @hookimpl
    def qitos_trace_start(self, trace: Any) -> None:
        self._offer("trace_start", trace, name=trace.name, metadata=trace.metadata)

    @hookimpl
    def qitos_span_end(self, span: Any) -> None:
        record = snapshot.span_record(span.trace_id, span, None, True, FIELD_BYTES)
        self._pipeline.offer(record)

    @hookimpl
    def qitos_trace_end(self, trace: Any) -> None:
        self._offer("trace_end", trace, metadata=trace.metadata)

    @hookimpl
    def qitos_force_flush(self, timeout_s: float | None) -> bool:
        return self._pipeline.flush(30.0 if timeout_s is None else timeout_s)

    @hookimpl
    def qitos_shutdown(self) -> None:
        self._pipeline.close(5.0)

    def _offer(self, kind: str, trace: Any, **fields: Any) -> None:
        record = {"kind": kind, "trace_id": trace.trace_id, "time_ns": time.time_ns(), **fields}
        self._pipeline.offer(snapshot.encode(record), keep=True)
