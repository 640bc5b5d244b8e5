"""The life of a segment through cuts and deaths: what one process began, another one finishes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qitos_mlflow.delivery import (
    Counts,
    Outcome,
    Paths,
    RetryLater,
    segment_transfer,
)
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.spool.reader import SegmentReader
from qitos_mlflow.delivery.spool.segments import claim, waiting_records
from tests.delivery.spool.test_spool import MEMORY, NOW, append, crash, make_segment, own_reader
from tests.fakes.sink import FakeServer, deliver

BATCH = 4
TORN = st.text("ab1 ", max_size=20).map(str.encode)
CUTS = st.none() | st.integers(0, BATCH)


class Killed(BaseException):
    """The process dies here."""


class Recording:
    """One segment: what went in, and what the server got of it, in several lives."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.server = FakeServer()
        self.recorded: list[bytes] = []
        self.deaths = 0

    def transfer(self, reader: SegmentReader) -> SegmentTransfer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segment_transfer, "BATCH_RECORDS", BATCH)
            return SegmentTransfer(reader, self.server.sink)

    def step(self, transfer: SegmentTransfer, end: int | None, *, dies: bool = False) -> bool:
        """Send a batch; with `dies`, the process does when the server has it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segment_transfer, "BATCH_RECORDS", BATCH)
            if dies:
                patch.setattr(SegmentReader, "acknowledge", kill)
            return transfer.step(1.0, end=end, sealed=True)

    def check(self) -> None:
        """All that was sent is in order; each death had the server get a batch again at most."""
        expected = again = 0
        for number in (int(record.split()[0]) for record in self.server.accepted):
            if number < expected:
                again += 1
                assert expected - number <= BATCH
            else:
                assert number == expected
            expected = number + 1
        assert again <= self.deaths


def kill(*_: object) -> None:
    raise Killed


def has_begun(machine: Lives) -> bool:
    """By name: hypothesis of the oldest version takes seconds to find a lambda's source."""
    return machine.segment.end > 0


def has_left(machine: Lives) -> bool:
    return bool(machine.left)


class Lives(RuleBasedStateMachine):
    """Append, send, be cut off, die, be delivered by others: all arrives in order, and once.

    But for what the server had and the process did not live to acknowledge: a batch at most.
    """

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory(dir=MEMORY)
        self.left: list[Recording] = []
        self.open()

    def open(self) -> None:
        self.segment = make_segment(Path(self.directory.name), part_bytes=400)
        self.reader = own_reader(self.segment)
        self.now = Recording(self.segment.paths)
        self.transfer = self.now.transfer(self.reader)

    @rule(count=st.integers(1, 6), tail=st.binary(max_size=30), keep=st.booleans())
    def append(self, count: int, tail: bytes, keep: bool) -> None:
        done = len(self.now.recorded)
        records = [b"%d " % (done + n) + tail for n in range(count)]
        assert append(self.segment, records, keep=keep) == []
        self.now.recorded += records

    @rule(cut_after=CUTS)
    def send(self, cut_after: int | None) -> None:
        self.now.server.breaks_after = cut_after
        try:
            self.now.step(self.transfer, self.segment.end)
        except RetryLater:
            assert cut_after is not None
        self.now.check()

    @precondition(has_begun)
    @rule(torn=TORN, cut_after=CUTS)
    def die(self, torn: bytes, cut_after: int | None) -> None:
        self.now.server.breaks_after = cut_after
        try:
            self.now.step(self.transfer, self.segment.end, dies=True)
        except (Killed, RetryLater):
            pass
        crash(self.segment)
        with self.segment.paths.parts()[-1][1].open("ab") as file:
            file.write(torn)
        self.now.deaths += 1
        self.left.append(self.now)
        self.open()

    @precondition(has_left)
    @rule(steps=st.none() | st.integers(0, 3))
    def deliver(self, steps: int | None) -> None:
        """By another process, which may die as well."""
        left = self.left.pop()
        left.server.breaks_after = None
        if steps is None:
            assert deliver(left.paths, left.server.sink) is Outcome.FINISHED
            assert left.server.accepted.pop() == b"killed"
            left.check()
            assert list(dict.fromkeys(left.server.accepted)) == left.recorded
            # The state rode with the acknowledgements: it knows of each record once.
            assert left.server.abandoned == [(len(left.recorded), NOW)]
            return
        taken = claim(left.paths, Counts())
        assert taken is not None
        transfer = left.transfer(taken.reader)
        try:
            for step in range(steps + 1):
                left.step(transfer, None, dies=step == steps)
        except Killed:
            left.deaths += 1
        taken.release()
        left.check()
        self.left.append(left)

    @invariant()
    def other_processes_see_the_same(self) -> None:
        if hasattr(self, "segment"):
            acknowledged = int(self.reader.state or 0)
            waiting = list(waiting_records(self.segment.paths))
            assert waiting == self.now.recorded[acknowledged:]

    def teardown(self) -> None:
        if hasattr(self, "segment"):
            self.segment.close(delete=True)
            self.directory.cleanup()


Lives.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
TestLives = Lives.TestCase


RECORDS = 15
STEPS = ("open", "write", "fsync", "replace", "rename", "unlink", "ftruncate")
"""What changes files: between any two of them a process may be killed."""


class Received(list[bytes]):
    """What a server accepted, in a file: it outlives the process that delivers to it."""

    def __init__(self, log: int) -> None:
        super().__init__()
        self._log, self._write = log, os.write  # Ours are not among the steps.

    def append(self, record: bytes) -> None:
        self._write(self._log, record + b"\n")


def die_at(step: int, paths: Paths, log: Path) -> bool:
    """Deliver in a process that is killed before its step number `step`; False when it ends."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return code == 9
    try:
        server, steps = FakeServer(), count(1)
        server.accepted = Received(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))

        def stepping(call: Callable[..., object]) -> Callable[..., object]:
            def act(*args: object, **options: object) -> object:
                if next(steps) == step:
                    os._exit(9)
                return call(*args, **options)

            return act

        for name in STEPS:
            setattr(os, name, stepping(getattr(os, name)))
        finished = deliver(paths, server.sink) is Outcome.FINISHED
        os._exit(0 if finished else 1)
    finally:
        os._exit(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_delivery_may_be_killed_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file it was about to touch, the next one delivers the rest and tidies up."""
    monkeypatch.setattr(segment_transfer, "BATCH_RECORDS", BATCH)
    died, step = True, 0
    while died:
        step += 1
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            spool, log = Path(name, "spool"), Path(name, "log")
            segment = make_segment(spool, part_bytes=500)
            now = Recording(segment.paths)
            now.recorded = [b"%d of many" % n for n in range(RECORDS)]
            for record in now.recorded:
                append(segment, [record])
            crash(segment)
            died = die_at(step, segment.paths, log)
            now.deaths = 1
            before = log.read_bytes().splitlines() if log.exists() else []
            assert deliver(segment.paths, now.server.sink) is Outcome.FINISHED
            everything = before + now.server.accepted
            now.server.accepted = [record for record in everything if record != b"killed"]
            now.check()
            assert list(dict.fromkeys(now.server.accepted)) == now.recorded
            assert everything[-1] == b"killed"
            assert [mapped for mapped, _ in now.server.abandoned] in ([RECORDS], [])
            assert list(spool.iterdir()) == []
    assert step > 3 * RECORDS / BATCH
