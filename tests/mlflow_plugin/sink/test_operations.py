"""A server that is slow, exchanged, behind a router or behind a limit: what a call makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.delivery import DeadLetter, OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunRef
from qitos_mlflow.mlflow_plugin.server.transport import (
    NotThere,
    Poisoned,
    Refused,
    TooLarge,
    Unanswered,
)
from qitos_mlflow.mlflow_plugin.sink import call_list, experiments, operations
from qitos_mlflow.mlflow_plugin.sink.call_list import FAILING_S
from qitos_mlflow.mlflow_plugin.sink.operations import (
    FRESH_S,
    LATE_S,
    LOOK_AGAIN_S,
    SIGHTINGS,
    SIGHTINGS_S,
)
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.clock import Clock
from tests.fakes.transport import FakeTransport
from tests.mlflow_plugin.records import Records

TIMEOUT_S = 10.0
TRACES = ("write_spans", "write_trace")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(call_list, "time", clock)
    monkeypatch.setattr(operations, "time", clock)
    monkeypatch.setattr(experiments, "time", clock)
    return clock


@pytest.fixture
def server() -> FakeTransport:
    return FakeTransport()


def a_sink(server: FakeTransport) -> MlflowSink:
    return MlflowSink(orjson.dumps({"experiment_name": "qitos"}), server)


def prepare(sink: MlflowSink, *records: dict[str, Any]) -> None:
    sink.prepare([orjson.dumps(record) for record in records])


def a_trace(trace_id: str = "trace-1") -> list[dict[str, Any]]:
    make = Records(trace_id)
    return [make.start(trace_id), make.span("step", step_number=0), make.end(recorded=1)]


def attempts(sink: MlflowSink, clock: Clock, every_s: float) -> Iterator[bool]:
    """Try to send again and again; yields whether everything was sent."""
    while True:
        try:
            assert sink.send(TIMEOUT_S) == []
        except RetryLater:
            yield False
        else:
            yield True
        clock.now += every_s


# -- a server without traces, or a router that does not know it yet ------------------------------


def not_there(call: str, _: Any) -> Exception | None:
    """A server whose runs are there and whose traces are not."""
    return NotThere("HTTP 404") if call in TRACES else None


def test_a_router_that_is_being_changed_costs_no_tree(server: FakeTransport, clock: Clock) -> None:
    """A few pages over a short time decide nothing, and nothing counts as delivered meanwhile."""
    sink = a_sink(server)
    prepare(sink, *a_trace())
    server.fail = not_there
    tries = attempts(sink, clock, SIGHTINGS_S / 10)
    assert not any(next(tries) for _ in range(9))
    server.fail = lambda call, _: None
    assert next(tries)
    assert len(server.spans) == 2
    assert "qitos.spans.dropped" not in server.runs["run-0"]["tags"]


@pytest.mark.parametrize("times", [2, SIGHTINGS])
def test_a_server_that_never_had_traces_has_runs(
    server: FakeTransport, clock: Clock, times: int
) -> None:
    """It takes several sightings over some time; then the loss is counted on the run."""
    sink = a_sink(server)
    prepare(sink, *a_trace("one"))
    server.fail = not_there
    sent = []
    for done in attempts(sink, clock, SIGHTINGS_S / (times - 1) + 0.1):
        sent.append(done)
        if done:
            break
    assert len(sent) == max(times, SIGHTINGS)
    prepare(sink, *a_trace("two"))
    before = server.calls.count("write_spans")
    assert sink.send(TIMEOUT_S) == []
    assert server.calls.count("write_spans") == before
    for run in server.runs.values():
        assert run["status"] == "FINISHED"
        assert run["tags"]["qitos.spans.dropped"] == "no_traces=1"


def test_a_server_out_of_order_is_not_one_without_traces(
    server: FakeTransport, clock: Clock
) -> None:
    """Its pages say nothing while it does not answer a simple question either."""
    sink = a_sink(server)
    prepare(sink, *a_trace())
    tries = attempts(sink, clock, SIGHTINGS_S)
    server.fail = not_there
    next(tries)
    server.fail = lambda call, _: NotThere("HTTP 404")
    assert not any(next(tries) for _ in range(10))
    server.fail = lambda call, _: None
    assert next(tries)
    assert len(server.spans) == 2


@pytest.mark.parametrize("failure", [NotThere("HTTP 404"), Refused("NOT_IMPLEMENTED", "")])
def test_traces_are_tried_again_later(
    server: FakeTransport, clock: Clock, failure: Exception
) -> None:
    """A server may be replaced by a newer one."""
    sink = a_sink(server)
    prepare(sink, *a_trace("one"))
    server.fail = lambda call, _: failure if call in TRACES else None
    for done in attempts(sink, clock, SIGHTINGS_S):
        if done:
            break
    server.fail = lambda call, _: None
    prepare(sink, *a_trace("two"))
    assert sink.send(TIMEOUT_S) == []
    assert server.spans == {}
    clock.now += LOOK_AGAIN_S
    prepare(sink, *a_trace("three"))
    assert sink.send(TIMEOUT_S) == []
    assert len(server.spans) == 2


# -- a way to the server that takes no files ----------------------------------------------------

FILE_FAILURES = [
    NotThere("HTTP 405"),
    RetryLater("HTTP 403 from a gateway"),
    Unanswered("ReadTimeout"),
    Poisoned("INTERNAL_ERROR: AccessDenied"),
]


def a_file(trace_id: str) -> dict[str, Any]:
    return {"kind": "artifact", "trace_id": trace_id, "path": "a.txt", "content": "of the run"}


def with_a_file(trace_id: str) -> list[dict[str, Any]]:
    start, span, end = a_trace(trace_id)
    start["settings"] = {"experiment_name": "another"}
    return [start, span, a_file(trace_id), end]


@pytest.mark.parametrize("failure", FILE_FAILURES, ids=lambda failure: type(failure).__name__)
def test_files_that_nothing_takes_hold_up_nothing_else(
    server: FakeTransport, clock: Clock, failure: Exception
) -> None:
    """It takes several failures over some time; then the file is put off, and sent again later."""
    sink = a_sink(server)
    prepare(sink, *with_a_file("one"))
    server.fail = lambda call, _: failure if call == "write_artifact" else None
    dead: list[DeadLetter] = []
    tries = 0
    while not dead and tries < 20:
        with contextlib.suppress(RetryLater):
            dead = sink.send(TIMEOUT_S)
        tries += 1
        clock.now += SIGHTINGS_S / 3
    assert tries == SIGHTINGS
    prepare(sink, *with_a_file("two"))
    dead += sink.send(TIMEOUT_S)
    assert len(server.spans) == 4
    for run in server.runs.values():
        assert run["status"] == "FINISHED"
        assert run["tags"]["qitos.values.dropped"] == "artifact_put_off=1"
    assert server.artifacts == {}
    server.fail = lambda call, _: None
    before = dict(server.runs)
    for letter in dead:
        assert letter.reason == f"NO_ARTIFACTS: {failure}"
        again = MlflowSink(letter.header, server, resumed=True)
        again.prepare([letter.record])
        assert again.send(TIMEOUT_S) == []
    assert server.artifacts == {"a.txt": b"of the run"}
    assert server.calls.count("create_run") == 2
    assert server.runs == before


def test_files_are_tried_again_soon(server: FakeTransport, clock: Clock) -> None:
    """A try that was short is not long ago: what works again costs no file."""
    sink = a_sink(server)
    prepare(sink, *with_a_file("one"))
    server.fail = lambda call, _: NotThere("HTTP 404") if call == "write_artifact" else None
    with pytest.raises(RetryLater):
        sink.send(TIMEOUT_S)
    for _ in range(SIGHTINGS):
        clock.now += SIGHTINGS_S
        with contextlib.suppress(RetryLater):
            sink.send(TIMEOUT_S)
    server.fail = lambda call, _: None
    clock.now += 0.1
    prepare(sink, *with_a_file("two"))
    assert sink.send(TIMEOUT_S) == []
    assert list(server.artifacts) == ["a.txt"]
    prepare(sink, *with_a_file("three"))
    server.fail = lambda call, _: NotThere("HTTP 404") if call == "write_artifact" else None
    with pytest.raises(RetryLater):  # It is all to be seen anew.
        sink.send(TIMEOUT_S)


def test_files_that_take_long_to_fail_get_a_part_of_the_time(
    server: FakeTransport, clock: Clock
) -> None:
    """Else a server that does not answer would hold up each run for as long as a request lasts."""
    sink = a_sink(server)

    def unanswered(call: str, _: Any) -> Exception | None:
        if call != "write_artifact":
            return None
        clock.now += 5.0
        return Unanswered("ReadTimeout")

    server.fail = unanswered
    prepare(sink, *with_a_file("0"))
    for _ in range(SIGHTINGS):
        with contextlib.suppress(RetryLater):
            sink.send(TIMEOUT_S)
    before = server.calls.count("write_artifact")
    for number in range(1, 30):
        prepare(sink, *with_a_file(str(number)))
        try:
            dead = sink.send(TIMEOUT_S)
        except OutOfTime:  # It is called again at once.
            dead = sink.send(TIMEOUT_S)
        assert len(dead) == 1
        clock.now += 5.0
    assert server.calls.count("write_artifact") - before < 5


@pytest.mark.parametrize("out_of_order", [True, False])
def test_an_outage_puts_off_no_file(
    server: FakeTransport, clock: Clock, out_of_order: bool
) -> None:
    """Nor do a few failures over a short time."""
    sink = a_sink(server)
    prepare(sink, *with_a_file("one"))
    tries = attempts(sink, clock, SIGHTINGS_S if out_of_order else SIGHTINGS_S / 10)
    server.fail = lambda call, _: NotThere("404") if call == "write_artifact" else None
    next(tries)
    if out_of_order:
        server.fail = lambda call, _: NotThere("404")
    assert not any(next(tries) for _ in range(8))
    server.fail = lambda call, _: None
    assert next(tries)
    assert server.artifacts == {"a.txt": b"of the run"}
    assert "qitos.values.dropped" not in server.runs["run-0"]["tags"]


def test_a_file_that_the_server_refuses_is_counted(server: FakeTransport, clock: Clock) -> None:
    """By its own reason, and it is not sent again."""
    sink = a_sink(server)
    prepare(sink, *with_a_file("one"))
    refused = Refused("INVALID_PARAMETER_VALUE", "no such name")
    server.fail = lambda call, _: refused if call == "write_artifact" else None
    [letter] = sink.send(TIMEOUT_S)
    assert letter.header == b""
    tags = server.runs["run-0"]["tags"]
    assert tags["qitos.values.dropped"] == "artifact_refused=1"


def test_a_file_that_is_too_large_for_a_proxy_is_put_off(
    server: FakeTransport, clock: Clock
) -> None:
    """At once, for it is no answer of MLflow's: once the limit is another one, `sync` sends it."""
    sink = a_sink(server)
    prepare(sink, *with_a_file("one"))
    large = TooLarge("HTTP 413", "<html>")
    server.fail = lambda call, _: large if call == "write_artifact" else None
    [letter] = sink.send(TIMEOUT_S)
    assert letter.reason == "NO_ARTIFACTS: HTTP 413: <html>"
    assert letter.header
    assert server.runs["run-0"]["tags"]["qitos.values.dropped"] == "artifact_put_off=1"
    assert server.runs["run-0"]["status"] == "FINISHED"
    server.fail = lambda call, _: None
    again = a_sink(server)
    again.prepare([letter.record])
    assert again.send(TIMEOUT_S) == []
    assert server.artifacts == {"a.txt": b"of the run"}


# -- creations ---------------------------------------------------------------------------------


def test_a_creation_that_comes_through_late_is_used(server: FakeTransport, clock: Clock) -> None:
    """The server is given time to carry it out before another run is made."""
    sink = a_sink(server)
    prepare(sink, *a_trace())
    server.fail = lambda call, _: Unanswered("ReadTimeout") if call == "create_run" else None
    tries = attempts(sink, clock, LATE_S / 4)
    assert not any(next(tries) for _ in range(3))
    server.fail = lambda call, _: None
    server.create_run(NewRun("7", "late", 0, [("qitos.trace_id", "trace-1")]), TIMEOUT_S)
    server.calls.remove("create_run")
    assert next(tries)
    assert list(server.runs) == ["run-0"]
    assert server.runs["run-0"]["status"] == "FINISHED"
    assert server.calls.count("create_run") == 1


@pytest.mark.parametrize(
    ("failure", "waits"), [(Unanswered("ReadTimeout"), True), (RetryLater("refused"), False)]
)
def test_a_creation_that_was_lost_is_made_again(
    server: FakeTransport, clock: Clock, failure: Exception, waits: bool
) -> None:
    """At once, if the server did not get it; else after it had its time."""
    sink = a_sink(server)
    prepare(sink, *a_trace())
    server.fail = lambda call, _: failure if call == "create_run" else None
    tries = attempts(sink, clock, LATE_S / 2)
    assert not next(tries)
    server.fail = lambda call, _: None
    assert next(tries) is not waits
    clock.now += LATE_S
    if waits:
        assert next(tries)
    assert list(server.runs) == ["run-0"]


# -- another database ----------------------------------------------------------------------------


def test_each_experiment_is_looked_up_by_its_name_again(
    server: FakeTransport, clock: Clock
) -> None:
    """An id is believed for moments only: behind the address may be another database."""
    sink = a_sink(server)
    for pause in (0.0, FRESH_S / 2, FRESH_S + 1):
        clock.now += pause
        prepare(sink, *a_trace(f"after {pause}"))
        assert sink.send(TIMEOUT_S) == []
    assert server.calls.count("experiment_id") == 2


@pytest.mark.parametrize(
    "failure",
    [
        RetryLater("refused"),
        Refused("RESOURCE_DOES_NOT_EXIST", "run"),
        Refused("INVALID_PARAMETER_VALUE", "run"),
    ],
)
def test_any_failure_ends_what_is_known(
    server: FakeTransport, clock: Clock, failure: Exception
) -> None:
    """A restart shows as a failed call, another database as a run that is not there."""
    sink = a_sink(server)
    prepare(sink, *a_trace("one"))
    server.fail = lambda call, _: failure if call == "end_run" else None
    with contextlib.suppress(RetryLater):
        sink.send(TIMEOUT_S)
    server.fail = lambda call, _: None
    clock.now += 0.1
    sink.send(TIMEOUT_S)
    prepare(sink, *a_trace("two"))
    sink.send(TIMEOUT_S)
    assert server.calls.count("experiment_id") == 2


@pytest.mark.parametrize("call", ["write_spans", "write_trace"])
def test_an_outage_may_end_with_another_database(
    server: FakeTransport, clock: Clock, call: str
) -> None:
    """Nothing of a trace is written once its run is gone, also what was listed before."""
    sink = a_sink(server)
    prepare(sink, *a_trace())
    server.fail = lambda what, _: RetryLater("refused") if what == call else None
    tries = attempts(sink, clock, 3600.0)
    assert not next(tries)
    server.fail = lambda what, _: None
    server.runs.clear()
    before = server.calls.count(call)
    assert sink.send(TIMEOUT_S)
    assert server.calls.count(call) == before


# -- a server that cannot write ------------------------------------------------------------------


@pytest.mark.parametrize("failure", [Poisoned("BAD_REQUEST: read-only"), TooLarge("HTTP 413", "")])
@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_server_that_only_reads_blames_no_record(
    server: FakeTransport, clock: Clock, failure: Exception, from_the_start: bool
) -> None:
    """A database after a failover, or a router that takes no body at all: it passes."""
    sink = a_sink(server)
    start, *rest = a_trace()
    reads = ("experiment_id", "find_runs")
    prepare(sink, *([start, *rest] if from_the_start else [start]))
    if not from_the_start:
        assert sink.send(TIMEOUT_S) == []
        prepare(sink, *rest)
    server.fail = lambda call, _: None if call in reads else failure
    tries = attempts(sink, clock, FAILING_S)
    assert not any(next(tries) for _ in range(20))
    server.fail = lambda call, _: None
    assert next(tries)
    [run] = server.runs.values()
    assert run["status"] == "FINISHED"
    assert "qitos.values.dropped" not in run["tags"]


def test_a_run_is_created_although_a_tag_breaks_the_server(
    server: FakeTransport, clock: Clock
) -> None:
    """The tag is left out, and all others follow."""
    sink = a_sink(server)
    start, *rest = a_trace()
    start["settings"] = {"experiment_name": "qitos", "tags": {"good": "yes", "bad": "poison"}}
    prepare(sink, start, *rest)
    logs = ("create_run", "log_batch")
    server.fail = lambda call, what: (
        Poisoned("500") if call in logs and "poison" in repr(what) else None
    )
    dead = []
    for _ in range(30):
        with contextlib.suppress(RetryLater):
            dead = sink.send(TIMEOUT_S)
            break
        clock.now += FAILING_S
    assert len(dead) == 1
    assert b"poison" in dead[0].record
    [run] = server.runs.values()
    assert run["status"] == "FINISHED"
    assert run["tags"]["good"] == "yes"


def fails_on(kind: str, of: str = "") -> Any:
    """A server that fails on one kind of what is written; of that, on what has this text in it."""

    def fail(call: str, what: Any) -> Exception | None:
        logged = call == "log_batch" and kind in {type(item).__name__ for item in what}
        return Poisoned("500") if (logged or call == kind) and of in repr(what) else None

    return fail


KINDS = ["Metric", "write_spans", "write_trace", "end_run"]


@pytest.mark.parametrize("known", [True, False], ids=["later", "at first"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_alike_blames_no_item(
    server: FakeTransport, clock: Clock, kind: str, known: bool
) -> None:
    """A server that fails on all of a kind, and takes all else, is out of order: it passes."""
    sink = a_sink(server)
    if known:
        prepare(sink, *a_trace("before"))
        assert sink.send(TIMEOUT_S) == []
    prepare(sink, *a_trace("one"), *a_trace("two"))
    tries = attempts(sink, clock, FAILING_S)
    server.fail = fails_on(kind)
    assert not any(next(tries) for _ in range(40))
    server.fail = lambda *_: None
    assert any(next(tries) for _ in range(3))
    straight = FakeTransport()
    whole = a_sink(straight)
    for trace_id in ["before"] * known + ["one", "two"]:
        prepare(whole, *a_trace(trace_id))
        assert whole.send(TIMEOUT_S) == []
    assert server.runs == straight.runs
    assert server.spans.keys() == straight.spans.keys()
    assert server.traces.keys() == straight.traces.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_whenever_a_server_gets_well_it_blames_no_item(
    server: FakeTransport, clock: Clock, kind: str
) -> None:
    """Also if it takes another item right after it failed on one."""
    sink = a_sink(server)
    prepare(sink, *a_trace("before"))
    assert sink.send(TIMEOUT_S) == []
    for times in range(1, 30):
        left = [Poisoned("500")] * times

        def fail(call: str, what: Any, left: list[Poisoned] = left) -> Exception | None:
            return left.pop() if left and fails_on(kind)(call, what) else None

        server.fail = fail
        prepare(sink, *a_trace(f"after {times}"))
        tries = attempts(sink, clock, FAILING_S)
        assert any(next(tries) for _ in range(40))
        assert not left
        assert server.runs[f"run-{times}"]["status"] == "FINISHED"
        assert server.values(f"run-{times}") == server.values("run-0")


@pytest.mark.parametrize(("kind", "text"), [("Metric", "0.875"), ("write_spans", "bad")])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("place", ["first", "last", "around", "alone"])
def test_items_that_break_the_server_hold_up_nothing(
    server: FakeTransport, clock: Clock, kind: str, text: str, count: int, place: str
) -> None:
    """It takes others of their kind: of the same batch, or one that it has taken before."""
    sink = a_sink(server)
    make = Records("trace-1")
    good = [make.span("critic", critic_name="good", score=0.5) for _ in range(5)]
    bad = [make.span("critic", critic_name="bad", score=0.875) for _ in range(count)]
    prepare(sink, make.start("trace-1"), *(good if place == "alone" else []))
    assert sink.send(TIMEOUT_S) == []
    server.fail = fails_on(kind, text)
    around = bad + good + bad[:1]
    around[-1] = {**around[-1], "span_id": "last", "start_ns": around[-2]["start_ns"] + 1}
    spans = {"first": bad + good, "last": good + bad, "around": around, "alone": bad}[place]
    prepare(sink, *spans)
    dead: list[DeadLetter] = []
    for _ in range(20):
        with contextlib.suppress(RetryLater):
            dead = sink.send(TIMEOUT_S)
            break
        clock.now += FAILING_S
    assert len(dead) == count + (place == "around")
    assert all(text.encode() in letter.record for letter in dead)
    assert len(server.spans) == 1 + 5 + len(dead) * (kind == "Metric")
    assert server.values()["critic/score"].count(0.5) == 5


@pytest.mark.parametrize("traces", [["one"], ["one", "two"]])
def test_spans_go_to_no_strangers_experiment(
    server: FakeTransport, clock: Clock, traces: list[str]
) -> None:
    """A batch of spans alone is sent only if the server still has the runs they belong to."""
    sink = a_sink(server)
    make = {name: Records(name) for name in traces}
    prepare(sink, *(make[name].start(name) for name in traces))
    assert sink.send(TIMEOUT_S) == []
    server.runs.clear()  # The database was emptied.
    written = server.calls.count("write_spans")
    clock.now += FRESH_S + 1
    prepare(sink, *(make[name].span("task") for name in traces))
    dead = sink.send(TIMEOUT_S)
    assert server.calls.count("write_spans") == written
    assert len(dead) == len(traces)
    assert all(letter.reason.startswith("RESOURCE_DOES_NOT_EXIST") for letter in dead)


# -- a proxy's limit -----------------------------------------------------------------------------


def limited(most: int) -> Any:
    """A proxy that takes no more bytes in one request."""

    def fail(call: str, what: Any) -> Exception | None:
        size = len(orjson.dumps(what, default=repr)) if call != "write_spans" else 0
        return TooLarge("HTTP 413", "") if size > most else None

    return fail


def test_a_single_span_over_a_proxys_limit_is_cut(
    server: FakeTransport, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its longest fields are cut, all else of it stays, and the run says so."""
    sink = a_sink(server)
    write, most = server.write_spans, 4000

    def write_spans(experiment_id: str, spans: list[Span], timeout_s: float) -> None:
        if sum(span.ByteSize() for span in spans) > most:
            raise TooLarge("HTTP 413", "")
        write(experiment_id, spans, timeout_s)

    monkeypatch.setattr(server, "write_spans", write_spans)
    start, span, end = a_trace()
    span["output"] = {"short": "kept", "long": ["x" * 100_000, {"deep": "y" * 9000}]}
    prepare(sink, start, span, end)
    assert sink.send(TIMEOUT_S) == []
    [step] = [span for span in server.spans.values() if span.parent_span_id]
    text = str(step)
    assert "kept" in text
    assert "cut: 100000 characters in all" in text
    assert step.ByteSize() <= most
    tags = server.runs["run-0"]["tags"]
    assert int(tags["qitos.values.dropped"].removeprefix("too_large=")) >= 1
    assert "qitos.spans.dropped" not in tags


def test_a_traces_info_and_a_long_tag_are_cut_too(server: FakeTransport, clock: Clock) -> None:
    """Whatever has long texts gets through; the run's own tags as well."""
    make = Records("trace-1")
    server.fail = limited(3000)
    sink = a_sink(server)
    start = make.start("trace-1", metadata={"seed": 7})
    start["settings"] = {"experiment_name": "qitos", "tags": {"note": "n" * 7000}}
    prepare(sink, start, make.span("step", step_number=0), make.end(recorded=1))
    assert sink.send(TIMEOUT_S) == []
    run = server.runs["run-0"]
    assert run["status"] == "FINISHED"
    assert 0 < len(run["tags"]["note"]) < 3000
    assert len(server.traces) == 1


def test_a_run_has_each_tag_once(
    server: FakeTransport, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own comes before ours: MLflow's database refuses two of the same name."""
    create, sent = server.create_run, []

    def create_run(run: NewRun, timeout_s: float) -> RunRef:
        sent.extend(key for key, _ in run.tags)
        return create(run, timeout_s)

    monkeypatch.setattr(server, "create_run", create_run)
    start, *rest = a_trace()
    start["settings"] = {"experiment_name": "qitos", "tags": {"mlflow.source.type": "NOTEBOOK"}}
    sink = a_sink(server)
    prepare(sink, start, *rest)
    assert sink.send(TIMEOUT_S) == []
    assert len(sent) == len(set(sent))
    assert server.runs["run-0"]["tags"]["mlflow.source.type"] == "NOTEBOOK"


def test_a_bare_run_whose_tags_all_follow_goes_on(server: FakeTransport, clock: Clock) -> None:
    """None of them is left to be logged first; the run is not stuck for that."""
    server.fail = lambda call, what: (
        TooLarge("HTTP 413", "") if call == "create_run" and len(what) > 1 else None
    )
    start, *rest = a_trace()
    start["settings"] = {"experiment_name": "qitos", "tags": {"mlflow.source.type": "NOTEBOOK"}}
    sink = a_sink(server)
    prepare(sink, start, *rest)
    assert sink.send(TIMEOUT_S) == []
    assert server.runs["run-0"]["status"] == "FINISHED"
    assert server.runs["run-0"]["tags"]["mlflow.source.type"] == "NOTEBOOK"


def test_a_span_of_many_numbers_has_a_note_in_their_place(
    server: FakeTransport, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no text is long, the largest field is left out, and counted once."""
    sink = a_sink(server)
    write = server.write_spans

    def write_spans(experiment_id: str, spans: list[Span], timeout_s: float) -> None:
        if sum(span.ByteSize() for span in spans) > 4000:
            raise TooLarge("HTTP 413", "")
        write(experiment_id, spans, timeout_s)

    monkeypatch.setattr(server, "write_spans", write_spans)
    start, span, end = a_trace()
    span["output"] = list(range(90_000))
    prepare(sink, start, span, end)
    assert sink.send(TIMEOUT_S) == []
    assert "[left out: " in str(server.spans)
    assert server.runs["run-0"]["tags"]["qitos.values.dropped"] == "too_large=1"


def test_what_has_no_large_part_is_a_dead_letter(server: FakeTransport, clock: Clock) -> None:
    """What is too large and cannot be cut costs itself, and no more."""
    server.fail = lambda call, _: TooLarge("HTTP 413", "") if call == "write_spans" else None
    sink = a_sink(server)
    prepare(sink, *a_trace())
    dead = sink.send(TIMEOUT_S)
    assert len(dead) == 2
    assert server.runs["run-0"]["tags"]["qitos.spans.dropped"] == "refused=1"
