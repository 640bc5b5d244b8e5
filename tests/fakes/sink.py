"""A server in this process, and sinks that deliver to it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from qitos_mlflow.delivery import (
    Counts,
    DeadLetter,
    Delivery,
    Outcome,
    Paths,
    Pipeline,
    RetryLater,
    Sink,
    take,
)
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.fakes.mlflow_rest import MlflowRest

MIB = 1024 * 1024
NOW = 1_800_000_000_000_000_000


class FakeServer:
    """What sinks deliver to. It is down, refuses or hangs when the test says so."""

    def __init__(self) -> None:
        self.accepted: list[bytes] = []
        self.down: Exception | None = None
        self.refuses: Callable[[bytes], str | None] = lambda record: None
        self.breaks_after: int | None = None
        self.attempts = 0
        self.timeouts: dict[bytes, float] = {}  # Given to the batch that began with this record.
        self.attempted = threading.Event()
        self.answers = threading.Event()  # Cleared: every request hangs.
        self.answers.set()
        self.abandoned: list[tuple[int, int]] = []
        self.opened: list[bytes] = []
        self.left_open: bytes | None = None  # What ends it, when its process closes in order.

    def receive(self, record: bytes) -> str | None:
        """Accept one record; a text is the reason it is refused for."""
        if self.down is not None:
            raise self.down
        if self.breaks_after is not None:
            if self.breaks_after == 0:
                raise RetryLater("connection cut")
            self.breaks_after -= 1
        reason = self.refuses(record)
        if reason is None:
            self.accepted.append(record)
        return reason

    def sink(self, header: bytes = b"") -> FakeSink:
        """A sink for one segment; its state is the number of records it has mapped."""
        self.opened.append(header)
        return FakeSink(self)


class FakeSink:
    """A `Sink` whose state is how many records it has mapped. It sends record by record."""

    patience = 1.0

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.mapped = 0
        self._left: list[bytes] = []
        self._dead: list[DeadLetter] = []
        self.closed = False

    def restore(self, state: bytes) -> None:
        self.mapped = int(state)

    def prepare(self, records: Sequence[bytes]) -> None:
        self.mapped += len(records)
        self._left, self._dead = list(records), []

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        if not closed:
            self.server.abandoned.append((self.mapped, last_time_ns))
        ending = self.server.left_open if closed else b"killed"
        self._left, self._dead = [] if ending is None else [ending], []
        return ending is not None

    def send(self, timeout_s: float) -> list[DeadLetter]:
        assert timeout_s > 0
        self.server.attempts += 1
        self.server.timeouts.update(dict.fromkeys(self._left[:1], timeout_s))
        self.server.attempted.set()
        if not self.server.answers.wait(timeout_s):
            raise RetryLater("timed out")
        while self._left:
            reason = self.server.receive(self._left[0])
            if reason is not None:
                self._dead.append(DeadLetter(self._left[0], reason))
            del self._left[0]
        return self._dead

    def state(self) -> bytes:
        return b"%d" % self.mapped

    def close(self) -> None:
        self.closed = True


class Losses:
    """Collects what a pipeline says it lost."""

    def __init__(self) -> None:
        self.records: list[tuple[bytes, str]] = []

    def __call__(self, record: bytes, reason: str) -> None:
        self.records.append((record, reason))

    def by_reason(self) -> dict[str, int]:
        return dict(Counter(reason for _, reason in self.records))


METHODS = ("normalize", "lost", "open_sink", "open_leftovers", "may_rest")


class FakePipeline(Pipeline):
    """A pipeline with some methods given as functions."""

    def __init__(self, header: bytes, methods: dict[str, Any], **options: Any) -> None:
        self.__dict__.update(methods)
        super().__init__(header, **options)


def make_pipeline(
    directory: Path,
    server: FakeServer | MlflowRest | None,
    *,
    header: bytes = b'{"to": "somewhere"}',
    queue_bytes: int = 64 * MIB,
    spool_bytes: int = 1024 * MIB,
    fsync: bool = False,
    **methods: Any,
) -> Pipeline:
    """A pipeline into `directory` and to `server`; offline without one."""
    if server is not None:
        methods = {"open_sink": server.sink, **methods}
    assert methods.keys() <= set(METHODS)
    return FakePipeline(
        header,
        methods,
        directory=directory,
        queue_bytes=queue_bytes,
        spool_bytes=spool_bytes,
        offline=server is None,
        fsync=fsync,
    )


def numbered(count: int, start: int = 0) -> list[bytes]:
    """Records with a number each, in the form of ours."""
    return [b'{"kind":"span","n":%d}' % n for n in range(start, start + count)]


def left_behind(
    directory: Path,
    records: list[bytes],
    header: bytes = b"{}",
    part_bytes: int = 500,
    *,
    offline: bool = False,
) -> Paths:
    """A segment as a killed process leaves it."""
    segment = SegmentWriter(
        directory, header, offline=offline, cap_bytes=1024 * MIB, memory_bytes=0
    )
    segment.part_bytes = part_bytes
    for record in records:
        segment.append([(record, False)], NOW)
    segment.close(delete=False)
    return segment.paths


def deliver(
    paths: Paths,
    open_sink: Callable[[bytes], Sink],
    *,
    stats: Counts | None = None,
    default_header: bytes | None = None,
    stop: Callable[[Delivery], bool] = lambda delivery: False,
) -> Outcome | None:
    """Deliver a segment as `sync` does; None if `stop`, which is asked after each step, ends it."""
    taken = take(paths, open_sink, stats or Counts(), default_header)
    if isinstance(taken, Outcome):
        return taken
    with closing(taken):
        while (outcome := taken.step()) is None and not stop(taken):
            time.sleep(taken.circuit.delay_s)
    return outcome
