"""One pipeline per destination and process, however many plugins record to it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from qitos_mlflow.delivery import find_segments
from qitos_mlflow.recording import pipelines, process_exit
from qitos_mlflow.recording import recorder as recorders
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings
from qitos_mlflow.tracing import SpanType, StepSpanData, Trace
from tests.fakes.sink import FakeServer
from tests.waiting import eventually

LONG_S = 30.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline with nothing to do rests as soon as it can."""
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.REST_S", 0.02)
    monkeypatch.setattr("qitos_mlflow.delivery.leftovers.FIRST_LOOK_S", 0.0)


@pytest.fixture
def server() -> FakeServer:
    """What all destinations of a test deliver to."""
    return FakeServer()


@pytest.fixture
def recorder(
    server: FakeServer, tmp_path: Path
) -> Iterator[Callable[..., Recorder[TraceRecorder]]]:
    """Make a recorder, with these settings: ``recorder(exit_timeout_s=7.0)``."""
    made: list[Recorder[TraceRecorder]] = []

    def make(**settings: Any) -> Recorder[TraceRecorder]:
        made.append(Recorder(Settings(**{"spool_dir": tmp_path / "spool", **settings})))
        return made[-1]

    yield make
    for one in made:
        one.close(LONG_S)
        # Or the tests' own process would report at its end what it holds.
        shutil.rmtree(one.settings.spool_dir, ignore_errors=True)


@pytest.fixture
def begin(server: FakeServer) -> Callable[..., TraceRecorder]:
    """Begin a trace: ``begin(recorder, "id", key="destination")``."""

    class ToServer(RecordPipeline):
        def open_sink(self) -> Any:
            return server.sink()

    def begin(to: Recorder[TraceRecorder], trace_id: str, key: str = "one") -> TraceRecorder:
        pipeline = to.pipeline_to(key, partial(ToServer, key.encode()))
        host = Trace(name=trace_id, trace_id=trace_id)
        trace = TraceRecorder(host, pipeline, to.settings)
        to.add(trace_id, trace)
        trace.start(host, who=key)
        return trace

    return begin


def finish(trace: TraceRecorder) -> None:
    """End it."""
    trace.end_early("FINISHED", "over")


def accepted(server: FakeServer) -> list[dict[str, Any]]:
    """The records that arrived."""
    return [orjson.loads(record) for record in server.accepted]


def of_delivery() -> int:
    """How many threads deliver."""
    return sum(thread.name.startswith("qitos-mlflow") for thread in threading.enumerate())


def test_recorders_of_one_destination_share_one_pipeline(
    recorder: Any, begin: Any, server: FakeServer, tmp_path: Path
) -> None:
    """Threads, segment and connection are there once; each trace arrives whole."""
    before = of_delivery()
    many = [recorder() for _ in range(5)]
    traces = [begin(one, f"trace-{number}") for number, one in enumerate(many)]
    assert len({trace.pipeline for trace in traces}) == 1
    assert of_delivery() <= before + 2
    for trace in traces:
        finish(trace)
    assert all(one.flush(LONG_S) for one in many)
    assert len(server.opened) == 1
    assert len(find_segments(tmp_path / "spool")) == 1
    ends = [record["trace_id"] for record in accepted(server) if record["kind"] == "trace_end"]
    assert ends == [trace.id for trace in traces]


def test_of_one_destination_each_trace_has_an_id_whatever_the_spool(
    recorder: Any, begin: Any, tmp_path: Path
) -> None:
    """The server is the same: another spool, or one that is delivered later, changes nothing."""
    own, offline = {"spool_dir": tmp_path / "another"}, {"offline": True}
    traces = [begin(recorder(**settings), "t") for settings in ({}, own, offline)]
    assert [trace.id for trace in traces] == ["t", "t~2", "t~3"]
    assert begin(recorder(), "t", key="two").id == "t"


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("two", {}),
        ("one", {"offline": True}),
        ("one", {"spool_dir": Path("elsewhere").absolute()}),
    ],
)
def test_what_goes_elsewhere_has_a_pipeline_of_its_own(
    recorder: Any, begin: Any, key: str, settings: dict[str, Any]
) -> None:
    """Another destination, another spool, or one that is not delivered from here."""
    first = begin(recorder(), "a")
    second = begin(recorder(**settings), "b", key=key)
    assert first.pipeline is not second.pipeline


def test_a_recorder_that_closes_leaves_the_others_at_work(
    recorder: Any, begin: Any, server: FakeServer
) -> None:
    """Its own records are delivered and its later spans refused; those of others go on."""
    one, other = recorder(), recorder()
    closing, open_trace = begin(one, "closing"), begin(other, "open")
    assert one.close(LONG_S) is True
    assert [record["trace_id"] for record in accepted(server)] == ["closing", "open", "closing"]
    step = Trace(name="x", trace_id="x").create_span(SpanType.STEP, StepSpanData(1))
    closing.end_span(step)
    open_trace.end_span(step)
    finish(open_trace)
    assert other.flush(LONG_S) is False  # The loss of the refused span is reported once.
    assert other.flush(LONG_S) is True
    kinds = [(record["kind"], record["trace_id"]) for record in accepted(server)[3:]]
    assert kinds == [("span", "open"), ("trace_end", "open")]


def test_the_last_one_ends_the_pipeline(recorder: Any, begin: Any, server: FakeServer) -> None:
    """Threads and files go; whatever records there next gets a new one."""
    one, other = recorder(), recorder()
    before = of_delivery()
    traces = [begin(one, "a"), begin(other, "b")]
    for trace in traces:
        finish(trace)
    assert one.close(LONG_S) is True
    assert of_delivery() > before
    assert other.close(LONG_S) is True
    assert of_delivery() == before
    assert begin(recorder(), "c").pipeline is not traces[0].pipeline


def test_a_recorder_that_was_dropped_is_no_user_any_more(recorder: Any, begin: Any) -> None:
    """The next one that closes ends the pipeline."""
    dropped, closes = Recorder[TraceRecorder](recorder().settings), recorder()
    begin(dropped, "a")
    pipeline = begin(closes, "b").pipeline
    del dropped
    gc.collect()
    assert closes.close(LONG_S) is True
    assert pipeline.closed


def test_unused_pipelines_are_forgotten(recorder: Any, begin: Any, tmp_path: Path) -> None:
    """A process that makes a processor for each of many destinations keeps none for ever."""
    before = {*pipelines.unfinished, *recorders._pipelines.values()}
    for number in range(5):
        dropped: Recorder[TraceRecorder] = Recorder(Settings(spool_dir=tmp_path / "spool"))
        finish(begin(dropped, "t", key=f"{number}"))
        assert dropped.flush(LONG_S)
        eventually(lambda one=dropped: all(p.at_rest for p in one._pipelines))
        del dropped
        gc.collect()
    begin(recorder(), "t")
    assert len({*recorders._pipelines.values()} - before) == 1
    assert len(pipelines.unfinished - before) == 1


def test_the_longest_deadline_and_the_largest_field_count(recorder: Any, begin: Any) -> None:
    """No user gets less than it asked for."""
    for number, (seconds, size) in enumerate([(1.0, 10), (7.0, 5000), (2.0, 20)]):
        trace = begin(recorder(exit_timeout_s=seconds, field_bytes=size), f"{number}")
    assert (trace.pipeline.exit_timeout_s, trace.pipeline.field_bytes) == (7.0, 5000)


def test_two_recorders_of_one_trace_have_an_id_each(
    recorder: Any, begin: Any, server: FakeServer
) -> None:
    """Run and trace are found on the server by it. Once a trace has ended, its id is free."""
    one, other = recorder(), recorder()
    first, second = begin(one, "t"), begin(other, "t")
    assert (first.id, second.id) == ("t", "t~2")
    finish(first)
    finish(second)
    assert begin(recorder(), "t").id == "t"


def test_the_sink_finds_the_open_traces_of_its_destination(
    recorder: Any, begin: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`find` takes the id in the records; other destinations and deleted traces give None."""
    one = recorder()
    trace = begin(one, "t")
    elsewhere = begin(one, "other", key="two")
    find = trace.pipeline.find
    assert find("t") is trace
    assert find(elsewhere.id) is None
    assert not trace.is_quiet
    finish(trace)
    assert trace.is_quiet


def test_traces_are_found_while_others_begin(recorder: Any, begin: Any) -> None:
    """Whatever other threads record elsewhere meanwhile, a pipeline finds its own traces."""
    trace, over = begin(recorder(), "t"), threading.Event()
    elsewhere = RecordPipeline(b"", "elsewhere", recorder().settings)

    class Other:
        id, ended, pipeline = "", False, elsewhere

    def record() -> None:
        while not over.is_set():
            others = [Other() for _ in range(100)]
            for number, other in enumerate(others):
                elsewhere.add(other, f"{number}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as other_thread:
            recording = other_thread.submit(record)
            try:
                assert all(trace.pipeline.traces == [trace] for _ in range(2000))
            finally:
                over.set()
            recording.result(LONG_S)
    finally:
        sys.setswitchinterval(before)


def test_nothing_is_taken_once_the_process_ends(
    recorder: Any, begin: Any, server: FakeServer
) -> None:
    """Open traces end as KILLED, and a plugin sees that the pipeline takes no more."""
    one = recorder()
    trace = begin(one, "t")
    process_exit._refuse(trace.pipeline)
    assert trace.pipeline.closed
    assert one.pipeline_to("one", lambda key, settings: pytest.fail("made")).closed
    assert one.close(LONG_S) is True
    assert [record.get("status") for record in accepted(server)] == [None, "KILLED"]


def test_no_lock_is_held_while_a_pipeline_is_made(recorder: Any, begin: Any) -> None:
    """Traces to other destinations begin meanwhile; of two pipelines for one, one is used."""
    first, second = recorder(), recorder()
    made: list[RecordPipeline] = []

    def slowly(key: str, settings: Settings) -> RecordPipeline:
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(begin, second, "other", key="two").result(LONG_S)
            if not made:
                made.append(RecordPipeline(b"", key, settings))
                elsewhere.submit(second.pipeline_to, key, lambda *_: made[0]).result(LONG_S)
        return RecordPipeline(b"", key, settings)

    assert first.pipeline_to("one", slowly) is made[0]


def test_an_exception_in_flight_is_the_traces_own_or_not(
    recorder: Any, begin: Any, server: FakeServer
) -> None:
    """On a host whose Trace has no error: it counts unless it was handled when the trace began."""
    one, host = recorder(), SimpleNamespace(metadata={})
    begin(one, "alone").end(host)
    try:
        raise ValueError("outer")
    except ValueError:
        begin(one, "handled before").end(host)
        fails = begin(one, "fails")
        try:
            raise KeyError("inner")
        except KeyError:
            fails.end(host)
    assert one.flush(LONG_S)
    ends = [record for record in accepted(server) if record["kind"] == "trace_end"]
    assert {end["trace_id"]: end["error"] and end["error"]["type"] for end in ends} == {
        "alone": None,
        "handled before": None,
        "fails": "KeyError",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file it is")
@pytest.mark.parametrize("spool_fsync", [False, True])
def test_the_setting_brings_records_to_the_disk(
    recorder: Callable[..., Recorder[TraceRecorder]],
    begin: Callable[..., TraceRecorder],
    monkeypatch: pytest.MonkeyPatch,
    spool_fsync: bool,
) -> None:
    """With `spool_fsync` each append is followed by an fsync of its file; without, by none."""
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().suffix)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    one = recorder(spool_fsync=spool_fsync, offline=True)
    trace = begin(one, "trace")
    trace.pipeline.flush(LONG_S)
    assert (".seg" in synced) is spool_fsync
