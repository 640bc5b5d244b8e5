"""One flipped bit, in any byte of any file: one record at most is lost, and counted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qitos_mlflow.delivery import Counts, Outcome, find_segments, segment_transfer
from qitos_mlflow.delivery.segment_transfer import SegmentTransfer
from qitos_mlflow.delivery.spool import locks
from qitos_mlflow.delivery.spool.counts import SPOOL_FULL
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter, bury
from qitos_mlflow.delivery.spool.locks import is_held
from qitos_mlflow.delivery.spool.paths import Paths, Quota
from qitos_mlflow.delivery.spool.reader import SegmentReader
from qitos_mlflow.delivery.spool.segments import inspect_segment
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.delivery.spool.test_power_cut import Server, dead_letters
from tests.delivery.spool.test_spool import MEMORY, NOW
from tests.fakes.sink import MIB, deliver

RECORDS = [b'{"n":%d}' % n for n in range(8)]


def flipped(path: Path, at: int) -> None:
    """Flip a bit of one byte; another one in each byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(bytes(content))


def a_segment(spool: Path, delivered: int) -> set[bytes]:
    """What a process leaves that has died after sending so many of `RECORDS`; returns those."""
    stats, server = Counts(), Server()
    stats.drop(SPOOL_FULL, 5)
    segment = SegmentWriter(spool, b'{"to":"x"}', offline=False, cap_bytes=MIB, memory_bytes=0)
    segment.part_bytes = 450
    for record in RECORDS:
        assert segment.append([(record, False)], NOW) == []
    assert len(segment.parts()) > 1
    reader = SegmentReader(segment.paths, segment.parts, stats)
    transfer = SegmentTransfer(reader, server.sink)
    while len(server.accepted) < delivered:
        transfer.step(1.0, end=segment.end, sealed=True)
    stats.save_losses(segment.paths)
    segment.close(delete=False)
    return set(server.accepted)


@pytest.mark.parametrize(("first", "delivered"), enumerate([0, 2, 6]))
def test_one_flipped_bit(first: int, delivered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest arrives as it was recorded, with the totals of all, without a person's help.

    Each case takes every third byte, from `first` on.
    """
    monkeypatch.setattr(segment_transfer, "BATCH_RECORDS", 2)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        whole = Path(name, "whole")
        before = a_segment(whole, delivered)
        suffixes = set()
        for path in whole.iterdir():
            for at in range(first, path.stat().st_size, 3):
                suffixes.add(path.suffix)
                spool = Path(name, "spool")
                shutil.copytree(whole, spool)
                flipped(spool / path.name, at)
                check(spool, before, f"byte {at} of {path.name}", path.suffix)
                shutil.rmtree(spool)
        assert suffixes == {".seg", ".lost"} | ({".ack"} if delivered else set())


def check(spool: Path, before: set[bytes], where: str, suffix: str) -> None:
    """Deliver what there is, and compare."""
    server, stats = Server(), Counts()
    [paths] = find_segments(spool)
    losses = inspect_segment(paths).losses
    assert losses.keys(), where
    assert deliver(paths, server.sink, stats=stats) is Outcome.FINISHED, where
    accepted = server.accepted
    assert set(accepted) <= set(RECORDS), where
    assert accepted == sorted(set(accepted)), where
    missing = set(RECORDS) - before - set(accepted)
    assert len(missing) <= (suffix == ".seg"), where
    assert stats.dead_letters >= len(missing), where
    assert inspect_segment(paths).dead_letters.keys() or not missing, where
    assert server.folded is not None
    assert [r for r in RECORDS if r not in missing] == server.folded, where


def test_a_flipped_bit_of_a_dead_letter(tmp_path: Path) -> None:
    """It costs the reason of that one, and none of the others."""
    paths = Paths(tmp_path, "host-1-abc-ff")
    quota = Quota(tmp_path, MIB, aside=True)
    bury([DeadLetter(b"record %d" % n, "refused") for n in range(3)], paths.dead, quota, Counts())
    whole = paths.dead.read_bytes()
    for at in range(len(whole)):
        flipped(paths.dead, at)
        found = inspect_segment(paths).dead_letters
        assert found.get("refused", 0) >= 1, at
        assert sum(found.values()) >= 2, at
        assert len(dead_letters(tmp_path)) >= 1, at
        paths.dead.write_bytes(whole)


def test_a_flipped_bit_of_a_lock_that_names_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a dead process on a file system without locks is free, except if the damage is
    in its machine's name: then it is free when it is old."""

    def unsupported(descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_kernel_lock", unsupported)
    monkeypatch.setattr(locks, "SETTLE_S", 0.0)
    path = tmp_path / "x.own"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = locks._identity(process.pid)
        process.communicate(b"\n")
    whole = json.dumps({**holder, "token": "0123456789abcdef"}).encode()
    for at in range(len(whole)):
        path.write_bytes(whole)
        flipped(path, at)
        if is_held(path):
            assert json.loads(path.read_bytes())["host"] != holder["host"]
        os.utime(path, (0, 0))
        assert not is_held(path), at
