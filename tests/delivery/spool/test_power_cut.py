"""A power cut at every moment of a segment's life: what was synced is there, nothing else harms.

Each file-system call is followed by a cut. What may be on the disk then (`PowerCut`) is delivered
as `qitos-mlflow sync` does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qitos_mlflow.delivery import Counts, DeadLetter, Outcome, find_segments, segment_transfer
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.spool.counts import SPOOL_FULL
from qitos_mlflow.delivery.spool.segments import inspect_segment
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.delivery.spool.test_spool import MEMORY, NOW, own_reader
from tests.fakes.files import Moment, PowerCut
from tests.fakes.sink import MIB, deliver, numbered

SEEDS = 6
"""So many ways in which each moment may be left, two of them at each; see `Moment.left`."""
REFUSED = numbered(20)[1]


class Server:
    """Gets records from sinks whose state is all that they have folded, as a run's totals are."""

    def __init__(self, clock: Callable[[], int] = lambda: 0) -> None:
        self.accepted: list[bytes] = []
        self.times: list[int] = []
        """When each was accepted."""
        self.clock = clock
        self.folded: list[bytes] | None = None
        """What the totals of the run are made of, once a sink has ended it."""

    def sink(self, header: bytes = b"") -> FoldingSink:
        assert header in (b"", b'{"to":"x"}')
        return FoldingSink(self)


class FoldingSink:
    """A `Sink` that remembers each record it has folded."""

    patience = 1.0

    def __init__(self, server: Server) -> None:
        self._server = server
        self._folded: list[bytes] = []
        self._new: list[bytes] = []

    def restore(self, state: bytes) -> None:
        self._folded = [record.encode() for record in json.loads(state)]

    def prepare(self, records: Sequence[bytes]) -> None:
        self._new = list(records)
        self._folded += records

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        self._server.folded, self._new = self._folded, []
        return True

    def send(self, timeout_s: float) -> list[DeadLetter]:
        taken = [record for record in self._new if record != REFUSED]
        self._server.accepted += taken
        self._server.times += [self._server.clock()] * len(taken)
        return [DeadLetter(record, "refused") for record in self._new if record == REFUSED]

    def state(self) -> bytes:
        return json.dumps([record.decode() for record in self._folded]).encode()

    def close(self) -> None:
        pass


class Life:
    """A segment's life. Times are numbers of calls of the file system."""

    def __init__(self, cut: PowerCut) -> None:
        self.cut = cut
        self.server = Server(self.now)
        self.appended: list[bytes] = []
        self.times: list[int] = []
        """When each was appended."""

    def now(self) -> int:
        return len(self.cut.moments)

    def moments(self) -> Iterator[tuple[Moment, list[bytes], list[bytes]]]:
        """Each moment, with what had been appended and accepted by then."""
        for number, moment in enumerate(self.cut.moments):
            appended = zip(self.appended, self.times, strict=True)
            accepted = zip(self.server.accepted, self.server.times, strict=True)
            yield (
                moment,
                [record for record, time in appended if time <= number + 1],
                [record for record, time in accepted if time <= number],
            )


def live(root: Path, cut: PowerCut, *, fsync: bool, dies: bool) -> Life:
    """Append and deliver through several parts; end in order, or as a dead process whose
    segment another one delivers."""
    life, stats = Life(cut), Counts()
    segment = SegmentWriter(
        root / "state" / "spool",
        b'{"to":"x"}',
        offline=False,
        cap_bytes=MIB,
        memory_bytes=MIB,
        fsync=fsync,
    )
    segment.part_bytes = 700
    transfer = SegmentTransfer(own_reader(segment), life.server.sink)
    for number, record in enumerate(numbered(20)):
        assert segment.append([(record, False)], NOW) == []
        life.appended.append(record)
        life.times.append(life.now())
        if number % 3 == 2 and number < 16:
            transfer.step(1.0, end=segment.end, sealed=True)
        if number in (5, 10):
            stats.drop(SPOOL_FULL)
            stats.save_losses(segment.paths)
    if not dies:
        while transfer.step(1.0, end=segment.end, sealed=True):
            pass
    segment.close(delete=not dies)
    for paths in find_segments(segment.paths.directory):
        if paths.parts():
            assert deliver(paths, life.server.sink) is Outcome.FINISHED
    return life


@pytest.mark.parametrize("dies", [False, True], ids=["ends in order", "dies"])
@pytest.mark.parametrize("fsync", [False, True], ids=["unsynced", "synced"])
def test_a_power_cut_at_any_moment(
    fsync: bool, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fsync every record is there. Without, what was not on the disk is lost, and no more."""
    monkeypatch.setattr(segment_transfer, "BATCH_RECORDS", 4)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        root = Path(name, "before")
        root.mkdir()
        with monkeypatch.context() as patch:
            life = live(root, PowerCut(root, patch), fsync=fsync, dies=dies)
        assert life.server.accepted == [r for r in life.appended if r != REFUSED]
        kinds = life.cut.counts
        assert {"open", "write", "replace", "unlink", "mkdir", "fsync"} <= kinds.keys()
        assert kinds["fsync"] > 20 or not fsync
        for number, (moment, appended, accepted) in enumerate(life.moments()):
            for seed in (number % SEEDS, (number + 3) % SEEDS):
                with tempfile.TemporaryDirectory(dir=MEMORY) as left:
                    moment.left(Path(left), root, seed)
                    try:
                        check(Path(left, "state", "spool"), life, appended, accepted, fsync)
                    except BaseException as error:
                        error.args = (f"moment {number}, seed {seed}: {error}",)
                        raise


def check(
    spool: Path, life: Life, appended: list[bytes], accepted: list[bytes], fsync: bool
) -> None:
    """Deliver what is left and compare."""
    server, stats = Server(), Counts()
    segments = find_segments(spool) if spool.is_dir() else []
    whole = [record for record in life.appended if any(record in part for part in parts(spool))]
    for paths in segments:
        losses = inspect_segment(paths).losses
        assert losses in ({}, {SPOOL_FULL: 1}, {SPOOL_FULL: 2})
        assert deliver(paths, server.sink, stats=stats) is Outcome.FINISHED
    assert {path.suffix for path in spool.glob("*")} <= {".dead", ".lost", ".tmp"}
    assert server.accepted == sorted(set(server.accepted), key=life.appended.index)
    dead = dead_letters(spool)
    reached = {*accepted, *server.accepted, *dead}
    assert {*whole} <= reached
    if fsync:
        assert {*appended} <= reached
    if server.folded is not None:
        assert len(server.folded) == len(set(server.folded))
        if fsync:
            assert {*appended} <= {*server.folded}


def parts(spool: Path) -> list[bytes]:
    """The content of all parts."""
    return [path.read_bytes() for path in spool.glob("*.seg")]


def dead_letters(spool: Path) -> set[bytes]:
    """The records in the dead letters, as far as these can be read."""
    found = set()
    for path in spool.glob("*.dead"):
        for line in path.read_bytes().splitlines():
            try:
                found.add(json.loads(line)["record"].encode())
            except (ValueError, KeyError):
                continue
    return found
