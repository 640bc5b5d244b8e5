"""The pipeline as its owner sees it: in order, resumable, bounded in time, never silent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from qitos_mlflow import _guard
from qitos_mlflow.delivery import (
    Outcome,
    OutOfTime,
    Pipeline,
    RetryLater,
    inspect_segment,
    segment_transfer,
    waiting_records,
)
from qitos_mlflow.delivery.pipeline import DISK_GRACE_S
from qitos_mlflow.delivery.segment_transfer import BATCH_RECORDS, SEND_TIMEOUT_S
from qitos_mlflow.delivery.spool import paths
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.fakes.sink import FakeServer, FakeSink, Losses, deliver, make_pipeline, numbered
from tests.waiting import eventually

LONG_S = 60.0
"""A deadline that is not to be reached."""

Make = Callable[..., Pipeline]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def make(spool: Path, server: FakeServer) -> Iterator[Make]:
    """Makes pipelines and sees to it that no thread outlives the test."""
    made: list[Pipeline] = []

    def make(to: FakeServer | None = server, **changes: object) -> Pipeline:
        directory = changes.pop("directory", spool)
        assert isinstance(directory, Path)
        made.append(make_pipeline(directory, to, **changes))
        return made[-1]

    yield make
    server.answers.set()
    server.down = None
    for pipeline in made:
        pipeline.close(LONG_S)
    for thread in threading.enumerate():
        if thread.name.startswith("qitos-mlflow"):
            thread.join(LONG_S)
            assert not thread.is_alive()


def test_everything_arrives_in_order(make: Make, server: FakeServer, spool: Path) -> None:
    """What is offered is delivered once, in order; a clean end leaves no file and no thread."""
    pipeline = make()
    records = numbered(3 * BATCH_RECORDS + 7)
    assert all(pipeline.offer(record) for record in records)
    assert pipeline.flush(LONG_S)
    assert server.accepted == records
    assert pipeline.online is True
    stats = pipeline.stats
    assert (stats.recorded, stats.delivered, stats.dropped) == (len(records), len(records), {})
    assert list(waiting_records(pipeline.paths)) == []
    assert pipeline.close(LONG_S)
    assert list(spool.iterdir()) == []


def test_a_record_is_on_the_disk_before_it_is_sent(make: Make, server: FakeServer) -> None:
    """A process that is killed while it sends has lost nothing of what it was sending."""
    there: list[bool] = []

    def look(record: bytes) -> None:
        there.append(record in list(waiting_records(pipeline.paths)))

    server.refuses = look
    pipeline = make()
    records = numbered(20)
    for record in records:
        pipeline.offer(record, urgent=True)
    assert pipeline.flush(LONG_S)
    assert server.accepted == records
    assert there == [True] * 20


def test_nothing_offered_starts_nothing(make: Make, spool: Path) -> None:
    """A pipeline that is never used has no thread and no file, and flush and close are true."""
    before = threading.active_count()
    pipeline = make()
    assert pipeline.flush(0)
    assert pipeline.close(0)
    assert threading.active_count() == before
    assert not spool.exists()


def test_urgent_records_are_sent_at_once(
    make: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An urgent record does not wait for others to gather, in memory or in the spool."""
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.APPEND_EVERY_S", 10 * LONG_S)
    monkeypatch.setattr("qitos_mlflow.delivery.sending_thread.SEND_EVERY_S", 10 * LONG_S)
    pipeline = make()
    pipeline.offer(b"span")
    pipeline.offer(b"trace start", keep=True, urgent=True)
    assert server.attempted.wait(LONG_S)


def test_spans_are_sent_without_a_flush(make: Make, server: FakeServer) -> None:
    """Live charts need no call of flush."""
    make().offer(b"span")
    assert server.attempted.wait(LONG_S)


def test_an_outage_costs_nothing(make: Make, server: FakeServer) -> None:
    """While the server is away records are kept, and all of them arrive when it is back."""
    server.down = RetryLater("503")
    pipeline = make()
    records = numbered(50)
    for record in records[:25]:
        pipeline.offer(record)
    assert not pipeline.flush(0.2)
    assert pipeline.online is False
    assert list(waiting_records(pipeline.paths)) == records[:25]
    server.down = None
    for record in records[25:]:
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert server.accepted == records


def test_a_flush_tries_at_once(make: Make, server: FakeServer) -> None:
    """Whatever delay the server asked for, each flush makes one attempt."""
    server.down = RetryLater("429", after_s=100_000.0)
    pipeline = make()
    pipeline.offer(b"one")
    assert not pipeline.flush(0.2)
    server.down = None
    assert pipeline.flush(LONG_S)
    assert server.accepted == [b"one"]


def test_a_flush_goes_on_trying(
    make: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage, too, when the next attempt would come long after the server is back."""
    monkeypatch.setattr("qitos_mlflow.delivery.backoff.FIRST_DELAY_S", 10 * LONG_S)
    monkeypatch.setattr("qitos_mlflow.delivery.backoff.MAX_DELAY_S", 10 * LONG_S)
    monkeypatch.setattr("qitos_mlflow.delivery.sending_thread.WAITED_FOR_DELAY_S", 0.01)
    server.down = RetryLater("connection refused")
    pipeline = make()
    pipeline.offer(b"one")
    with ThreadPoolExecutor() as pool:
        flushed = pool.submit(pipeline.flush, LONG_S)
        eventually(lambda: server.attempts >= 5)
        server.down = None
        assert flushed.result()
    assert server.accepted == [b"one"]


def test_a_batch_goes_on_where_it_stopped(make: Make, server: FakeServer) -> None:
    """A connection cut within a batch sends no record of it a second time."""
    server.breaks_after = 10
    pipeline = make()
    records = numbered(30)
    for record in records:
        pipeline.offer(record)
    assert not pipeline.flush(0.2)
    assert server.accepted == records[:10]
    server.breaks_after = None
    assert pipeline.flush(LONG_S)
    assert server.accepted == records


def test_refused_records_are_dead_letters(make: Make, server: FakeServer, spool: Path) -> None:
    """What the server refuses for good is kept with its reason; the rest of its batch arrives."""
    server.refuses = lambda record: "too odd" if b"7" in record else None
    pipeline = make()
    for record in numbered(10):
        pipeline.offer(record)
    assert pipeline.close(LONG_S)
    assert server.accepted == [r for r in numbered(10) if b"7" not in r]
    assert pipeline.stats.dead_letters == 1
    assert pipeline.stats.delivered == 9
    [dead] = spool.iterdir()
    assert "too odd" in dead.read_text()


def test_a_sink_that_cannot_be_opened_is_tried_again(
    make: Make, server: FakeServer, swallowed: list[tuple[str, BaseException]]
) -> None:
    """Records wait in the spool for a sink that fails to open, whatever it raises."""
    opened = threading.Event()
    failures: list[Exception] = [RetryLater("not yet"), ImportError("half installed")]

    def open_sink() -> FakeSink:
        if failures:
            raise failures.pop()
        opened.set()
        return server.sink()

    pipeline = make(open_sink=open_sink)
    pipeline.offer(b"one", keep=True)
    assert pipeline.flush(LONG_S)
    assert opened.is_set()
    assert server.accepted == [b"one"]
    assert [where for where, _ in swallowed] == ["delivery.open_sink"]
    swallowed.clear()


def test_a_sink_with_a_bug_loses_the_one_record_it_has_it_for(
    make: Make, server: FakeServer, swallowed: list[tuple[str, BaseException]]
) -> None:
    """A record that cannot be mapped is buried with the error; all others arrive, with state."""

    class BuggySink(FakeSink):
        def prepare(self, records: Sequence[bytes]) -> None:
            super().prepare(records)
            if numbered(8)[5] in records:
                raise ZeroDivisionError("bug")

    sink = BuggySink(server)
    pipeline = make(open_sink=lambda: sink)
    for record in numbered(8):
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert server.accepted == numbered(8)[:5] + numbered(8)[6:]
    assert pipeline.stats.dead_letters == 1
    assert sink.mapped == 7
    assert {where for where, _ in swallowed} == {"delivery.prepare"}
    swallowed.clear()


def test_a_sink_may_need_time_to_map(make: Make, server: FakeServer) -> None:
    """`RetryLater` while records are mapped is no bug of one of them: all are mapped again."""
    failures = [RetryLater("not yet"), OutOfTime(), RetryLater("not yet")]

    class SlowSink(FakeSink):
        def prepare(self, records: Sequence[bytes]) -> None:
            super().prepare(records)
            if failures:
                raise failures.pop()

    sink = SlowSink(server)
    pipeline = make(open_sink=lambda: sink)
    for record in numbered(8):
        pipeline.offer(record)
    eventually(lambda: pipeline.flush(LONG_S))
    assert server.accepted == numbered(8)
    assert pipeline.stats.dead_letters == 0
    assert sink.mapped == 8


@pytest.mark.parametrize(
    "error", [MemoryError(), UserWarning("unverified https"), AttributeError("patched"), OSError(5)]
)
def test_no_answer_is_no_refusal(
    make: Make, server: FakeServer, swallowed: list[tuple[str, BaseException]], error: Exception
) -> None:
    """Whatever sending raises, and however often, the records wait and arrive."""
    server.down = error
    pipeline = make()
    for record in numbered(8):
        pipeline.offer(record)
    while server.attempts < 10:  # A batch, then its first record, had three attempts each once.
        assert not pipeline.flush(0.1)
    server.down = None
    assert pipeline.flush(LONG_S)
    assert server.accepted == numbered(8)
    assert pipeline.stats.dead_letters == 0
    assert {where for where, _ in swallowed} == {"delivery.send"}
    swallowed.clear()


def test_normalizing_happens_off_the_agents_thread(make: Make, server: FakeServer) -> None:
    """The spooling thread decodes and redacts; only the result reaches disk and wire."""
    threads: set[str] = set()

    def normalize(payload: bytes) -> bytes | None:
        threads.add(threading.current_thread().name)
        return None if payload == b"drop" else payload.replace(b"secret", b"***")

    pipeline = make(normalize=normalize)
    pipeline.offer(b"a secret")
    pipeline.offer(b"drop")
    assert pipeline.flush(LONG_S)
    assert server.accepted == [b"a ***"]
    assert threads == {"qitos-mlflow-spooling"}
    assert pipeline.stats.dropped == {}


def test_a_bug_of_the_spooling_thread_costs_the_records_at_hand_only(
    make: Make,
    server: FakeServer,
    swallowed: list[tuple[str, BaseException]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are counted, reported and seen by other processes; later records are delivered."""
    losses = Losses()
    store = SegmentWriter.append

    def fail(
        segment: SegmentWriter, records: Sequence[tuple[bytes, bool]], time_ns: int
    ) -> list[tuple[bytes, str]]:
        if any(data.startswith(b"bad") for data, _ in records):
            raise ValueError("a bug")
        return store(segment, records, time_ns)

    monkeypatch.setattr(SegmentWriter, "append", fail)
    pipeline = make(lost=losses)
    for payload in (b"bad", b"bad too"):
        pipeline.offer(payload)
    assert pipeline.flush(LONG_S)
    pipeline.offer(b"good")
    assert pipeline.flush(LONG_S)
    assert server.accepted == [b"good"]
    assert pipeline.stats.dropped == {"spooling_failed": 2}
    assert losses.records == [(b"bad", "spooling_failed"), (b"bad too", "spooling_failed")]
    assert inspect_segment(pipeline.paths).losses == {"spooling_failed": 2}
    assert {where for where, _ in swallowed} == {"delivery.spooling"}
    swallowed.clear()


def test_a_failing_normalize_costs_its_record_only(
    make: Make, server: FakeServer, swallowed: list[tuple[str, BaseException]]
) -> None:
    """What cannot be redacted is not stored, but counted and reported; the thread continues."""
    losses = Losses()

    def normalize(payload: bytes) -> bytes:
        if payload == b"bad":
            raise ValueError("cannot")
        return payload

    pipeline = make(normalize=normalize, lost=losses)
    for payload in (b"one", b"bad", b"two"):
        pipeline.offer(payload)
    assert pipeline.flush(LONG_S)
    assert server.accepted == [b"one", b"two"]
    assert pipeline.stats.dropped == {"normalize_failed": 1}
    assert losses.records == [(b"bad", "normalize_failed")]
    swallowed.clear()


def test_a_full_queue_refuses_spans_and_keeps_ends(make: Make, server: FakeServer) -> None:
    """If the spooling thread hangs, spans beyond the bound are refused and counted, ends taken."""
    busy, go_on = threading.Event(), threading.Event()

    def normalize(payload: bytes) -> bytes:
        busy.set()
        go_on.wait(LONG_S)
        return payload

    pipeline = make(normalize=normalize, queue_bytes=10_000)
    assert pipeline.offer(b"first")
    assert busy.wait(LONG_S)
    taken = sum(pipeline.offer(b"x" * 880) for _ in range(100))
    assert taken == 10
    assert pipeline.offer(b"the end", keep=True)
    go_on.set()
    assert pipeline.flush(LONG_S)
    assert server.accepted == [b"first", *[b"x" * 880] * 10, b"the end"]
    assert pipeline.stats.dropped == {"queue_full": 90}


def test_a_hanging_server_never_delays_the_disk(make: Make, server: FakeServer) -> None:
    """While a send hangs, records go on reaching the spool."""
    server.answers.clear()
    pipeline = make()
    pipeline.offer(b"first", keep=True)
    assert server.attempted.wait(LONG_S)
    for record in numbered(20):
        pipeline.offer(record)
    eventually(lambda: len(list(waiting_records(pipeline.paths))) == 21)
    assert pipeline.stats.delivered == 0


def test_one_destination_does_not_hold_up_another(make: Make, server: FakeServer) -> None:
    """While one sink is being opened, which may take long, another one is opened and used."""
    opening, go_on = threading.Event(), threading.Event()

    def open_slowly() -> FakeSink:
        opening.set()
        go_on.wait(LONG_S)
        return server.sink()

    slow = make(open_sink=open_slowly)
    slow.offer(b"slow", urgent=True)
    assert opening.wait(LONG_S)
    fast = make()
    fast.offer(b"fast")
    assert fast.flush(LONG_S / 4)
    assert server.accepted == [b"fast"]
    go_on.set()
    assert slow.flush(LONG_S)


def test_deadlines_hold_with_a_server_that_hangs(
    make: Make, server: FakeServer, spool: Path
) -> None:
    """Flush and close return when their time is up, not when the send does; the spool has it."""
    server.answers.clear()
    pipeline = make()
    pipeline.offer(b"one", keep=True)
    assert server.attempted.wait(LONG_S)
    began = time.monotonic()
    assert not pipeline.flush(0.1)
    assert not pipeline.close(0.1)
    hung = time.monotonic() - began
    assert hung < SEND_TIMEOUT_S / 2
    assert len(list(waiting_records(pipeline.paths))) == 1
    server.answers.set()
    eventually(lambda: not any(spool.iterdir()))  # The send is back, the last thread tidies up.
    assert server.accepted == [b"one"]
    assert pipeline.close(LONG_S)
    assert pipeline.flush(0)


def test_close_is_final_and_may_be_repeated(make: Make, server: FakeServer) -> None:
    """After close offers are refused and counted; closing again, on any thread, is harmless."""
    pipeline = make()
    pipeline.offer(b"one")
    results: list[bool] = []
    closers = [
        threading.Thread(target=lambda: results.append(pipeline.close(LONG_S))) for _ in range(4)
    ]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    assert results == [True] * 4
    assert not pipeline.offer(b"late")
    assert not pipeline.offer(b"later", keep=True)
    assert pipeline.stats.dropped == {"closed": 2}
    assert server.accepted == [b"one"]
    assert pipeline.flush(0)


def test_closing_ends_what_the_records_left_open(
    make: Make, server: FakeServer, spool: Path
) -> None:
    """Where the end of a trace was lost, its process ends it when it closes."""
    server.left_open = b"ended"
    pipeline = make()
    pipeline.offer(b"one")
    assert pipeline.close(LONG_S)
    assert server.accepted == [b"one", b"ended"]
    assert list(spool.iterdir()) == []


def test_what_closing_could_not_end_is_left_to_others(
    make: Make, server: FakeServer, spool: Path
) -> None:
    """The segment stays, although all of its records are delivered, until its traces are ended."""
    server.left_open = b"ended"
    server.breaks_after = 1
    pipeline = make()
    pipeline.offer(b"one")
    pipeline.close(LONG_S)
    server.breaks_after = None
    assert deliver(pipeline.paths, server.sink) is Outcome.FINISHED
    assert server.accepted == [b"one", b"killed"]
    assert list(spool.iterdir()) == []


def test_close_without_time_still_saves_to_disk(make: Make, server: FakeServer) -> None:
    """A deadline of nothing costs the delivery, not the records."""
    server.down = RetryLater("503")
    pipeline = make()
    for record in numbered(100):
        pipeline.offer(record)
    assert not pipeline.close(0)
    assert list(waiting_records(pipeline.paths)) == numbered(100)
    assert len(pipeline.paths.parts()) == 1


def test_an_offer_that_races_with_close_is_counted(make: Make) -> None:
    """A record that comes after the spooling thread's end is a counted loss."""
    busy, go_on = threading.Event(), threading.Event()

    def normalize(payload: bytes) -> bytes:
        busy.set()
        go_on.wait(LONG_S)
        return payload

    pipeline = make(normalize=normalize)
    queue = pipeline._queue
    pipeline.offer(b"one")
    assert busy.wait(LONG_S)
    closer = threading.Thread(target=lambda: pipeline.close(LONG_S))
    closer.start()
    while queue._items.empty():  # Until close has placed the end of the queue.
        time.sleep(0.001)
    queue.offer(b"late")
    go_on.set()
    closer.join()
    assert pipeline.stats.recorded == 1
    assert pipeline.stats.dropped == {"closed": 1}


def test_no_disk_means_memory(make: Make, server: FakeServer, tmp_path: Path) -> None:
    """With a spool that cannot be written delivery goes on; what is left at the end is a loss."""
    (tmp_path / "file").write_text("in the way")
    pipeline = make(directory=tmp_path / "file" / "spool")
    for record in numbered(10):
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert server.accepted == numbered(10)
    server.down = RetryLater("503")
    pipeline.offer(b"lost")
    assert not pipeline.close(0.05)
    assert pipeline.stats.dropped == {"spool_unwritable": 1}


def test_no_disk_and_offline_is_a_counted_loss(make: Make, tmp_path: Path) -> None:
    """Offline no thread takes records from memory: each is counted and reported."""
    (tmp_path / "file").write_text("in the way")
    losses = Losses()
    pipeline = make(None, directory=tmp_path / "file" / "spool", lost=losses)
    for record in numbered(10):
        assert pipeline.offer(record)
    pipeline.close(LONG_S)
    assert pipeline.stats.dropped == {"spool_unwritable": 10}
    assert losses.by_reason() == {"spool_unwritable": 10}


def test_what_is_kept_can_tell_what_was_lost(make: Make, tmp_path: Path) -> None:
    """A record to keep is normalized once all before it are on disk, or known to be lost."""
    (tmp_path / "file").write_text("in the way")
    losses = Losses()
    known: list[int] = []

    def normalize(payload: bytes) -> bytes:
        if payload == b"end":
            known.append(len(losses.records))
        return payload

    pipeline = make(
        None,
        directory=tmp_path / "file" / "spool",
        normalize=normalize,
        lost=losses,
    )
    for payload in [b"span", b"span", b"end", b"span", b"end"]:
        assert pipeline.offer(payload, keep=payload == b"end")
    pipeline.close(LONG_S)
    assert known == [2, 4]


def test_losses_can_be_seen_by_other_processes(make: Make, spool: Path) -> None:
    """What a process has lost is in the spool, while it lives and afterwards."""
    pipeline = make(None, spool_bytes=3000)
    for _ in range(3):
        pipeline.offer(b"x" * 2000)
    assert not pipeline.flush(LONG_S)
    assert inspect_segment(pipeline.paths).losses == {"spool_full": 2}
    pipeline.close(LONG_S)
    assert not pipeline.offer(b"late")
    pipeline.close(LONG_S)
    assert inspect_segment(pipeline.paths).losses == {"spool_full": 2, "closed": 1}


def test_offline_only_fills_the_spool(make: Make, spool: Path) -> None:
    """Offline the records wait on disk, and flush and close say that they do."""
    pipeline = make(None)
    for record in numbered(10):
        pipeline.offer(record)
    assert not pipeline.flush(LONG_S)
    assert not pipeline.close(LONG_S)
    assert len(list(waiting_records(pipeline.paths))) == 10
    assert pipeline.online is None


@pytest.mark.parametrize(
    ("reason", "logged"),
    [
        ("can't create new thread at interpreter shutdown", 0),  # 3.12 and later, always.
        ("can't start new thread", 1),  # The system's limit: logged.
    ],
)
def test_where_no_thread_can_start_flush_does_the_work(
    make: Make,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
    logged: int,
) -> None:
    """Where no thread is to be had records still arrive."""
    monkeypatch.setattr(_guard, "_last_logged", {})

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError(reason)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pipeline = make()
        for record in numbered(10):
            assert pipeline.offer(record)
        assert pipeline.flush(LONG_S)
        assert server.accepted == numbered(10)
        pipeline.offer(b"more")
        assert pipeline.close(LONG_S)
    assert server.accepted == [*numbered(10), b"more"]
    assert caplog.text.count(reason) == logged


def test_what_is_lost_at_the_end_is_counted_once(
    make: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A signal handler may close the pipeline while its thread is counting what is left."""
    (tmp_path / "file").write_text("in the way")
    server.down = RetryLater("503")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pipeline = make(directory=tmp_path / "file" / "spool")
    drop = pipeline.stats.drop

    def interrupted(reason: str, records: int = 1) -> None:
        monkeypatch.setattr(pipeline.stats, "drop", drop)
        pipeline.close(0.0)
        drop(reason, records)

    monkeypatch.setattr(pipeline.stats, "drop", interrupted)
    for record in numbered(10):
        pipeline.offer(record)
    assert not pipeline.close(0.0)
    assert pipeline.stats.dropped == {"spool_unwritable": 10}


def test_without_a_sending_thread_records_reach_the_disk(
    make: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the second of the two threads cannot be started, the first one writes all the same."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "qitos-mlflow-sending":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pipeline = make()
    for record in numbered(10):
        assert pipeline.offer(record)
    eventually(lambda: list(waiting_records(pipeline.paths)) == numbered(10))
    assert pipeline.unsaved == 0
    assert pipeline.flush(LONG_S)
    assert pipeline.offer(b"more")
    assert pipeline.close(LONG_S)
    assert server.accepted == [*numbered(10), b"more"]
    assert not pipeline.paths.files(now=True)


def test_offers_from_a_signal_handler_cannot_deadlock(make: Make, server: FakeServer) -> None:
    """An offer that interrupts an offer, at any point, gets through."""
    pipeline = make()
    inside = [0]

    def handler(signum: int, frame: object) -> None:
        inside[0] += 1
        pipeline.offer(b"from the handler")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        sent = 0
        while inside[0] < 50:
            pipeline.offer(b"from the agent")
            sent += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert pipeline.flush(LONG_S)
    assert server.accepted.count(b"from the handler") == inside[0]
    assert server.accepted.count(b"from the agent") == sent


def test_close_is_false_while_records_are_in_memory(make: Make, server: FakeServer) -> None:
    """What is not written when time is up is reported as unsaved, and written all the
    same if the process lives on; then all threads end."""
    busy, go_on = threading.Event(), threading.Event()

    def normalize(payload: bytes) -> bytes:
        busy.set()
        go_on.wait(LONG_S)
        return payload

    pipeline = make(normalize=normalize)
    records = numbered(5)
    for record in records:
        pipeline.offer(record)
    assert busy.wait(LONG_S)
    assert not pipeline.close(0.0)
    assert pipeline.unsaved == 5
    spooling = pipeline._spooling
    assert spooling.sending is not None
    go_on.set()
    for thread in (spooling, spooling.sending):
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert pipeline.unsaved == 0
    assert [*server.accepted, *waiting_records(pipeline.paths)] == records
    assert pipeline.close(0.0) == (server.accepted == records)


def test_who_has_little_time_does_not_end_what_another_waits_for(
    make: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two threads that close, the one that is out of time leaves the sending to the other."""
    monkeypatch.setattr(segment_transfer, "BATCH_RECORDS", 1)
    server.answers.clear()
    pipeline = make()
    for record in numbered(3):
        pipeline.offer(record)
    with ThreadPoolExecutor(1) as elsewhere:
        other = elsewhere.submit(pipeline.close, LONG_S)
        eventually(lambda: pipeline._spooling.sending and pipeline._spooling.sending._waiters)
        assert not pipeline.close(0.01)
        server.answers.set()
        assert other.result(LONG_S)
    assert server.accepted == numbered(3)


def test_closing_offline_looks_at_the_directory_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have many pipelines in one spool, and one deadline for all of them."""
    pipelines = [make(None) for _ in range(3)]
    for pipeline in pipelines:
        pipeline.offer(b"one")
        pipeline.flush(LONG_S)
    looks = []

    def look(directory: Path) -> list[str]:
        looks.append(directory)
        return os.listdir(directory)  # noqa: PTH208

    monkeypatch.setattr(paths, "os", SimpleNamespace(**{**vars(os), "listdir": look}))
    for pipeline in pipelines * 2:
        assert not pipeline.close(LONG_S)
    assert len(looks) == 6


# -- rest ------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines go to rest as soon as they can."""
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.REST_S", 0.01)
    monkeypatch.setattr("qitos_mlflow.delivery.leftovers.FIRST_LOOK_S", 0.0)


def at_rest(pipeline: Pipeline) -> bool:
    """Whether nothing of it runs."""
    return not pipeline._awake.locked()


def test_a_pipeline_with_nothing_to_do_goes_to_rest(
    make: Make, server: FakeServer, spool: Path, soon: None
) -> None:
    """Threads and files go once all is delivered, come back with the next record; counts stay."""
    threads = threading.active_count()
    pipeline = make()
    for number, record in enumerate(numbered(3)):
        assert pipeline.offer(record, urgent=True)
        eventually(lambda: at_rest(pipeline))
        eventually(lambda: threading.active_count() == threads)
        assert list(spool.iterdir()) == []
        assert server.accepted == numbered(number + 1)
        assert pipeline.flush(0)
    assert (pipeline.stats.recorded, pipeline.stats.delivered) == (3, 3)
    assert len(server.opened) == 3
    assert pipeline.close(0)
    assert not pipeline.offer(b"late")
    assert pipeline.stats.dropped == {"closed": 1}


@pytest.mark.usefixtures("soon")
def test_no_rest_while_more_is_expected(make: Make, server: FakeServer) -> None:
    """Records that belong together stay in one segment, however long the agent thinks."""
    asked, expecting = threading.Event(), True

    def may_rest() -> bool:
        asked.set()
        return not expecting

    pipeline = make(may_rest=may_rest)
    pipeline.offer(b"start", urgent=True)
    assert asked.wait(LONG_S)
    assert not at_rest(pipeline)
    expecting = False
    eventually(lambda: at_rest(pipeline))
    assert server.accepted == [b"start"]


@pytest.mark.usefixtures("soon")
def test_no_rest_before_all_is_delivered(make: Make, server: FakeServer) -> None:
    """While the server is away, what waits for it is waited for."""
    server.down = RetryLater("503")
    pipeline = make()
    pipeline.offer(b"one")
    assert not pipeline.flush(0.2)
    assert not at_rest(pipeline)
    server.down = None
    assert pipeline.flush(LONG_S)
    eventually(lambda: at_rest(pipeline))


@pytest.mark.usefixtures("soon")
def test_offline_all_records_are_in_one_segment(make: Make) -> None:
    """A pipeline that only writes does not rest: `sync` finds one segment a process."""
    pipeline = make(None, may_rest=lambda: pytest.fail("asked"))
    paths = pipeline.paths
    for number, record in enumerate(numbered(3)):
        pipeline.offer(record)
        assert not pipeline.flush(LONG_S)
        assert list(waiting_records(pipeline.paths)) == numbered(number + 1)
    assert pipeline.paths == paths


@pytest.mark.usefixtures("soon")
def test_nothing_is_lost_between_work_and_rest(
    make: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, flushes and a close that come while the threads end are not lost."""
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.REST_S", 0.0001)
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.APPEND_EVERY_S", 0.0001)
    pipeline = make()
    records = numbered(300)
    for number, record in enumerate(records):
        assert pipeline.offer(record, urgent=True)
        if number % 3 == 0:
            assert pipeline.flush(LONG_S)
            assert server.accepted == records[: number + 1]
        else:
            time.sleep(0.0001 * (number % 7))
    assert pipeline.close(LONG_S)
    assert server.accepted == records
    assert len(server.opened) > 1


@pytest.mark.parametrize("timeout_s", [LONG_S, 0.0])
def test_a_close_while_it_goes_to_rest_ends_the_threads_that_wake(
    make: Make, server: FakeServer, soon: None, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    """The record that comes meanwhile has new threads: they are waited for, and they end."""
    resting, go_on = threading.Event(), threading.Event()
    before = threading.active_count()

    class Slow(FakeSink):
        def close(self) -> None:
            resting.set()
            go_on.wait(LONG_S)

    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.REST_WITHIN_S", LONG_S)
    pipeline = make(open_sink=lambda: Slow(server))
    pipeline.offer(b"one", urgent=True)
    assert resting.wait(LONG_S)
    pipeline.offer(b"two")
    waiting, reached = threading.Event(), pipeline._last.reached
    wait = reached.wait

    def watched(timeout_s: float) -> bool:
        waiting.set()
        return wait(timeout_s)

    monkeypatch.setattr(reached, "wait", watched)
    with ThreadPoolExecutor(1) as elsewhere:
        closing = elsewhere.submit(pipeline.close, timeout_s)
        assert waiting.wait(LONG_S)
        if timeout_s:
            go_on.set()
        assert closing.result(LONG_S) is bool(timeout_s)
    go_on.set()
    eventually(lambda: threading.active_count() == before)
    assert server.accepted[0] == b"one"
    assert [*server.accepted, *waiting_records(pipeline.paths)] == [b"one", b"two"]


def test_what_comes_while_it_goes_to_rest_belongs_to_the_same_segment(
    make: Make, server: FakeServer, soon: None
) -> None:
    """A last record that comes when nothing has come for long is not cut off from its trace."""
    is_over = []

    def may_rest() -> bool:
        if not is_over:
            pipeline.offer(b"end")
            is_over.append(True)
        return True

    server.left_open = b"killed"  # At its end a segment ends what is left open.
    pipeline = make(may_rest=may_rest)
    pipeline.offer(b"start", urgent=True)
    eventually(lambda: server.accepted == [b"start", b"end", b"killed"])
    eventually(lambda: at_rest(pipeline))
    assert len(server.opened) == 1


def test_a_flush_does_not_wait_for_what_comes_after_it(make: Make, server: FakeServer) -> None:
    """Others record on; what was there before the call is delivered."""
    pipeline = make()

    def receive(record: bytes) -> None:
        server.accepted.append(record)
        if len(server.accepted) < 200:  # Each brings the next: there is always one on its way.
            pipeline.offer(b"another", urgent=True)

    server.refuses = lambda record: receive(record)
    pipeline.offer(b"first", urgent=True)
    assert pipeline.flush(LONG_S)
    assert server.accepted[0] == b"first"


def test_closing_many_takes_no_longer_than_closing_one(make: Make, tmp_path: Path) -> None:
    """Once all refuse, the time for the disk runs for all of them at once."""
    go_on = threading.Event()
    pipelines = []
    for number in range(8):
        busy = threading.Event()

        def normalize(payload: bytes, busy: threading.Event = busy) -> bytes:
            busy.set()
            go_on.wait(LONG_S)
            return payload

        pipelines.append(make(normalize=normalize, directory=tmp_path / str(number)))
        pipelines[-1].offer(b"one")
        assert busy.wait(LONG_S)
    began = time.monotonic()
    for pipeline in pipelines:
        pipeline.refuse()
    assert not any(pipeline.close(began - time.monotonic()) for pipeline in pipelines)
    assert time.monotonic() - began < 4 * DISK_GRACE_S
    go_on.set()
