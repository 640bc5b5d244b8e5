"""A record is given up if the sink fails on it alone, again and again; all else is tried again."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qitos_mlflow.delivery import RetryLater, segment_transfer
from qitos_mlflow.delivery.segment_transfer import BATCH_RECORDS, MAPPING_TRIES, SegmentTransfer
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.segments import claim
from tests.fakes.sink import MIB, FakeServer, FakeSink, left_behind, numbered

Swallowed = list[tuple[str, BaseException]]

RECORDS = numbered(BATCH_RECORDS)
BAD = RECORDS[300]
LONG = 10_000
"""More failures than there are to be."""


class BuggySink(FakeSink):
    """Fails on `BAD` with `error`, or on whatever it gets."""

    error: Exception | None = None
    everything = False

    def __init__(self, server: FakeServer) -> None:
        super().__init__(server)
        self.batches: list[int] = []

    def prepare(self, records: Sequence[bytes]) -> None:
        self.batches.append(len(records))
        super().prepare(records)
        if self.error is not None and (self.everything or BAD in records):
            raise self.error


class Delivery:
    """The records of a dead process on their way to a `BuggySink`."""

    def __init__(self, spool: Path) -> None:
        self.server, self.counts = FakeServer(), Counts()
        self.sink = BuggySink(self.server)
        claimed = claim(left_behind(spool, RECORDS, part_bytes=MIB), self.counts)
        assert claimed is not None
        self._claim = claimed
        self._transfer = SegmentTransfer(claimed.reader, lambda: self.sink)

    def failures(self, most: int) -> list[str]:
        """Why steps fail, until everything is delivered or `most` of them have failed."""
        found: list[str] = []
        while len(found) < most:
            try:
                if not self._transfer.step(9.0, end=None, sealed=True):
                    break
            except RetryLater as later:
                found.append(later.reason)
        return found

    def close(self) -> None:
        """Give the segment up."""
        self._transfer.close()
        self._claim.release()


@pytest.fixture
def delivery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Delivery]:
    monkeypatch.setattr(segment_transfer, "MAPPING_S", 0.0)
    delivery = Delivery(tmp_path)
    yield delivery
    delivery.close()


def test_a_record_that_cannot_be_mapped_is_found_among_many(
    delivery: Delivery, swallowed: Swallowed
) -> None:
    """All others arrive, in few batches; it is tried alone several times and then kept aside."""
    delivery.sink.error = ZeroDivisionError("a bug")
    assert delivery.failures(LONG) == ["ZeroDivisionError: a bug"] * (MAPPING_TRIES - 1)
    assert delivery.server.accepted == [record for record in RECORDS if record != BAD]
    assert delivery.counts.dead_letters == 1
    assert len(delivery.sink.batches) < 50
    swallowed.clear()


def test_it_takes_time_to_give_a_record_up(
    delivery: Delivery, swallowed: Swallowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps the process from mapping may pass, however often it is tried meanwhile."""
    monkeypatch.setattr(segment_transfer, "MAPPING_S", 10_000.0)
    delivery.sink.error = KeyError("half imported")
    assert len(delivery.failures(20)) == 20
    assert delivery.counts.dead_letters == 0
    delivery.sink.error = None
    assert delivery.failures(LONG) == []
    assert delivery.server.accepted == RECORDS
    swallowed.clear()


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "x"), OSError(errno.ENOSPC, "x")]
)
def test_what_is_about_the_process_gives_nothing_up(
    delivery: Delivery, swallowed: Swallowed, error: Exception, everything: bool
) -> None:
    """Memory, descriptors and space come back; until then each record waits."""
    delivery.sink.error, delivery.sink.everything = error, everything
    assert len(delivery.failures(20)) == 20
    assert delivery.counts.dead_letters == 0
    delivery.sink.error = None
    assert delivery.failures(LONG) == []
    assert delivery.server.accepted == RECORDS
    swallowed.clear()


def test_no_record_is_given_up_while_memory_is_short(
    delivery: Delivery, swallowed: Swallowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory to spare, any exception may come of that."""
    left = 1
    monkeypatch.setattr(segment_transfer, "memory_left", lambda: left)
    delivery.sink.error = ValueError("of a library that has no memory")
    assert set(delivery.failures(20)) == {"the process is near its limit of memory"}
    assert delivery.counts.dead_letters == 0
    left = 2**40
    assert delivery.failures(LONG) == ["ValueError: of a library that has no memory"] * 2
    assert delivery.counts.dead_letters == 1
    swallowed.clear()
