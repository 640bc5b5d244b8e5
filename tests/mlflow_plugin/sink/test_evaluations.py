"""An evaluation's run in the sink: found or created once, continued, merged, with its numbers."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric, NewRun, RunData
from qitos_mlflow.mlflow_plugin.server.transport import Refused
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.transport import FakeTransport
from tests.mlflow_plugin.records import MS, START_NS, Records

TIMEOUT_S = 10.0
PARENT = "mlflow.parentRunId"
IN = {"id": "E", "name": "sweep", "places": True}


def start(at_ms: int = 0, **reference: Any) -> dict[str, Any]:
    settings = {"run_name": "sweep", "log_traces": False, "evaluation": {**IN, **reference}}
    settings["tags"] = {"qitos.evaluation.expected": "3"}
    at_ns = START_NS + at_ms * MS
    about = {"trace_id": f"evaluation {settings['evaluation']['id']}", "settings": settings}
    return {"kind": "evaluation_start", "time_ns": at_ns, "metadata": {"a": {"b": 1}}, **about}


def end(at_ms: int = 5_000, status: str = "FINISHED", **reference: Any) -> dict[str, Any]:
    begun = {**start(at_ms, **reference), "kind": "evaluation_end", "status": status}
    return {key: value for key, value in begun.items() if key != "metadata"}


def child(task: str, success: float | None = 1.0, **reference: Any) -> list[dict[str, Any]]:
    """The records of one task."""
    make = Records(f"trace-{task}")
    tags = {"qitos.task_id": task, "qitos.trial": "0", "qitos.attempt": f"attempt-{task}"}
    settings = {"evaluation": {**IN, **reference}, "tags": tags}
    result = {"kind": "assessment", "type": "feedback", "name": "verdict/success"}
    result |= {"value": bool(success), "time_ns": START_NS + 2_000 * MS}
    result |= {"trace_id": make.trace_id, "settings": settings}
    records = [make.start(settings=settings), make.span("step"), make.end(settings=settings)]
    return records if success is None else [*records, result]


def deliver(server: FakeTransport, *records: dict[str, Any], last: bool = False) -> MlflowSink:
    sink = MlflowSink(b"{}", server)
    sink.prepare([orjson.dumps(record) for record in records])
    assert sink.send(TIMEOUT_S) == []
    if last and sink.abandoned(START_NS + 9_000 * MS):
        assert sink.send(TIMEOUT_S) == []
    return sink


def parents(server: FakeTransport) -> dict[str, dict[str, Any]]:
    return {key: run for key, run in server.runs.items() if PARENT not in run["tags"]}


def only_parent(server: FakeTransport) -> tuple[str, dict[str, Any]]:
    """The one run at the top; all others are its children."""
    [(run_id, parent)] = parents(server).items()
    assert {run["tags"].get(PARENT) for run in server.runs.values()} <= {None, run_id}
    return run_id, parent


def latest(server: FakeTransport, run_id: str) -> dict[str, float]:
    stored = server.stored_run(run_id, TIMEOUT_S)
    assert stored is not None
    return {key.removeprefix("eval/"): value for key, value in stored.metrics.items()}


def test_an_evaluation_is_one_run_with_its_children_below_it() -> None:
    """With params, numbers, the table, the traces, and no numbers of a trace."""
    server = FakeTransport()
    deliver(server, start(), *child("a"), *child("b", 0.0), end())
    run_id, parent = only_parent(server)
    assert parent["status"] == "FINISHED"
    assert parent["tags"]["mlflow.runType"] == "genai_evaluate"
    assert parent["params"]["a.b"] == "1"
    found = latest(server, run_id)
    assert (found["n"], found["success"], found["not_run"]) == (2, 1, 1)
    assert "total_tokens" not in found
    assert {run for _, run in server.links} == {run_id}
    assert len(server.links) == 2
    assert orjson.loads(server.artifacts["evaluation_results.json"])["data"]
    said = [one["feedback"]["value"] for one in server.assessments.values()]
    assert said == [True, False]  # As columns of scores on MLflow's page.


def test_a_verdict_that_comes_after_its_run_has_ended_counts() -> None:
    """As if the server was away when the agent ended."""
    server = FakeTransport()
    *run, verdict = child("a", 0.0)
    sink = deliver(server, start(), *run)
    sink.prepare([orjson.dumps(verdict)])
    sink.send(TIMEOUT_S)
    sink.prepare([orjson.dumps(end())])
    sink.send(TIMEOUT_S)
    run_id, _ = only_parent(server)
    assert (latest(server, run_id)["n"], latest(server, run_id)["success_rate"]) == (1, 0)
    [said] = server.assessments.values()
    assert said["feedback"]["value"] is False


def test_the_version_of_the_code_is_on_the_evaluations_run() -> None:
    """It is the run that people compare."""
    server = FakeTransport()
    deliver(server, start(), {**end(), "code": {"commit": "c0ffee", "dirty": True}})
    tags = only_parent(server)[1]["tags"]
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert tags["mlflow.source.type"] == "LOCAL"


def test_no_run_of_the_users_is_ever_merged() -> None:
    """Two of them had an evaluation with one key inside: what merging deletes is ours."""
    server = FakeTransport()
    for name in ("monday", "tuesday"):
        own = server.create_run(NewRun("7", name, 5), TIMEOUT_S)
        given = {"run_id": own.run_id}
        deliver(server, start(**given), *child(name, **given), end(**given))
    deliver(server, start(), *child("wednesday"), end())
    found = {run["name"]: latest(server, key)["n"] for key, run in parents(server).items()}
    assert found == {"monday": 1, "tuesday": 1, "sweep": 1}


def test_a_stop_reason_that_no_longer_counts_is_none() -> None:
    """The task was done again, and stopped for another reason."""
    server = FakeTransport()
    make, again = Records("trace-1"), Records("trace-2", START_NS + 3_000 * MS)
    tags = {"qitos.task_id": "a", "qitos.trial": "0"}
    stops = {}
    for at_ms, one, stop in ((0, make, "max_steps"), (9_000, again, "final")):
        settings = {"evaluation": IN, "tags": {**tags, "qitos.attempt": stop}}
        over = one.end(metadata={"stop_reason": stop}, settings=settings)
        deliver(server, start(at_ms), one.start(settings=settings), over, end(at_ms + 5_000))
        stops = {k: v for k, v in latest(server, only_parent(server)[0]).items() if "stop/" in k}
    assert stops == {"stop/max_steps": 0, "stop/final": 1}


def test_what_is_remembered_of_parents_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has a run, or an evaluation, around each request."""
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.EVERY_S", 0.0)
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.PAUSE", 0.0)
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.operations.FRESH_S", 0.0)
    server = FakeTransport()
    server.cost = 0.25
    server.fail = lambda call, what: Refused("NO", "no") if call == "end_run" else None
    sink = MlflowSink(b"{}", server)
    for number in range(20):
        own = server.create_run(NewRun("7", "request", 5), TIMEOUT_S)
        make = Records(f"trace-{number}")
        priced = make.span("generation", model="m", token_usage={"prompt_tokens": 10})
        records = [make.start(parent_run_id=own.run_id), priced, make.end()]
        records += child("a", id=str(number))
        sink.prepare([orjson.dumps(record) for record in records])
        sink.send(TIMEOUT_S)
    kept = {**vars(sink._operations), **vars(sink._operations.parents)}
    sizes = {name: len(value) for name, value in kept.items() if isinstance(value, dict)}
    assert max(sizes.values()) < 5, sizes


def test_a_child_that_comes_first_creates_the_evaluation() -> None:
    """As in another process; the evaluation's own records complete the same run."""
    server = FakeTransport()
    deliver(server, *child("a"), last=True)
    run_id, parent = only_parent(server)
    assert (parent["name"], latest(server, run_id)["n"]) == ("sweep", 1)
    deliver(server, start(), end())
    assert only_parent(server)[0] == run_id
    assert latest(server, run_id)["not_run"] == 2


def test_a_killed_evaluation_is_continued() -> None:
    """It ends as KILLED, and is the same run again in the process that resumes it."""
    server = FakeTransport()
    deliver(server, start(), *child("a"), last=True)
    run_id, parent = only_parent(server)
    assert parent["status"] == "KILLED"
    deliver(server, start(10_000), *child("b"))
    assert only_parent(server) == (run_id, parent)
    assert parent["status"] == "RUNNING"
    deliver(server, end(20_000))
    assert parent["status"] == "FINISHED"
    assert latest(server, run_id)["n"] == 2


def test_records_of_a_dead_process_do_not_end_what_goes_on() -> None:
    """They come late: another process has resumed the evaluation meanwhile."""
    server = FakeTransport()
    deliver(server, start(10_000))
    deliver(server, start(), *child("a"), last=True)
    assert only_parent(server)[1]["status"] == "RUNNING"


def test_late_duplicates_are_merged_into_the_oldest() -> None:
    """Of two processes that each created a run, as both could not reach the server before."""
    server = FakeTransport()
    deliver(server, *child("a"))
    run_id = next(iter(parents(server)))
    tags = [("qitos.evaluation", "E")]
    older = server.create_run(NewRun("7", "sweep", 5, tags), TIMEOUT_S)
    deliver(server, start(), *child("b"), end())
    assert run_id not in server.runs
    assert only_parent(server)[0] == older.run_id
    assert latest(server, older.run_id)["n"] == 2


def test_duplicates_that_may_not_be_deleted_lose_their_children(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With MLflow's permission EDIT, for one: nothing that comes is refused for that."""
    server = FakeTransport()
    server.fail = lambda call, what: Refused("DENIED", "no") if call == "delete_run" else None
    deliver(server, *child("a"))
    [late] = parents(server)
    older = server.create_run(NewRun("7", "sweep", 5, [("qitos.evaluation", "E")]), TIMEOUT_S)
    deliver(server, start(), *child("b"), end())
    assert set(parents(server)) == {late, older.run_id}
    assert latest(server, older.run_id)["n"] == 2
    assert f"run {late} is another one" in caplog.text


def test_a_child_of_a_run_that_was_merged_away_is_adopted() -> None:
    """The process that created the run learns of it later."""
    server = FakeTransport()
    sink = deliver(server, *child("a"))
    deleted = next(iter(parents(server)))
    kept = server.create_run(NewRun("7", "sweep", 5, [("qitos.evaluation", "E")]), TIMEOUT_S)
    server.delete_run(deleted, TIMEOUT_S)
    sink.prepare([orjson.dumps(record) for record in child("b")])  # It still believes in its own.
    assert sink.send(TIMEOUT_S) == []
    assert sink.abandoned(START_NS)
    assert sink.send(TIMEOUT_S) == []
    assert only_parent(server)[0] == kept.run_id
    assert latest(server, kept.run_id)["n"] == 2


def test_numbers_are_as_old_as_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not older: a process that looked before the last child came would have the last word."""
    server, log_batch, adopted_ms = FakeTransport(), FakeTransport.log_batch, 0

    def slow(self: FakeTransport, run_id: str, data: RunData, timeout_s: float) -> None:
        nonlocal adopted_ms
        log_batch(self, run_id, data, timeout_s)
        if data.tags == [(PARENT, kept.run_id)]:
            adopted_ms = time.time_ns() // MS
            while time.time_ns() // MS == adopted_ms:
                pass

    sink = deliver(server, *child("a"))
    deleted = next(iter(parents(server)))
    kept = server.create_run(NewRun("7", "sweep", 5, [("qitos.evaluation", "E")]), TIMEOUT_S)
    server.delete_run(deleted, TIMEOUT_S)
    monkeypatch.setattr(FakeTransport, "log_batch", slow)
    sink.prepare([orjson.dumps(record) for record in child("b")])
    assert sink.send(TIMEOUT_S) == []
    assert sink.abandoned(START_NS)
    assert sink.send(TIMEOUT_S) == []
    points = server.runs[kept.run_id]["metrics"]
    assert 0 < adopted_ms < min(point.timestamp_ms for point in points)


def test_the_last_look_counts_whatever_the_clocks_say() -> None:
    """The clock of the process that looked before is an hour ahead."""
    server = FakeTransport()
    deliver(server, start(), *child("a"))
    run_id, _ = only_parent(server)
    ahead = Metric("eval/n", 1.0, time.time_ns() // MS + 3_600_000, 0)
    server.log_batch(run_id, RunData(metrics=[ahead]), TIMEOUT_S)
    deliver(server, *child("b"), end())
    assert latest(server, run_id)["n"] == 2


def test_a_runner_that_resumes_finds_the_last_evaluation_by_its_output() -> None:
    """A new id each time; without resuming it is a new evaluation."""
    server = FakeTransport()
    deliver(server, start(id="1", output="out"), *child("a", id="1", output="out"), last=True)
    first, _ = only_parent(server)
    again = {"id": "2", "output": "out", "resumes": True}
    deliver(server, start(10_000, **again), *child("b", **again), end(20_000, **again))
    assert only_parent(server)[0] == first
    assert latest(server, first)["n"] == 2
    for number in range(3, 15):  # More than one answer of the server holds.
        at_ms = number * 10_000
        deliver(server, start(at_ms, id=str(number), output="out"), end(at_ms, id=str(number)))
    assert len(parents(server)) == 13
    last = max(parents(server), key=lambda run_id: server.runs[run_id]["start_ms"])
    deliver(server, start(200_000, id="20", output="out", resumes=True))
    assert len(parents(server)) == 13
    assert server.runs[last]["status"] == "RUNNING"


def test_an_evaluation_in_a_run_of_the_users() -> None:
    """It is that run, which its user ends."""
    server = FakeTransport()
    own = server.create_run(NewRun("8", "mine", 5), TIMEOUT_S)
    given = {"run_id": own.run_id}
    deliver(server, start(**given), *child("a", **given), end(**given))
    run_id, parent = only_parent(server)
    assert (run_id, parent["status"], parent["name"]) == (own.run_id, "RUNNING", "mine")
    assert {run["experiment_id"] for run in server.runs.values()} == {"8"}
    assert latest(server, run_id)["n"] == 1


def test_a_run_of_the_users_has_the_numbers_of_agents_in_it() -> None:
    """And nothing else of it changes."""
    server = FakeTransport()
    own = server.create_run(NewRun("7", "mine", 5, [("x", "y")]), TIMEOUT_S)
    server.log_batch(own.run_id, RunData(metrics=[Metric("n", 7.0, 1, 0)]), TIMEOUT_S)
    make = Records()
    deliver(server, make.start(parent_run_id=own.run_id), make.end(metadata={"success": True}))
    found = latest(server, own.run_id)
    assert found["success_rate"] == 1.0
    assert server.values(own.run_id)["n"] == [7.0]
    assert server.runs[own.run_id]["tags"] == {"x": "y"}
    assert server.runs[own.run_id]["status"] == "RUNNING"


def test_numbers_are_read_again_at_most_every_ten_seconds() -> None:
    """And at the end, so that none is missing."""
    server = FakeTransport()
    sink = deliver(server, start(), *child("a"))
    before = server.calls.count("search_runs")
    for task in "bcd":
        sink.prepare([orjson.dumps(record) for record in child(task)])
        sink.send(TIMEOUT_S)
    run_id, _ = only_parent(server)
    assert latest(server, run_id)["n"] == 1
    assert server.calls.count("search_runs") == before
    sink.prepare([orjson.dumps(end())])
    sink.send(TIMEOUT_S)
    assert latest(server, run_id)["n"] == 4


def test_more_children_than_one_answer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them count, and what was read is not read again after a failure."""
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.PAGE", 2)
    server = FakeTransport()
    records = [record for task in "abcdefg" for record in child(task)]
    sink = deliver(server, start(), *records)
    run_id, _ = only_parent(server)
    assert latest(server, run_id)["n"] == 7
    sink.prepare([orjson.dumps(end())])
    pages = []

    def fail_once(call: str, what: Any) -> Exception | None:
        pages.append(call == "search_runs" and PARENT in what)
        return RetryLater("away") if pages.count(True) == 3 and pages[-1] else None

    server.fail = fail_once
    with pytest.raises(RetryLater):
        sink.send(TIMEOUT_S)
    sink.send(TIMEOUT_S)
    assert pages.count(True) == 5  # Four pages, one of them twice.
    assert only_parent(server)[1]["status"] == "FINISHED"


def test_a_look_that_takes_long_goes_on_while_children_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a large evaluation would have no numbers before its end."""
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.PAGE", 2)
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.EVERY_S", 0.0)
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.PAUSE", 0.0)
    server, pages = FakeTransport(), []

    def only_one_page(call: str, what: Any) -> Exception | None:
        pages.append(call == "search_runs" and PARENT in what)
        return RetryLater("slow") if pages[-1] and pages.count(True) % 2 == 0 else None

    sink = deliver(server, start(), *[record for task in "abcdef" for record in child(task)])
    server.fail = only_one_page
    for task in "ghijklmn":
        sink.prepare([orjson.dumps(record) for record in child(task)])
        sink.send(TIMEOUT_S)
    run_id, _ = only_parent(server)
    assert latest(server, run_id)["n"] > 6
    server.fail = lambda call, what: None
    sink.prepare([orjson.dumps(end())])
    sink.send(TIMEOUT_S)
    assert latest(server, run_id)["n"] == 14


def test_a_tree_of_mlflows_own_is_shown_with_the_evaluation() -> None:
    """As for an agent inside of a span of MLflow's."""
    server = FakeTransport()
    records = child("a")
    for record in records:
        if "settings" in record:
            record["settings"]["tags"]["qitos.mlflow_trace_id"] = "tr-1"
            record["settings"]["log_traces"] = False
    deliver(server, start(), *records, end())
    assert ("tr-1", only_parent(server)[0]) in server.links


def test_numbers_that_the_server_refuses_keep_nothing_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The runs are logged, and one line says why there are no numbers."""
    server = FakeTransport()
    server.fail = lambda call, what: (
        Refused("PERMISSION_DENIED", "no") if call == "search_runs" and PARENT in what else None
    )
    deliver(server, start(), *child("a"), end())
    assert only_parent(server)[1]["status"] == "FINISHED"
    assert "does not get the numbers" in caplog.text


def test_what_is_due_survives_the_process() -> None:
    """Another process writes the numbers that the dead one has not written."""
    server = FakeTransport()
    sink = deliver(server, start(), *child("a"))
    sink.prepare([orjson.dumps(record) for record in child("b")])
    sink.send(TIMEOUT_S)
    other = MlflowSink(b"{}", server)
    other.restore(sink.state())
    assert other.abandoned(START_NS + 9_000 * MS)
    other.send(TIMEOUT_S)
    run_id, parent = only_parent(server)
    assert (latest(server, run_id)["n"], parent["status"]) == (2, "KILLED")


def test_a_second_delivery_changes_nothing() -> None:
    """After a crash before the acknowledgement the same records come again."""
    server = FakeTransport()
    records = [start(), *child("a"), *child("b", 0.0), end()]
    deliver(server, *records)
    run_id, parent = only_parent(server)
    before = latest(server, run_id), dict(parent["tags"]), parent["status"]
    sink = MlflowSink(b"{}", server, resumed=True)
    sink.prepare([orjson.dumps(record) for record in records])
    assert sink.send(TIMEOUT_S) == []
    assert (latest(server, run_id), parent["tags"], parent["status"]) == before
    assert len(server.runs) == 3


def test_a_task_without_an_agent_has_a_run_of_its_own() -> None:
    """Its verdict is all there is of it."""
    server = FakeTransport()
    settings = {"evaluation": IN, "log_traces": False, "tags": {"qitos.task_id": "a"}}
    whole = {"kind": "evaluation_result", "trace_id": "task 1", "name": "a", "whole": True}
    whole |= {"start_ns": START_NS, "time_ns": START_NS + MS, "status": "FINISHED"}
    whole |= {"settings": settings, "added": {"metrics": {"verdict/success": 1.0}}}
    deliver(server, start(), whole, end())
    run_id, _ = only_parent(server)
    [run] = [run for run in server.runs.values() if PARENT in run["tags"]]
    assert (run["name"], run["status"], run["tags"]["qitos.task_id"]) == ("a", "FINISHED", "a")
    assert latest(server, run_id)["success_rate"] == 1.0
    assert server.spans == {}


def test_what_a_run_cost_is_a_number_of_it() -> None:
    """And so of its parent. Without a price there is none."""
    server = FakeTransport()
    server.cost = 0.25  # For input and output each.
    [begun, _, over, judged], make = child("a"), Records("trace-a")
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    deliver(server, start(), begun, make.span("generation", model="m", token_usage=usage), over)
    deliver(server, judged, end())
    run_id, _ = only_parent(server)
    [own] = [key for key, run in server.runs.items() if PARENT in run["tags"]]
    assert server.values(own)["total_cost"] == [0.5]
    assert latest(server, run_id)["cost_total"] == 0.5


def test_a_dataset_is_an_input_of_the_run() -> None:
    """Name and digest, as MLflow's evaluation page shows them."""
    server = FakeTransport()
    dataset = {"name": "gaia", "digest": "ab12", "source_type": "code", "source": "{}"}
    deliver(server, {**start(), "dataset": dataset}, end())
    assert only_parent(server)[1]["dataset"] == dataset
