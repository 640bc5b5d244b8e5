"""Sends one segment to one sink, step by step: read, prepare, send, acknowledge. Has no thread.

A step that fails leaves everything as it was, and the next one goes on from there. Nothing is
acknowledged before the sink has sent it. Nothing is read before the last chunk is acknowledged.

A record is a dead letter if the server refuses it, or if the sink cannot map it: alone, again and
again, in a process that has memory to spare. No other exception says anything of a record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from qitos_mlflow import _guard
from qitos_mlflow._forks import importing
from qitos_mlflow._inheritance import check
from qitos_mlflow._json import memory_left
from qitos_mlflow.delivery.sink import RetryLater, Sink
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter
from qitos_mlflow.delivery.spool.reader import Chunk, SegmentReader

BATCH_RECORDS = 500
"""Most records of one step: what is sent again after a crash before its acknowledgement."""
SEND_TIMEOUT_S = 15.0
"""Longest that a sink gets for one step (seconds)."""

MEMORY_BYTES, MEMORY_FACTOR = 16 * 1024 * 1024, 16
"""Room below a limit of the process's memory, beside so many times the records, that a batch needs.
With less, protobuf may end the process."""

MAPPING_TRIES = 3
"""A record that the sink cannot map is tried alone at least this often, ..."""
MAPPING_S = 1.0
"""... and at least for this time (seconds)."""
OF_THE_PROCESS = (MemoryError, OSError)
"""Exceptions that are about the process, however often the same record has them."""


class SegmentTransfer:
    """Delivers what `reader` reads to the sink that `open_sink` makes. One thread only."""

    def __init__(self, reader: SegmentReader, open_sink: Callable[[], Sink]) -> None:
        self._reader = reader
        self._open_sink = open_sink
        self._sink: Sink | None = None
        self._state = b""  # The sink's, as of the last acknowledgement.
        self._chunk: Chunk | None = None
        self._prepared = False  # Whether the sink has something to send.
        self._most = BATCH_RECORDS  # How many records are read at once.
        self._failures, self._failing_since = 0, 0.0  # Of the first record, mapped alone.

    @property
    def position(self) -> int:
        """Every record before it was accepted or refused. Any thread."""
        return self._reader.position

    @property
    def halfway(self) -> bool:
        """Whether the sink may have sent a part of a batch, which another one would send again."""
        return self._chunk is not None or self._prepared

    def step(
        self, timeout_s: float, *, end: int | None, sealed: bool, patient: bool = True
    ) -> bool:
        """Send the next records, `BATCH_RECORDS` at most; False when there were none.

        Args:
            timeout_s: about how long this may block.
            end: send nothing beyond this position; None for everything there is.
            sealed: no more records are appended before `end`.
            patient: longer by the sink's own factor.

        Raises:
            RetryLater: nothing was acknowledged; call again later.
        """
        if self._chunk is None:
            chunk = self._reader.read(
                end=end,
                sealed=sealed,
                max_records=self._most,
            )
            if chunk.end == self._reader.position:
                if end is not None and chunk.end < end:
                    raise RetryLater("records are missing in the spool")
                return False
            self._chunk = chunk
        if not self._chunk.records:
            self._reader.acknowledge(self._chunk, self._reader.state, ())
            self._chunk = None
            return True
        sink = self._open()
        self._send(sink, self._chunk, timeout_s * (sink.patience if patient else 1.0))
        return True

    def abandon(self, timeout_s: float, *, closed: bool = False) -> bool:
        """Send what ends the traces left open by a process that died, or has `closed` in order.

        Returns True: they are ended.

        Raises:
            RetryLater: call again later.
        """
        if self._sink is None and (closed or self._reader.state is None):
            return True  # It has sent nothing that could be open.
        sink = self._open()
        with _bugs_later("delivery.abandoned"):
            if not self._prepared:
                self._prepared = sink.abandoned(self._reader.last_time_ns, closed=closed)
            if self._prepared:
                self._reader.bury(sink.send(timeout_s))
                self._prepared = False
        return True

    def close(self) -> None:
        """Close the sink."""
        sink, self._sink = self._sink, None
        if sink is not None:
            with _guard.shield("delivery.close_sink"):
                sink.close()

    def _open(self) -> Sink:
        if self._sink is None:
            with _bugs_later("delivery.open_sink"), ExitStack() as undo:
                with importing():
                    sink = self._open_sink()
                undo.callback(sink.close)
                if self._reader.state is not None:
                    sink.restore(self._reader.state)
                self._state = sink.state()
                undo.pop_all()
            self._sink = sink
        return self._sink

    def _send(self, sink: Sink, chunk: Chunk, timeout_s: float) -> None:
        left = memory_left()
        if left and left < MEMORY_BYTES + MEMORY_FACTOR * sum(map(len, chunk.records)):
            raise RetryLater("the process is near its limit of memory")
        if not self._prepared:
            try:
                sink.prepare(chunk.records)
            except RetryLater:
                sink.restore(self._state)
                raise
            except Exception as error:  # noqa: BLE001 - found out below
                _guard.report("delivery.prepare", error)
                self._take_apart(sink, chunk, error)
                return
            except BaseException:
                sink.restore(self._state)
                raise
            self._prepared = True
        with _bugs_later("delivery.send"):  # Whatever is raised, the server has refused nothing.
            dead = sink.send(timeout_s)
            state = sink.state()
        self._acknowledge(chunk, state, dead)

    def _take_apart(self, sink: Sink, chunk: Chunk, error: Exception) -> None:
        """Read half as much, until it is one record that the sink cannot map; bury that one."""
        sink.restore(self._state)
        if len(chunk.records) > 1:
            self._most = len(chunk.records) // 2
            self._chunk = None
            return
        reason = _guard.in_words(error)
        if isinstance(error, OF_THE_PROCESS) or not self._fails_alone():
            raise RetryLater(reason) from error
        self._acknowledge(chunk, self._state, [DeadLetter(chunk.records[0], reason)])

    def _fails_alone(self) -> bool:
        """Count one more failure of a record; True if there were enough of them."""
        now = time.monotonic()
        self._failing_since = self._failing_since if self._failures else now
        self._failures += 1
        return self._failures >= MAPPING_TRIES and now - self._failing_since >= MAPPING_S

    def _acknowledge(self, chunk: Chunk, state: bytes, dead: Sequence[DeadLetter]) -> None:
        self._reader.acknowledge(chunk, state, dead)
        self._state = state
        self._most = min(2 * self._most, BATCH_RECORDS)
        self._chunk, self._prepared, self._failures = None, False, 0


@contextmanager
def _bugs_later(where: str) -> Iterator[None]:
    """Report a bug of the sink, and raise what has the step done again."""
    try:
        yield
    except Exception as error:
        check()
        if isinstance(error, RetryLater):
            raise
        _guard.report(where, error)
        raise RetryLater(_guard.in_words(error)) from error
    check()
