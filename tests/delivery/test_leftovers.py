"""Delivering what other processes left, beside them and beside each other."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from qitos_mlflow.delivery import (
    Counts,
    Outcome,
    Paths,
    RetryLater,
    find_segments,
    follow,
    inspect_segment,
    leftovers,
    purge,
)
from qitos_mlflow.delivery.spool.locks import FileLock
from qitos_mlflow.delivery.spool.parts import DiskPart
from tests.fakes.sink import (
    MIB,
    NOW,
    FakeServer,
    FakeSink,
    deliver,
    left_behind,
    make_pipeline,
    numbered,
)
from tests.waiting import eventually

LONG_S = 60.0


def test_a_dead_process_is_delivered_to_its_end(tmp_path: Path) -> None:
    """All records arrive in order, its open traces are ended once, its files are gone."""
    server, stats = FakeServer(), Counts()
    paths = left_behind(tmp_path, numbered(40), header=b"the destination")
    info = inspect_segment(paths)
    assert (info.waiting, info.owner_alive, info.head.caller) == (40, False, b"the destination")
    assert info.last_time_ns == NOW
    assert deliver(paths, server.sink, stats=stats) is Outcome.FINISHED
    assert server.accepted == [*numbered(40), b"killed"]
    assert server.abandoned == [(40, NOW)]
    assert server.opened == [b"the destination"]
    assert stats.delivered == 40
    assert list(tmp_path.iterdir()) == []
    assert deliver(paths, server.sink) is Outcome.FINISHED


def test_a_delivery_goes_on_where_another_stopped(tmp_path: Path) -> None:
    """Stopped halfway, the next one sends the rest, with the sink's state as it was."""
    server = FakeServer()
    paths = left_behind(tmp_path, numbered(1200), part_bytes=MIB)
    server.breaks_after = 700
    assert deliver(paths, server.sink, stop=lambda _: server.breaks_after == 0) is None
    assert server.accepted == numbered(700)
    acknowledged = 1200 - inspect_segment(paths).waiting
    assert 0 < acknowledged <= 700
    server.breaks_after = None
    assert deliver(paths, server.sink) is Outcome.FINISHED
    assert server.accepted == [*numbered(700), *numbered(1200)[acknowledged:], b"killed"]
    assert server.abandoned == [(1200, NOW)]


def test_a_server_that_is_away_leaves_everything(tmp_path: Path) -> None:
    """Nothing is deleted before it is delivered, the ending of open traces included."""
    server = FakeServer()
    paths = left_behind(tmp_path, numbered(3))
    server.breaks_after = 3  # All records get through, the ending does not.
    assert deliver(paths, server.sink, stop=lambda it: it.circuit.problem is not None) is None
    assert inspect_segment(paths).waiting == 0
    server.breaks_after = None
    assert deliver(paths, server.sink) is Outcome.FINISHED
    assert server.accepted == [*numbered(3), b"killed"]


def test_a_living_process_delivers_for_itself(tmp_path: Path) -> None:
    """No other process delivers or deletes the segment of one that is online and alive."""
    own, other = FakeServer(), FakeServer()
    own.down = RetryLater("503")
    pipeline = make_pipeline(tmp_path, own)
    pipeline.offer(b"one")
    assert not pipeline.flush(0.1)
    [paths] = find_segments(tmp_path)
    info = inspect_segment(paths)
    assert (info.owner_alive, info.delivering, info.head.offline, info.waiting) == (
        True,
        True,
        False,
        1,
    )
    assert deliver(paths, other.sink) is Outcome.BUSY
    assert not purge(paths)
    own.down = None
    assert pipeline.close(LONG_S)
    assert (own.accepted, other.accepted) == ([b"one"], [])


def test_two_at_once_do_no_harm(tmp_path: Path) -> None:
    """Of several deliveries of one segment only one sends at any time."""
    server = FakeServer()
    paths = left_behind(tmp_path, numbered(10))
    lock = FileLock(paths.ship)
    assert lock.acquire()
    assert deliver(paths, server.sink) is Outcome.BUSY
    assert not purge(paths)
    lock.release()
    outcomes: list[Outcome | None] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(deliver(paths, server.sink)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.accepted == [*numbered(10), b"killed"]
    assert Outcome.FINISHED in outcomes
    assert list(tmp_path.iterdir()) == []


def test_an_offline_process_is_delivered_while_it_lives(tmp_path: Path) -> None:
    """A sync delivers what there is so far, and a later one the rest and the end."""
    server = FakeServer()
    pipeline = make_pipeline(tmp_path, None)
    pipeline.offer(b"one")
    assert not pipeline.flush(LONG_S)
    [paths] = find_segments(tmp_path)
    assert inspect_segment(paths).head.offline
    assert deliver(paths, server.sink) is Outcome.UP_TO_DATE
    assert pipeline.flush(LONG_S)
    pipeline.offer(b"two")
    assert not pipeline.close(LONG_S)
    assert deliver(paths, server.sink) is Outcome.FINISHED
    assert server.accepted == [b"one", b"two", b"killed"]


@contextmanager
def following(
    spool: Path, open_sink: Callable[[bytes], FakeSink], stats: Counts | None = None
) -> Iterator[None]:
    """A sidecar is at work on another thread."""
    stop = threading.Event()
    steps = follow(spool, lambda paths: open_sink, stats or Counts())
    thread = threading.Thread(target=lambda: any(stop.wait(pause_s) for pause_s in steps))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LONG_S)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars look at the directory all the time."""
    monkeypatch.setattr(leftovers, "FOLLOW_EVERY_S", 0.01)


@pytest.mark.usefixtures("at_once")
def test_a_sidecar_follows_offline_processes(tmp_path: Path) -> None:
    """Records of processes that come and go arrive while they live; each is ended once."""
    server, spool = FakeServer(), tmp_path / "spool"
    with following(spool, server.sink):
        for name in (b"a", b"b"):
            pipeline = make_pipeline(spool, None)
            pipeline.offer(name)
            eventually(partial(pipeline.flush, LONG_S))
            assert server.accepted[-1] == name
            pipeline.offer(name + b" end")
            pipeline.close(LONG_S)
            eventually(lambda: not any(spool.iterdir()))
    assert server.accepted == [b"a", b"a end", b"killed", b"b", b"b end", b"killed"]


def test_a_sidecar_can_be_stopped_among_segments_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many segments other processes deliver, it ends after the one that it looks at."""
    for _ in range(3):
        left_behind(tmp_path, [b"record"])
    asked: list[Paths] = []
    monkeypatch.setattr(leftovers, "claim", lambda paths, stats: asked.append(paths))
    next(follow(tmp_path, lambda paths: FakeServer().sink, Counts()))
    assert len(asked) == 1


@pytest.mark.usefixtures("at_once")
def test_one_dead_server_does_not_hold_up_the_other(tmp_path: Path) -> None:
    """A sidecar goes on delivering to one server while another is away."""
    away, there = FakeServer(), FakeServer()
    away.down = RetryLater("503")
    left_behind(tmp_path, [b"for the one away"], header=b"away")
    left_behind(tmp_path, [b"for the one there"], header=b"there")
    servers = {b"away": away, b"there": there}
    with following(tmp_path, lambda header: servers[header].sink()):
        eventually(lambda: b"killed" in there.accepted)
    assert there.accepted == [b"for the one there", b"killed"]
    assert away.accepted == []


@pytest.mark.usefixtures("at_once")
def test_dead_processes_are_finished_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, a sidecar never has more than one of them open."""
    monkeypatch.setattr(leftovers.Deliveries, "turn_s", LONG_S)
    server, stats = FakeServer(), Counts()
    for _ in range(5):
        left_behind(tmp_path, numbered(40))
    sinks: list[FakeSink] = []
    open_before: list[int] = []

    def open_sink(header: bytes) -> FakeSink:
        open_before.append(sum(not sink.closed for sink in sinks))
        sinks.append(server.sink(header))
        return sinks[-1]

    with following(tmp_path, open_sink, stats):
        eventually(lambda: not any(tmp_path.iterdir()))
    assert open_before == [0] * 5
    assert server.accepted == [*numbered(40), b"killed"] * 5
    assert stats.delivered == 200


@pytest.mark.usefixtures("at_once")
def test_what_fails_makes_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments whose server is away are open a few at a time, and each has its turn."""
    monkeypatch.setattr(leftovers.Deliveries, "most_open", 2)
    monkeypatch.setattr(leftovers, "MAKE_ROOM_AFTER_S", 0.05)
    away, there = FakeServer(), FakeServer()
    away.down = RetryLater("503")
    for n in range(7):
        left_behind(tmp_path, [b"%d" % n], header=b"away")
    left_behind(tmp_path, [b"for the one there"], header=b"there")
    servers = {b"away": away, b"there": there}
    sinks: list[FakeSink] = []
    most_open = 0

    def open_sink(header: bytes) -> FakeSink:
        nonlocal most_open
        sinks.append(servers[header].sink(header))
        most_open = max(most_open, sum(not sink.closed for sink in sinks))
        return sinks[-1]

    with following(tmp_path, open_sink):
        eventually(lambda: b"killed" in there.accepted)
        assert away.accepted == []
        away.down = None
        eventually(lambda: not any(tmp_path.iterdir()))
    assert most_open == 2
    assert there.accepted == [b"for the one there", b"killed"]
    assert sorted(away.accepted) == sorted([*(b"%d" % n for n in range(7)), *[b"killed"] * 7])


@pytest.mark.usefixtures("at_once")
def test_more_living_processes_than_a_sidecar_has_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take turns; none waits for another one to end."""
    monkeypatch.setattr(leftovers.Deliveries, "most_open", 2)
    server = FakeServer()
    pipelines = [make_pipeline(tmp_path, None) for _ in range(4)]
    with following(tmp_path, server.sink):
        for round_ in (b"first", b"second"):
            for n, pipeline in enumerate(pipelines):
                pipeline.offer(b"%b %d" % (round_, n))
            for pipeline in pipelines:
                eventually(partial(pipeline.flush, LONG_S))
        for pipeline in pipelines:
            pipeline.close(LONG_S)
        eventually(lambda: not any(tmp_path.iterdir()))
    records = [b"%b %d" % (which, n) for which in (b"first", b"second") for n in range(4)]
    assert sorted(server.accepted) == sorted([*records, *[b"killed"] * 4])


@pytest.mark.parametrize("default", [None, b"given by hand"])
def test_a_damaged_header_needs_a_destination(tmp_path: Path, default: bytes | None) -> None:
    """Records whose header is lost are kept until a destination is named."""
    server = FakeServer()
    paths = left_behind(tmp_path, [b"one"])
    [(_, part)] = paths.parts()
    part.write_bytes(part.read_bytes().replace(b"2c", b"2x"))
    outcome = deliver(paths, server.sink, default_header=default)
    if default is None:
        assert outcome is Outcome.UNREADABLE
        assert inspect_segment(paths).waiting == 1
    else:
        assert outcome is Outcome.FINISHED
        assert server.opened == [default]
        assert server.accepted == [b"one", b"killed"]


@pytest.mark.parametrize("parts", [0, 1])
def test_what_a_process_left_before_its_first_record_is_removed(tmp_path: Path, parts: int) -> None:
    """Locks, and a part without its first line, of a process killed in between are tidied up."""
    paths = Paths(tmp_path, "host-1-abc-ff")
    paths.own.touch()
    paths.ship.touch()
    for base in range(parts):
        paths.part(base).touch()
    assert deliver(paths, FakeServer().sink) is Outcome.FINISHED
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_cannot_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a moment costs a dead process's segment nothing."""
    server, read, failed = FakeServer(), DiskPart.read, threading.Event()
    paths = left_behind(tmp_path, numbered(3))

    def fail_once(part: DiskPart, offset: int, size: int) -> bytes:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return read(part, offset, size)

    monkeypatch.setattr(DiskPart, "read", fail_once)
    assert deliver(paths, server.sink) is Outcome.FINISHED
    assert server.accepted == [*numbered(3), b"killed"]


def test_dead_letters_outlive_their_segment_until_purged(tmp_path: Path) -> None:
    """A delivered segment leaves its dead letters to look at; purging removes them."""
    server = FakeServer()
    server.refuses = lambda record: "no" if record == b"one" else None
    paths = left_behind(tmp_path, [b"one", b"two"])
    assert deliver(paths, server.sink) is Outcome.FINISHED
    assert [path.suffix for path in tmp_path.iterdir()] == [".dead"]
    assert sum(inspect_segment(paths).dead_letters.values()) == 1
    assert purge(paths)
    assert list(tmp_path.iterdir()) == []
