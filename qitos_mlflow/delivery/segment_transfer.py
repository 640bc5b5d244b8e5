"""One segment to one sink, step by step: read, prepare, send, acknowledge. No thread of its own.

A step that fails leaves everything where it was, and the next one goes on from there. Nothing is
acknowledged before the sink has sent it; nothing is read before the last chunk is acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qitos_mlflow import _guard
from qitos_mlflow.delivery.sink import RetryLater, Shipment, Sink
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter
from qitos_mlflow.delivery.spool.reader import Chunk, SegmentReader

BATCH_RECORDS = 500
"""Records of one step, at most: what is sent again after a crash before its acknowledgement."""
BATCH_BYTES = 4 * 1024 * 1024
"""The same in bytes; so much is sent without waiting for more."""
SEND_BUGS = 3
"""A shipment that fails this often with anything but `RetryLater` is taken apart."""


class SegmentTransfer:
    """Delivers what `cursor` reads to the sink that `open_sink` makes. One thread only."""

    def __init__(self, cursor: SegmentReader, open_sink: Callable[[], Sink]) -> None:
        self._cursor = cursor
        self._open_sink = open_sink
        self._sink: Sink | None = None
        self._state = b""  # The sink's, as of the last acknowledgement.
        self._chunk: Chunk | None = None
        self._shipment: Shipment | None = None
        self._bugs = 0
        self._one_by_one = 0  # So many records to come are sent on their own.

    @property
    def position(self) -> int:
        """Everything before it has been accepted or buried. Any thread."""
        return self._cursor.position

    def step(self, *, end: int | None, sealed: bool, timeout_s: float) -> bool:
        """Send the next records, `BATCH_RECORDS` at most; False when there were none.

        Args:
            end: send nothing beyond this position; None for all there is.
            sealed: nobody appends up to there any more.
            timeout_s: about how long this may block.

        Raises:
            RetryLater: nothing was acknowledged; call again later.
        """
        if self._chunk is None:
            chunk = self._cursor.read(
                end=end,
                sealed=sealed,
                max_records=1 if self._one_by_one else BATCH_RECORDS,
                max_bytes=BATCH_BYTES,
            )
            if chunk.end == self._cursor.position:
                return False
            self._chunk = chunk
        if not self._chunk.records:
            self._cursor.acknowledge(self._chunk, self._cursor.state, ())
            self._chunk = None
            return True
        sink = self._open()
        self._send(sink, self._chunk, timeout_s)
        return True

    def abandon(self, timeout_s: float, *, closed: bool = False) -> None:
        """Send what ends the traces left open by a process that died, or has `closed` in order.

        Raises:
            RetryLater: call again later.
        """
        if closed and self._sink is None:
            return  # It has sent nothing that could be open.
        sink = self._open()
        try:
            if self._shipment is None:
                self._shipment = sink.abandoned(self._cursor.last_time_ns, closed=closed)
            if self._shipment is not None:
                self._cursor.aside.bury(self._shipment.send(timeout_s))
                self._shipment = None
        except RetryLater:
            raise
        except Exception as error:
            _guard.report("delivery.abandoned", error)
            raise RetryLater(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the sink."""
        sink, self._sink = self._sink, None
        if sink is not None:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - closing is a courtesy
                _guard.report("delivery.close_sink", error)

    def _open(self) -> Sink:
        if self._sink is None:
            try:
                sink = self._open_sink()
                if self._cursor.state is not None:
                    sink.restore(self._cursor.state)
                self._state = sink.state()
            except RetryLater:
                raise
            except Exception as error:
                _guard.report("delivery.open_sink", error)
                raise RetryLater(f"{type(error).__name__}: {error}") from error
            self._sink = sink
        return self._sink

    def _send(self, sink: Sink, chunk: Chunk, timeout_s: float) -> None:
        tolerated = 1  # Mapping is pure: what fails once fails always.
        try:
            if self._shipment is None:
                self._shipment = sink.prepare(chunk.records)
            tolerated = SEND_BUGS
            dead = self._shipment.send(timeout_s)
            state = sink.state()
        except RetryLater:
            raise
        except Exception as error:
            _guard.report("delivery.ship", error)
            self._bugs += 1
            if self._bugs < tolerated:
                raise RetryLater(f"{type(error).__name__}: {error}") from error
            self._take_apart(sink, chunk, f"{type(error).__name__}: {error}")
        else:
            self._acknowledge(chunk, state, dead)

    def _take_apart(self, sink: Sink, chunk: Chunk, reason: str) -> None:
        """Find the one record that the sink has a bug for, and bury that alone."""
        sink.restore(self._state)
        if len(chunk.records) == 1:
            self._acknowledge(chunk, self._state, [DeadLetter(chunk.records[0], reason)])
            return
        self._one_by_one = len(chunk.records)
        self._chunk = self._shipment = None
        self._bugs = 0

    def _acknowledge(self, chunk: Chunk, state: bytes, dead: Sequence[DeadLetter]) -> None:
        self._cursor.acknowledge(chunk, state, dead)
        self._state = state
        self._one_by_one = max(0, self._one_by_one - len(chunk.records))
        self._chunk = self._shipment = None
        self._bugs = 0
