"""Segments of format 1 are delivered, in the middle of a trace as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qitos_mlflow.delivery import (
    Outcome,
    Paths,
    find_segments,
    inspect_segment,
    purge,
    waiting_records,
)
from tests.fakes.sink import FakeServer, FakeSink, deliver

DATA = Path(__file__).parents[2] / "data" / "spool_v1"


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """A copy of a spool of format 1; `tests/data/README.md` says what is in it."""
    for path in DATA.iterdir():
        if path.suffix != ".json":
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def segments(spool: Path) -> list[Paths]:
    """The one recorded offline, and the one whose process was killed in mid-trace."""
    return find_segments(spool)


class Restored(FakeSink):
    """A sink that keeps the state it was given, whatever that is."""

    def restore(self, state: bytes) -> None:
        self.server.accepted.append(b"state " + state)


def test_it_can_be_inspected(segments: list[Paths]) -> None:
    """`status` shows such segments like any other."""
    first, second = map(inspect_segment, segments)
    assert (first.head.machine, first.head.pid, first.head.offline) == ("example-host", 1001, True)
    assert (second.head.machine, second.head.pid, second.head.offline) == (
        "example-host",
        1002,
        False,
    )
    for info in (first, second):
        assert info.head.caller is not None
        assert json.loads(info.head.caller)["experiment_name"] == "qitos-runs"
        assert info.waiting > 0
        assert info.head.started_ns < info.last_time_ns
        assert (info.dead_letters, info.owner_alive, info.delivering) == ({}, False, False)


def test_it_is_delivered_to_its_end(spool: Path, segments: list[Paths]) -> None:
    """All records in order, from the acknowledgement on with the state there; files deleted."""
    for paths in segments:
        server, records = FakeServer(), list(waiting_records(paths))
        acknowledged = paths.ack.exists()
        outcome = deliver(paths, lambda header, server=server: Restored(server))
        assert outcome is Outcome.FINISHED
        state = [server.accepted.pop(0)] if acknowledged else []
        assert server.accepted == [*records, b"killed"]
        assert all(json.loads(each.removeprefix(b"state "))["traces"] for each in state)
    assert list(spool.iterdir()) == []


def test_it_can_be_purged(spool: Path, segments: list[Paths]) -> None:
    """`spool purge` deletes such segments like any other."""
    assert all(map(purge, segments))
    assert list(spool.iterdir()) == []
