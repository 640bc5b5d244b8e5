"""What dead processes left is sent by those that live and deliver, between their own batches."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qitos_mlflow.delivery import (
    Delivery,
    Paths,
    Pipeline,
    RetryLater,
    Sink,
    find_segments,
    inspect_segment,
    leftovers,
    segment_transfer,
    sending_thread,
    waiting_records,
)
from tests.fakes.sink import MIB, FakeServer, FakeSink, left_behind, make_pipeline, numbered
from tests.waiting import eventually

LONG_S = 60.0

Make = Callable[..., Pipeline]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at once and all the time; these tests are not about how often."""
    monkeypatch.setattr(leftovers, "FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(leftovers, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(leftovers, "BATCH_PAUSE_S", 0.0)


@pytest.fixture
def server() -> FakeServer:
    """Where everything goes."""
    return FakeServer()


@pytest.fixture
def make(tmp_path: Path, server: FakeServer) -> Iterator[Make]:
    """A pipeline that opens leftovers as given; closed after the test."""
    pipelines = []

    def make(open_leftovers: object, **changes: object) -> Pipeline:
        pipelines.append(make_pipeline(tmp_path, server, open_leftovers=open_leftovers, **changes))
        return pipelines[-1]

    yield make
    for pipeline in pipelines:
        pipeline.close(LONG_S)


def waiting(paths: Paths) -> int:
    """How many records of a segment are not delivered."""
    return inspect_segment(paths).waiting


def test_a_living_process_finishes_a_dead_ones_segment(
    tmp_path: Path, server: FakeServer, make: Make
) -> None:
    """Its records arrive in order, its open traces are ended, its files are gone."""
    paths = left_behind(tmp_path, numbered(3))
    pipeline = make(lambda header: lambda: server.sink(header))
    pipeline.offer(b"own", urgent=True)
    eventually(lambda: paths not in find_segments(tmp_path))
    assert server.accepted == [b"own", *numbered(3), b"killed"]
    assert [mapped for mapped, _ in server.abandoned] == [3]


def test_only_what_may_be_sent_is_sent(
    tmp_path: Path, server: FakeServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other headers, other hosts, those who work offline and those who live are left alone."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another host")
        left = [left_behind(tmp_path, [b"another host's"])]
    left.append(left_behind(tmp_path, [b"elsewhere"], header=b'{"to": "elsewhere"}'))
    left.append(left_behind(tmp_path, [b"offline"], offline=True))
    alive = make_pipeline(tmp_path, None)
    alive.offer(b"alive")
    assert not alive.flush(LONG_S)
    sent = left_behind(tmp_path, numbered(3))
    asked: list[bytes] = []

    def open_leftovers(header: bytes) -> Callable[[], Sink] | None:
        asked.append(header)
        return server.sink if header == b"{}" else None

    make(open_leftovers).offer(b"own", urgent=True)
    eventually(lambda: b"killed" in server.accepted)
    eventually(lambda: asked.count(b'{"to": "elsewhere"}') >= 2)
    assert set(asked) == {b"{}", b'{"to": "elsewhere"}'}
    assert server.accepted == [b"own", *numbered(3), b"killed"]
    assert [waiting(paths) for paths in (*left, alive.paths)] == [1, 1, 1, 1]
    assert sent not in find_segments(tmp_path)
    alive.close(LONG_S)


def test_own_records_wait_for_one_batch_at_most(
    tmp_path: Path, server: FakeServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much a dead process left, own records and leftovers take turns."""
    monkeypatch.setattr(segment_transfer, "BATCH_RECORDS", 2)
    monkeypatch.setattr(sending_thread, "SEND_EVERY_S", 0.0)
    left_behind(tmp_path, [b"left"] * 20)

    def receive(record: bytes) -> None:
        # A record is always on its way while leftovers are sent, so own ones are always due.
        if record == b"left":
            pipeline.offer(b"own", urgent=True)
            eventually(lambda: pipeline.unsaved == 0)

    server.refuses = lambda record: receive(record)
    pipeline = make(lambda header: server.sink)
    pipeline.offer(b"own", urgent=True)
    eventually(lambda: server.accepted.count(b"left") == 20)
    text = b" ".join(server.accepted)
    assert b" ".join([b"left"] * 3) not in text
    assert pipeline.flush(LONG_S)
    assert server.accepted.count(b"own") == 21


def test_leftovers_are_given_little_time_at_once(
    tmp_path: Path, server: FakeServer, make: Make
) -> None:
    """A slow request for a dead process keeps a start, a flush or the exit waiting that long."""
    left_behind(tmp_path, [b"left"])
    pipeline = make(lambda header: server.sink)
    pipeline.offer(b"own")
    eventually(lambda: b"left" in server.accepted)
    assert server.timeouts[b"left"] == leftovers.Leftovers.timeout_s < server.timeouts[b"own"]


def test_a_busy_process_sends_leftovers_too(tmp_path: Path, server: FakeServer, make: Make) -> None:
    """A process that always has records of its own to send still finishes what others left."""
    left_behind(tmp_path, numbered(3))

    def receive(record: bytes) -> None:
        if record == b"own":  # Each brings the next: there is always one on its way.
            pipeline.offer(b"own", urgent=True)
            eventually(lambda: pipeline.unsaved == 0 or b"killed" in server.accepted)

    server.refuses = lambda record: receive(record)
    pipeline = make(lambda header: server.sink)
    pipeline.offer(b"own", urgent=True)
    eventually(lambda: b"killed" in server.accepted)
    server.refuses = lambda record: None


def test_leftovers_hold_up_neither_the_disk_nor_the_end(tmp_path: Path, server: FakeServer) -> None:
    """While a sink for leftovers hangs, records reach the disk and close keeps its deadline."""
    paths = left_behind(tmp_path, numbered(3))
    hanging, go_on = threading.Event(), threading.Event()

    def hang() -> Sink:
        hanging.set()
        go_on.wait(LONG_S)
        raise RetryLater("stopped")

    pipeline = make_pipeline(tmp_path, server, open_leftovers=lambda header: hang)
    pipeline.offer(b"one")
    assert hanging.wait(LONG_S)
    pipeline.offer(b"two")
    assert not pipeline.flush(0.1)
    assert list(waiting_records(pipeline.paths)) == [b"two"]
    assert not pipeline.close(0.1)
    assert server.accepted == [b"one"]
    go_on.set()
    eventually(lambda: not inspect_segment(paths).delivering)
    assert waiting(paths) == 3
    eventually(lambda: not inspect_segment(pipeline.paths).owner_alive)
    assert waiting(pipeline.paths) == 1


def test_no_leftovers_while_the_server_is_away(
    tmp_path: Path, server: FakeServer, make: Make
) -> None:
    """A process that cannot deliver its own records does not try with others'."""
    left_behind(tmp_path, numbered(3))
    server.down = RetryLater("503")
    asked = threading.Event()
    pipeline = make(lambda header: asked.set())
    pipeline.offer(b"one")
    assert not pipeline.flush(0.3)
    assert not asked.is_set()
    server.down = None
    assert asked.wait(LONG_S)


def test_a_leftover_that_fails_is_tried_again(
    tmp_path: Path,
    server: FakeServer,
    make: Make,
    swallowed: list[tuple[str, BaseException]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It makes room for the next one after a while, and is not given up."""
    monkeypatch.setattr(leftovers, "MAKE_ROOM_AFTER_S", 0.0)
    left_behind(tmp_path, [b"fails"], header=b"fails")
    left_behind(tmp_path, [b"next"], header=b"next")
    failing = True

    def open_sink(header: bytes) -> FakeSink:
        if failing and header == b"fails":
            raise ValueError("a bug")
        return server.sink(header)

    make(lambda header: lambda: open_sink(header)).offer(b"own", urgent=True)
    eventually(lambda: b"next" in server.accepted)
    assert b"fails" not in server.accepted
    failing = False
    eventually(lambda: b"fails" in server.accepted)
    assert {where for where, _ in swallowed} == {"delivery.open_sink"}
    swallowed.clear()


def test_a_leftover_that_cannot_be_closed_stops_nothing(
    tmp_path: Path, server: FakeServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is sent, and the process's own records."""
    close = Delivery.close

    def close_badly(delivery: Delivery) -> None:
        close(delivery)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Delivery, "close", close_badly)
    for _ in range(2):
        left_behind(tmp_path, numbered(3))
    pipeline = make(lambda header: server.sink)
    pipeline.offer(b"own", urgent=True)
    eventually(lambda: server.accepted.count(b"killed") == 2)
    pipeline.offer(b"later")
    assert pipeline.flush(LONG_S)


def test_a_batch_of_leftovers_goes_on_where_it_stopped(
    tmp_path: Path, server: FakeServer, make: Make
) -> None:
    """A server that takes a few records at a time gets each of them once."""
    pipeline = make(lambda header: server.sink)
    pipeline.offer(b"own", urgent=True)
    assert pipeline.flush(LONG_S)
    server.breaks_after = 4
    left_behind(tmp_path, numbered(9), part_bytes=MIB)
    eventually(lambda: server.breaks_after == 0)
    server.breaks_after = None
    eventually(lambda: b"killed" in server.accepted)
    assert server.accepted == [b"own", *numbered(9), b"killed"]


def test_no_rest_before_leftovers_are_sent(
    tmp_path: Path, server: FakeServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with nothing else to do finishes what it found before it rests."""
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.REST_S", 0.001)
    monkeypatch.setattr(leftovers, "LOOK_EVERY_S", LONG_S)
    for _ in range(3):
        left_behind(tmp_path, numbered(3))
    pipeline = make(lambda header: server.sink)
    pipeline.offer(b"own", urgent=True)
    eventually(lambda: not pipeline._awake.locked())
    assert server.accepted == [b"own", *[*numbered(3), b"killed"] * 3]
    assert list(tmp_path.iterdir()) == []
