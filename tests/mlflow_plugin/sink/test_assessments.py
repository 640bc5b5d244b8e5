"""What is said of a trace afterwards: written once, by whatever process, in whatever state."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest

from qitos_mlflow.delivery import DeadLetter, OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.mapping.assessments import OWN_ID, assessment_of, metric_of
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.server.transport import Refused
from qitos_mlflow.mlflow_plugin.sink import assessments
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.transport import FakeTransport
from tests.mlflow_plugin.records import START_NS, Records

TIMEOUT_S = 10.0
HEADER = b'{"tracking_uri": "http://fake.test"}'
SETTINGS = {"experiment_name": "qitos"}
OURS = trace_id("trace-1")


def said(name: str = "correct", value: Any = True, **fields: Any) -> dict[str, Any]:
    """A record of a score."""
    return {
        "kind": "assessment",
        "type": "feedback",
        "trace_id": "trace-1",
        "name": name,
        "value": value,
        "source_type": "CODE",
        "source_id": "a test",
        "metadata": {},
        "time_ns": START_NS,
        "settings": SETTINGS,
        **fields,
    }


def by_id(**fields: Any) -> dict[str, Any]:
    """One of another process, which knows nothing but MLflow's id."""
    record = said(trace_id=OURS, **fields)
    del record["settings"]
    return record


def deliver(server: FakeTransport, *records: dict[str, Any], sink: Any = None) -> list[DeadLetter]:
    """Deliver records in one batch; returns the dead letters."""
    sink = sink or MlflowSink(HEADER, server)
    sink.prepare([orjson.dumps(record) for record in records])
    return sink.send(TIMEOUT_S)


def values(server: FakeTransport) -> dict[str, Any]:
    """What the server has, by name."""
    parts = ("feedback", "expectation")
    return {
        one["assessment_name"]: next(one[part]["value"] for part in parts if part in one)
        for one in server.assessments.values()
    }


@pytest.fixture
def server() -> FakeTransport:
    """A server that has the trace."""
    server, make = FakeTransport(), Records()
    step = make.span("step", step=0, step_number=0)
    start = make.start(settings=SETTINGS)
    assert deliver(server, start, step, make.end(recorded=1, settings=SETTINGS)) == []
    server.traces[OURS] = {
        **server.traces[OURS],
        "trace_location": {"mlflow_experiment": {"experiment_id": "7"}},
        "trace_metadata": {"mlflow.sourceRun": "run-0"},
    }
    server.calls.clear()
    return server


@pytest.mark.parametrize("record", [said(), by_id()])
def test_it_is_written_once(record: dict[str, Any], server: FakeTransport) -> None:
    """Delivered twice it is there once, as feedback and as a metric."""
    for _ in range(2):
        assert deliver(server, record) == []
    assert values(server) == {"correct": True}
    assert server.values()["correct"] == [1.0]
    assert (server.calls.count("create_assessment"), server.calls.count("create_run")) == (1, 0)
    assert "update_assessment" not in server.calls


def test_the_last_one_of_a_name_and_source_counts(server: FakeTransport) -> None:
    """Whichever process it comes from; other sources, and expectations, are others."""
    assert deliver(server, said(), by_id(value=False, time_ns=START_NS + 1)) == []
    assert deliver(server, by_id(value=0.5, rationale="half", time_ns=START_NS + 2)) == []
    [one] = server.assessments.values()
    assert (one["feedback"], one["rationale"]) == ({"value": 0.5}, "half")
    assert deliver(server, said(source_id="another"), said(type="expectation")) == []
    assert len(server.assessments) == 3


def test_what_was_said_later_stays(server: FakeTransport) -> None:
    """Also if it is delivered before what another process has said, as `sync` does it."""
    assert deliver(server, said(value="later", time_ns=START_NS + 2)) == []
    assert deliver(server, by_id(value="earlier", time_ns=START_NS + 1)) == []
    assert values(server) == {"correct": "later"}


def test_scores_of_one_trace_share_a_look_at_it(server: FakeTransport) -> None:
    """A suite says many things at once."""
    assert deliver(server, *(said(str(number), number) for number in range(10))) == []
    assert server.calls.count("trace_info") == 1
    assert len(server.assessments) == 10


def test_a_store_that_gives_ids_of_its_own_has_it_once(server: FakeTransport) -> None:
    """Ours is in the metadata, too."""
    assert deliver(server, said()) == []
    [(own, one)] = server.assessments.items()
    server.assessments = {"theirs": {**one, "assessment_id": "theirs"}}
    assert one["metadata"][OWN_ID] == own
    assert deliver(server, said(value=False, time_ns=START_NS + 1)) == []
    assert server.assessments.keys() == {"theirs"}
    assert values(server) == {"correct": False}


def test_two_processes_at_once(server: FakeTransport) -> None:
    """The store has refused the second one of the same id: it is changed at the next attempt."""
    other = assessment_of(said(value=False))

    def first(call: str, what: Any) -> Exception | None:
        if call == "create_assessment":
            server.assessments[other["assessment_id"]] = other
        return None

    server.fail = first
    sink = MlflowSink(HEADER, server)
    sink.prepare([orjson.dumps(said(time_ns=START_NS + 1))])
    with pytest.raises(RetryLater, match="constraint"):
        sink.send(TIMEOUT_S)
    assert sink.send(TIMEOUT_S) == []
    assert values(server) == {"correct": True}


def test_of_an_open_trace_it_comes_with_the_info() -> None:
    """Also if it is given before the tree begins, and after the process has died."""
    server, make = FakeTransport(), Records()
    sink = MlflowSink(HEADER, server)
    start, step = make.start(settings=SETTINGS), make.span("step", step=0, step_number=0)
    assert deliver(server, start, said(), said(value=False), sink=sink) == []
    state = sink.state()
    again = MlflowSink(HEADER, server)
    again.restore(state)
    assert deliver(server, step, said("later", 7), sink=again) == []
    assert values(server) == {"correct": False, "later": 7}
    assert deliver(server, said("at once", 9), sink=again) == []
    assert values(server)["at once"] == 9
    assert deliver(server, make.end(recorded=1, settings=SETTINGS), sink=again) == []
    assert deliver(server, said("last", 8), sink=again) == []
    assert values(server) == {"correct": False, "later": 7, "at once": 9, "last": 8}
    assert "update_assessment" not in server.calls
    assert len(server.runs) == 1


def test_a_missing_trace_is_waited_for(server: FakeTransport) -> None:
    """Another process may be delivering it. All else of the batch is delivered before."""
    info = server.traces.pop(OURS)
    sink = MlflowSink(HEADER, server)
    other = Records("trace-2")
    records = [by_id(time_ns=time.time_ns()), other.start(), other.end()]
    sink.prepare([orjson.dumps(record) for record in records])
    # It is no outage: the agents of this process get their runs meanwhile.
    with pytest.raises(OutOfTime):
        sink.send(TIMEOUT_S)
    assert [run["status"] for run in server.runs.values()] == ["FINISHED", "FINISHED"]
    server.traces[OURS] = {**info, "trace_metadata": {}, "tags": {}}  # Its spans came first.
    with pytest.raises(OutOfTime):
        sink.send(TIMEOUT_S)
    server.traces[OURS] = info
    assert sink.send(TIMEOUT_S) == []
    assert values(server) == {"correct": True}


def test_a_trace_that_does_not_come_is_put_off(server: FakeTransport) -> None:
    """A dead letter that says why, and that may be sent again."""
    server.traces.clear()
    waited = time.time_ns() - int((assessments.WAIT_S + 1) * 1e9)
    ours, theirs = said(time_ns=waited), by_id(time_ns=waited)
    dead = deliver(server, ours, theirs)
    assert {letter.header for letter in dead} == {HEADER}
    assert all(f"has no trace {OURS}" in letter.reason for letter in dead)
    assert [orjson.loads(letter.record) for letter in dead] in ([ours, theirs], [theirs, ours])
    assert "create_experiment" not in server.calls


def test_ids_that_were_made_up_delay_little(server: FakeTransport) -> None:
    """After one that has waited in vain none waits: agents' runs are behind it."""
    server.traces.clear()
    sink = MlflowSink(HEADER, server)
    waited = time.time_ns() - int((assessments.WAIT_S + 1) * 1e9)
    for time_ns in (waited, time.time_ns()):
        [letter] = deliver(server, by_id(time_ns=time_ns), sink=sink)
        assert f"has no trace {OURS}" in letter.reason


def test_a_number_of_a_run(server: FakeTransport) -> None:
    """It needs no trace. A run that is not there is a dead letter."""
    of_run = {**by_id(name="pass", value=0.5), "trace_id": "run run-0", "run_id": "run-0"}
    assert deliver(server, of_run) == []
    assert (server.values()["pass"], server.assessments) == ([0.5], {})
    [letter] = deliver(server, {**of_run, "trace_id": "run run-9", "run_id": "run-9"})
    assert letter.reason == "NO_RUN: http://fake.test has no run run-9"


def test_a_trace_of_no_run_is_a_dead_letter(server: FakeTransport) -> None:
    """It is none of an agent's."""
    server.traces[OURS] |= {"trace_metadata": {}, "tags": {}}
    [letter] = deliver(server, by_id())
    assert letter.reason.startswith("NO_RUN")
    assert server.assessments == {}


def test_what_the_server_refuses_is_a_dead_letter(server: FakeTransport) -> None:
    """That one alone."""

    def refuse(call: str, what: Any) -> Exception | None:
        bad = call == "create_assessment" and what["assessment_name"] == "bad"
        return Refused("INVALID_PARAMETER_VALUE", "no such name") if bad else None

    server.fail = refuse
    [letter] = deliver(server, said("bad"), said("good"))
    assert orjson.loads(letter.record)["name"] == "bad"
    assert values(server) == {"good": True}


def test_without_a_trace_only_numbers_are_logged(server: FakeTransport) -> None:
    """They are metrics of the run."""
    settings = {**SETTINGS, "log_traces": False}
    [letter] = deliver(server, said(settings=settings), said("label", "good", settings=settings))
    assert "only numbers" in letter.reason
    assert (server.assessments, server.values()["correct"]) == ({}, [1.0])


def test_a_server_without_traces_has_the_numbers(server: FakeTransport) -> None:
    """As MLflow's file stores. A text has no place there, nor has what is known by its id only."""

    def refuse(call: str, what: Any) -> Exception | None:
        return Refused("NOT_IMPLEMENTED", "no traces") if call == "trace_info" else None

    server.fail = refuse
    dead = deliver(server, said(), said("label", "good"), by_id())
    assert [orjson.loads(letter.record)["name"] for letter in dead] == ["label", "correct"]
    assert (server.assessments, server.values()["correct"]) == ({}, [1.0])


def test_texts_of_an_open_trace_are_not_lost_without_traces() -> None:
    """Its infos would have them, but such a server takes none."""
    server, make = FakeTransport(), Records()

    def refuse(call: str, what: Any) -> Exception | None:
        traced = call in ("write_spans", "write_trace", "trace_info")
        return Refused("NOT_IMPLEMENTED", "no traces") if traced else None

    server.fail = refuse
    start, step = make.start(settings=SETTINGS), make.span("step", step=0, step_number=0)
    texts = said("label", "good"), said("answer", "42", type="expectation")
    dead = deliver(server, start, step, said(), *texts)
    assert [orjson.loads(letter.record)["name"] for letter in dead] == ["label", "answer"]
    assert all("only numbers" in letter.reason for letter in dead)
    assert server.values()["correct"] == [1.0]


@pytest.mark.parametrize(
    ("value", "kind", "number"),
    [
        (True, "feedback", 1.0),
        (2, "feedback", 2.0),
        ("2", "feedback", None),
        ([1], "feedback", None),
        (2, "expectation", None),
    ],
)
def test_what_is_a_metric(value: Any, kind: str, number: float | None) -> None:
    """A score that is a number; what is expected is no result."""
    found = metric_of(said("a name?", value, type=kind))
    assert (None if found is None else found.value) == number
    assert found is None or found.key.startswith("a name_")


def test_a_record_without_its_fields_is_no_failure() -> None:
    """Other versions may write others."""
    found = assessment_of({"kind": "assessment", "trace_id": "trace-1"})
    assert found["assessment_name"] == "unnamed"
    assert found["source"] == {"source_type": "CODE", "source_id": "default"}
