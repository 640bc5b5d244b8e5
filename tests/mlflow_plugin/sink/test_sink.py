"""Records to calls: which, in what order, and what a refusal or a crash costs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow import _guard
from qitos_mlflow.delivery import DeadLetter, RetryLater
from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunRef
from qitos_mlflow.mlflow_plugin.mapping.span_tree import MAX_PRICED
from qitos_mlflow.mlflow_plugin.server.mlflow_client import StoreTransport
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused
from qitos_mlflow.mlflow_plugin.sink import call_list
from qitos_mlflow.mlflow_plugin.sink import costs as costs_module
from qitos_mlflow.mlflow_plugin.sink.costs import PAUSE_S, TRIES
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink, open_transport
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState
from tests.fakes.clock import Clock
from tests.fakes.transport import FakeTransport
from tests.integration.made_store import make_store
from tests.mlflow_plugin.records import Records

TIMEOUT_S = 10.0
SETTINGS = {"experiment_name": "qitos", "tags": {"env": "dev"}, "plugin_version": "1.2.3"}


def header(**fields: Any) -> bytes:
    """A segment's header."""
    return orjson.dumps(fields)


def sink_to(server: FakeTransport, **more: Any) -> MlflowSink:
    """A sink that delivers there."""
    ours = {key: more.pop(key) for key in ("announce", "resumed") if key in more}
    return MlflowSink(header(**{**SETTINGS, **more}), server, **ours)


def lines(*records: dict[str, Any]) -> list[bytes]:
    """Records as the spool has them."""
    return [orjson.dumps(record) for record in records]


def deliver(sink: MlflowSink, *records: dict[str, Any]) -> list[DeadLetter]:
    """Deliver records in one batch; returns the dead letters."""
    sink.prepare(lines(*records))
    return sink.send(TIMEOUT_S)


def a_trace(trace_id: str = "trace-1", spans: int = 3) -> list[dict[str, Any]]:
    """Every record of a trace with so many steps."""
    make = Records(trace_id)
    steps = [make.span("step", step=number, step_number=number) for number in range(spans)]
    start = make.start(trace_id, metadata={"seed": 7})
    return [start, *steps, make.end(recorded=spans)]


@pytest.fixture
def server() -> FakeTransport:
    return FakeTransport()


# -- the calls of a trace --------------------------------------------------------------------


def test_a_trace_in_one_batch(server: FakeTransport) -> None:
    """Run first, then its numbers, then the tree, and its end last: complete when it ends."""
    assert deliver(sink_to(server), *a_trace()) == []
    assert server.calls == [
        *("experiment_id", "create_run", "log_batch", "write_spans", "write_trace", "end_run"),
    ]
    run = server.runs["run-0"]
    assert (run["name"], run["status"]) == ("trace-1", "FINISHED")
    assert run["params"] == {"seed": "7", "qitos_mlflow_version": "1.2.3"}
    wanted = {"env": "dev", "qitos.trace_id": "trace-1", "mlflow.source.type": "LOCAL"}
    assert {key: run["tags"].get(key) for key in wanted} == wanted
    assert (run["tags"]["qitos.spans.recorded"], run["tags"]["qitos.spans.delivered"]) == ("3", "3")
    assert server.values()["step/number"] == [0, 1, 2]


def test_runs_are_created_and_announced_before_anything_else(server: FakeTransport) -> None:
    """An agent may be waiting for its run: all runs of a batch come before all else."""
    announced: list[tuple[str, str]] = []
    sink = sink_to(server, announce=lambda trace_id, ref: announced.append((trace_id, ref.run_id)))
    deliver(sink, *a_trace("one")[:-1], *a_trace("two")[:-1])
    assert server.calls[:3] == ["experiment_id", "create_run", "create_run"]
    assert announced == [("one", "run-0"), ("two", "run-1")]


def test_the_run_has_the_name_it_was_given(server: FakeTransport) -> None:
    """A configured name goes before the trace's."""
    deliver(sink_to(server, run_name="gaia-eval-001"), *a_trace())
    assert server.runs["run-0"]["name"] == "gaia-eval-001"


@pytest.mark.parametrize(("run_name", "wanted"), [(None, "by-tag"), ("gaia", "gaia")])
def test_a_run_may_be_named_by_mlflows_tag(
    server: FakeTransport, run_name: str | None, wanted: str, tmp_path: Path
) -> None:
    """It goes before the trace's name; as a tag of a new run MLflow would refuse it."""
    settings = {"run_name": run_name, "tags": {"mlflow.runName": "by-tag", "env": "dev"}}
    deliver(sink_to(server, **settings), *a_trace())
    run = server.runs["run-0"]
    assert (run["name"], run["tags"]["env"]) == (wanted, "dev")
    assert "mlflow.runName" not in run["tags"]
    make_store(tmp_path / "runs.db")
    store = open_transport(f"sqlite:///{tmp_path}/runs.db")
    assert deliver(MlflowSink(header(**{**SETTINGS, **settings}), store), *a_trace()) == []


def test_a_run_to_be_left_open_is_not_ended(server: FakeTransport) -> None:
    """With `auto_end_run` off only the death of its process ends a run."""
    sink = sink_to(server, auto_end_run=False)
    deliver(sink, *a_trace("left"), *a_trace("going")[:-1])
    assert "end_run" not in server.calls
    assert sink.abandoned(0)
    sink.send(TIMEOUT_S)
    assert [run["status"] for run in server.runs.values()] == ["RUNNING", "KILLED"]
    assert server.runs["run-1"]["tags"]["qitos.killed"]


@pytest.mark.parametrize(
    ("metadata", "status"),
    [({"status": "interrupted"}, "RUNNING"), ({"qitos.closed": "the process ended"}, "KILLED")],
)
def test_a_run_to_be_left_open_of_an_agent_that_was_interrupted(
    server: FakeTransport, metadata: dict[str, Any], status: str
) -> None:
    """It stays open like any other, for the caller to go on in; the end of the process ends it."""
    *others, end = a_trace()
    sink = sink_to(server, auto_end_run=False)
    deliver(sink, *others, {**end, "status": "KILLED", "metadata": metadata})
    assert server.runs["run-0"]["status"] == status


def test_an_end_that_was_lost(server: FakeTransport) -> None:
    """A process that closes in order leaves no run RUNNING, unless it is to be left open."""
    for auto_end_run, status in ((True, "KILLED"), (False, "RUNNING")):
        sink = sink_to(server, auto_end_run=auto_end_run)
        deliver(sink, *a_trace(f"lost {auto_end_run}")[:-1])
        if sink.abandoned(0, closed=True):
            sink.send(TIMEOUT_S)
        assert [run["status"] for run in server.runs.values()][-1] == status
    assert server.runs["run-0"]["tags"]["qitos.killed"] == "its end was lost"


def test_without_traces_there_are_runs_only(server: FakeTransport) -> None:
    """With `log_traces` off no span and no trace is sent."""
    deliver(sink_to(server, log_traces=False), *a_trace())
    assert not {"write_spans", "write_trace"} & set(server.calls)
    assert server.values()["total_steps"] == [3]


def test_files_go_with_their_run(server: FakeTransport) -> None:
    """An artifact's content is written below its path."""
    start, *rest = a_trace()
    contents = {"final_answer.txt": "42", "final_answer.json": {"sum": [4, None, "é"]}}
    files = [
        {"kind": "artifact", "trace_id": "trace-1", "path": path, "content": content}
        for path, content in contents.items()
    ]
    deliver(sink_to(server), start, *files, *rest)
    assert server.artifacts["final_answer.txt"] == b"42"
    assert orjson.loads(server.artifacts["final_answer.json"]) == contents["final_answer.json"]


def test_the_processs_end(server: FakeTransport) -> None:
    """Traces whose process died are ended as KILLED with the totals so far; ended ones are not."""
    sink = sink_to(server)
    assert not sink.abandoned(0)
    deliver(sink, *a_trace("ended"), *a_trace("going")[:-1])
    assert sink.abandoned(1_900_000_000_000_000_000)
    sink.send(TIMEOUT_S)
    assert [run["status"] for run in server.runs.values()] == ["FINISHED", "KILLED"]
    assert server.values("run-1")["total_steps"] == [3]
    assert not sink.abandoned(0)


# -- crashes ---------------------------------------------------------------------------------


@given(cuts=st.sets(st.integers(1, 9)), replay=st.booleans())
def test_wherever_delivery_is_interrupted_the_run_is_the_same(cuts: set[int], replay: bool) -> None:
    """Taken up by another process at any point, sent twice or not, a run comes to the same."""
    records = [*a_trace("one", 3)[:-1], *a_trace("two", 2), a_trace("one", 3)[-1]]
    straight, server = FakeTransport(), FakeTransport()
    deliver(sink_to(straight), *records)
    state = b""
    edges = [0, *sorted(cuts), len(records)]
    for begin, end in pairwise(edges):
        for again in range(1 + replay):  # A crash after sending, before the acknowledgement.
            sink = sink_to(server, resumed=begin + again > 0)
            if state:
                sink.restore(state)
            assert deliver(sink, *records[begin:end]) == []
        state = sink.state()
    assert len(server.runs) == 2
    for run_id, run in straight.runs.items():
        assert server.runs[run_id] == run
    assert server.spans.keys() == straight.spans.keys()
    assert server.traces == straight.traces


def test_a_run_whose_creation_went_unanswered_is_found_again(server: FakeTransport) -> None:
    """An answer that was lost on the way makes no second run, and no call is made twice."""
    server.fail_after = lambda call, _: RetryLater("cut") if call == "create_run" else None
    sink = sink_to(server)
    sink.prepare(lines(*a_trace()))
    with pytest.raises(RetryLater):
        sink.send(TIMEOUT_S)
    server.fail_after = lambda call, _: None
    assert sink.send(TIMEOUT_S) == []
    assert list(server.runs) == ["run-0"]
    assert server.calls.count("create_run") == server.calls.count("find_runs") == 1
    assert server.calls.count("log_batch") == server.calls.count("end_run") == 1


def test_a_run_whose_creation_comes_through_late_is_deleted(server: FakeTransport) -> None:
    """A database that is locked for longer than a request lasts makes no stray run."""
    server.fail = lambda call, _: RetryLater("timeout") if call == "create_run" else None
    start, *rest = a_trace()
    sink = sink_to(server)
    sink.prepare(lines(start))
    with pytest.raises(RetryLater):
        sink.send(TIMEOUT_S)
    server.fail = lambda call, _: None
    assert sink.send(TIMEOUT_S) == []
    server.create_run(NewRun("7", "late", 0, [("qitos.trace_id", "trace-1")]), TIMEOUT_S)
    assert len(server.runs) == 2
    assert deliver(sink, *rest) == []
    assert list(server.runs) == ["run-0"]


def test_a_late_twin_of_a_process_that_died_is_deleted(server: FakeTransport) -> None:
    """The process that resumes does not know of attempts that may still come through."""
    records = a_trace()
    sink = sink_to(server, resumed=True)
    deliver(sink, *records[:2])
    server.create_run(NewRun("7", "late", 0, [("qitos.trace_id", "trace-1")]), TIMEOUT_S)
    assert deliver(sink, *records[2:]) == []
    assert list(server.runs) == ["run-0"]


def test_out_of_time_it_goes_on_where_it_stopped(server: FakeTransport) -> None:
    """A batch that ran out of time has lost nothing."""
    sink = sink_to(server)
    sink.prepare(lines(*a_trace()))
    with pytest.raises(RetryLater):
        sink.send(0)
    assert server.calls == []
    assert sink.send(TIMEOUT_S) == []
    assert server.runs["run-0"]["status"] == "FINISHED"


def test_the_state_of_another_version(
    server: FakeTransport, swallowed: list[tuple[str, BaseException]]
) -> None:
    """A state that cannot be read costs the totals so far, not the run."""
    records = a_trace()
    deliver(sink_to(server), *records[:2])
    sink = sink_to(server)
    sink.restore(b'{"from": "the future"}')
    deliver(sink, *records[2:])
    assert list(server.runs) == ["run-0"]
    assert server.values()["step/number"] == [0, 1, 2]
    assert len(swallowed) == 1
    swallowed.clear()


def test_spans_after_the_end_of_their_trace(server: FakeTransport) -> None:
    """A late span joins its run; one whose run there is not is kept aside."""
    sink = sink_to(server)
    deliver(sink, *a_trace())
    late = Records().span("generation", step=9, token_usage={"prompt_tokens": 5})
    late |= {"span_id": "late", "late": 1}
    assert deliver(sink, late) == []
    assert server.values()["generation/prompt_tokens"] == [5]
    assert server.runs["run-0"]["status"] == "FINISHED"
    assert server.runs["run-0"]["tags"]["qitos.spans.late"] == "1"
    assert server.runs["run-0"]["tags"]["qitos.spans.delivered"] == "3"
    before = len(server.calls)
    (letter,) = deliver(sink, {**late, "trace_id": "unknown"})
    assert "NO_RUN" in letter.reason
    assert server.calls[before:] == ["find_runs"]


def test_traces_of_different_settings_go_through_one_sink(server: FakeTransport) -> None:
    """Each trace's start brings its settings; without them, as in old spools, the header's hold."""
    server.experiment_id = lambda name, timeout_s: (  # type: ignore[method-assign]
        server._answer("experiment_id", name, lambda: f"id of {name}")
    )
    sink = sink_to(server)
    own = {
        "experiment_name": "evals",
        "run_name": "gaia",
        "tags": {"team": "blue"},
        "auto_end_run": False,
        "log_traces": False,
        "user": "ada",
        "source": "eval.py",
        "plugin_version": "2.0",
    }
    for trace_id, settings in (("old", None), ("new", own), ("newer", own)):
        start, *rest = a_trace(trace_id)
        assert deliver(sink, {**start, "settings": settings} if settings else start) == []
        again = sink_to(server)  # Its settings are part of the state.
        again.restore(sink.state())
        assert deliver(again, *rest) == []
    old, new, _ = server.runs.values()
    assert (old["name"], old["status"]) == ("old", "FINISHED")
    assert (new["name"], new["status"]) == ("gaia", "RUNNING")
    assert (old["tags"]["env"], new["tags"]["team"]) == ("dev", "blue")
    assert "env" not in new["tags"]
    assert (new["tags"]["mlflow.user"], new["tags"]["mlflow.source.name"]) == ("ada", "eval.py")
    assert new["params"]["qitos_mlflow_version"] == "2.0"
    assert len(server.traces) == 1
    assert server.calls.count("experiment_id") == 2


def test_a_trace_without_its_start_and_its_settings(server: FakeTransport) -> None:
    """With a header that only says where, it is logged to the experiment `qitos`, and says so."""
    asked: list[str] = []
    server.fail = lambda call, what: asked.append(what) if call == "experiment_id" else None
    assert deliver(MlflowSink(header(tracking_uri=None, cwd="/"), server), *a_trace()[1:]) == []
    assert asked == ["qitos"]
    (run,) = server.runs.values()
    assert (run["tags"]["qitos.start_lost"], run["status"]) == ("true", "FINISHED")


def test_open_traces_at_the_end_of_their_process(server: FakeTransport) -> None:
    """Of traces that end with their process, those stay open that their settings leave open."""
    sink = sink_to(server)
    for trace_id, ends in (("ends", True), ("stays", False)):
        start = a_trace(trace_id)[0]
        deliver(sink, {**start, "settings": {**SETTINGS, "auto_end_run": ends}})
    assert sink.abandoned(0, closed=True)
    sink.send(TIMEOUT_S)
    assert [run["status"] for run in server.runs.values()] == ["KILLED", "RUNNING"]


# -- feedback --------------------------------------------------------------------------------


def verdicts(make: Records, count: int) -> list[dict[str, Any]]:
    """Critics' spans with much to say."""
    said = {"action": "go on", "reason": "r" * 5_000}
    return [
        make.span("critic", critic_name="c", score=0.5, output_content=said) for _ in range(count)
    ]


def test_no_feedback_is_lost_and_little_is_remembered(server: FakeTransport) -> None:
    """However many verdicts, each is sent; what the spool keeps of them is bounded."""
    sent: dict[str, Any] = {}

    answers = cycle([None, None, Poisoned("HTTP 500")])

    def receive(call: str, info: Any) -> Exception | None:
        if call != "write_trace":
            return None
        if failure := next(answers):
            return failure
        sent.update({one["assessment_id"]: one for one in info.get("assessments", [])})
        return None

    server.fail = receive
    make = Records()
    sink = sink_to(server)
    deliver(sink, make.start())
    sizes = []
    for _ in range(20):
        sink.prepare(lines(*verdicts(make, 10)))
        for _ in range(10):
            try:
                assert sink.send(TIMEOUT_S) == []
            except RetryLater:
                continue
            break
        sizes.append(len(sink.state()))
    assert max(sizes) < 150_000
    answers = cycle([None])
    assert deliver(sink, make.end()) == []
    assert len(sent) == 200


def test_feedback_that_is_refused_is_kept_aside(server: FakeTransport) -> None:
    """Verdicts that no later info repeats are not lost without a word."""
    make = Records()
    sink = sink_to(server)
    deliver(sink, make.start())
    server.fail = lambda call, _: Refused("BAD", "no") if call == "write_trace" else None
    assert deliver(sink, *verdicts(make, 2)) == []
    (letter,) = deliver(sink, *verdicts(make, 20))
    assert len(orjson.loads(letter.record)["item"]["assessments"]) == 22
    server.fail = lambda call, _: None
    assert deliver(sink, make.end()) == []


def test_an_info_that_failed_is_sent_again(server: FakeTransport) -> None:
    """If the info of a running trace is refused, another one follows some seconds later."""
    make = Records()
    sink = sink_to(server)
    server.fail = lambda call, _: Poisoned("HTTP 500") if call == "write_trace" else None
    deliver(sink, make.start())
    server.fail = lambda call, _: None
    late = make.span("step", step_number=1)
    late["end_ns"] += 6_000_000_000
    deliver(sink, late)
    assert len(server.traces) == 1


# -- another destination ---------------------------------------------------------------------


def test_the_rest_goes_to_another_server(server: FakeTransport) -> None:
    """What was begun on one server is finished on another, and says that part of it is there."""
    sink = sink_to(server)
    records = a_trace(spans=6)
    assert deliver(sink, *records[:4]) == []
    assert b"password" not in sink.state()
    other = FakeTransport("other.test")
    moved = sink_to(other, resumed=True)
    moved.restore(sink.state())
    assert deliver(moved, *records[4:6]) == []
    again = sink_to(other, resumed=True)
    again.restore(moved.state())
    assert deliver(again, *records[6:]) == []
    (run,) = other.runs.values()
    assert run["status"] == "FINISHED"
    tags = run["tags"]
    assert tags["qitos.partial"] == "begun on http://fake.test"
    assert (tags["env"], tags["qitos.trace_id"]) == ("dev", "trace-1")
    assert run["params"] == {"qitos_mlflow_version": "1.2.3"}
    assert other.values("other.test-0")["total_steps"] == [6]
    assert other.values("other.test-0")["step/number"] == [3, 4, 5]
    assert (tags["qitos.spans.recorded"], tags["qitos.spans.delivered"]) == ("6", "3")
    assert tags["qitos.spans.dropped"] == "elsewhere=3"
    (info,) = other.traces.values()
    assert info["trace_metadata"]["mlflow.sourceRun"] == "other.test-0"
    assert len(other.spans) == 3 + 1  # With the root.


def test_another_server_without_traces(server: FakeTransport) -> None:
    """Each span that is not there is counted once, by one reason."""
    sink = sink_to(server)
    records = a_trace(spans=3)
    deliver(sink, *records[:2])
    other = FakeTransport("other.test")
    other.fail = lambda call, _: Refused("NOT_IMPLEMENTED", "") if call == "write_spans" else None
    moved = sink_to(other)
    moved.restore(sink.state())
    assert deliver(moved, *records[2:]) == []
    (run,) = other.runs.values()
    assert run["tags"]["qitos.spans.dropped"] == "elsewhere=1, no_traces=2"


def test_the_same_server_by_another_name(server: FakeTransport) -> None:
    """Where the run is found, nothing is elsewhere and no second run is made."""
    sink = sink_to(server)
    records = a_trace()
    deliver(sink, *records[:3])
    server.uri = "http://alias.test"
    again = sink_to(server, resumed=True)
    again.restore(sink.state())
    assert deliver(again, *records[3:]) == []
    (run,) = server.runs.values()
    assert run["status"] == "FINISHED"
    assert not {"qitos.partial", "qitos.spans.dropped"} & run["tags"].keys()
    assert run["params"] == {"seed": "7", "qitos_mlflow_version": "1.2.3"}


# -- cost ------------------------------------------------------------------------------------


def a_priced_trace(trace_id: str) -> list[dict[str, Any]]:
    """A trace with a generation that has a price."""
    make = Records(trace_id)
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    return [make.start(), make.span("generation", model="m", token_usage=usage), make.end()]


@pytest.mark.parametrize("failure", [RetryLater("HTTP 503"), Poisoned("HTTP 500")])
def test_a_cost_that_the_server_does_not_say_holds_nothing_back(
    server: FakeTransport,
    failure: Exception,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a few failures traces go without a cost for a while, with one warning."""
    clock = Clock()
    monkeypatch.setattr(costs_module, "time", clock)
    server.fail = lambda call, _: failure if call == "sum_spans" else None
    sink = sink_to(server)
    sink.prepare(lines(*a_priced_trace("one")))
    with caplog.at_level(logging.WARNING):
        for _ in range(TRIES - 1):
            with pytest.raises(RetryLater):
                sink.send(TIMEOUT_S)
        assert sink.send(TIMEOUT_S) == []
        assert deliver(sink, *a_priced_trace("two")) == []
        assert server.calls.count("sum_spans") == TRIES
        clock.now += PAUSE_S
        assert deliver(sink, *a_priced_trace("three")) == []
    assert server.calls.count("sum_spans") == TRIES + 1
    assert {run["status"] for run in server.runs.values()} == {"FINISHED"}
    assert caplog.text.count("have no cost") == 1
    assert "password" not in caplog.text
    server.fail = lambda call, _: None
    server.cost = 0.5
    clock.now += PAUSE_S
    deliver(sink, *a_priced_trace("four"))
    costs = [info["trace_metadata"].get("mlflow.trace.cost") for info in server.traces.values()]
    assert costs[:3] == [None] * 3
    assert orjson.loads(costs[3])["total_cost"] == 1.0


@pytest.mark.parametrize(("names", "cost"), [(MAX_PRICED, 1.0 * MAX_PRICED), (99, None)])
def test_the_cost_is_that_of_our_generations(
    server: FakeTransport, names: int, cost: float | None
) -> None:
    """Each name is asked for; of more than that nothing is said rather than what others spent."""
    server.cost = 0.5
    make = Records()
    usage = {"prompt_tokens": 5}
    spans = [make.span("generation", model=f"m{n}", token_usage=usage) for n in range(names)]
    assert deliver(sink_to(server), make.start(), *spans, make.end()) == []
    (info,) = server.traces.values()
    cost_of = orjson.loads(info["trace_metadata"].get("mlflow.trace.cost", "{}"))
    assert cost_of.get("total_cost") == cost


class Priced(FakeTransport):
    """A server with prices, in USD for a token of input and for one of output."""

    prices = (0.25, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, tuple[int, int]] = {}
        """Tokens of input and output of each trace."""

    def sum_spans(self, question: Any, timeout_s: float) -> float | None:
        (given, answered), (of_given, of_answered) = self.used[tag_in(question)], self.prices
        parts = [given * of_given, answered * of_answered]
        both = {"input_cost": parts[0], "output_cost": parts[1], "total_cost": sum(parts)}
        return self._answer("sum_spans", question, lambda: both[question["metric_name"]])

    def use(self, trace_id: str, given: int, answered: int, **more: int) -> list[dict[str, Any]]:
        """The records of a trace that uses so many tokens."""
        self.used[trace_id] = given, answered
        make, usage = Records(trace_id), {"prompt_tokens": given, "completion_tokens": answered}
        asked = make.span("generation", model="m", token_usage={**usage, **more})
        return [make.start(), asked, make.end()]

    def cost_of(self, trace_id: str) -> Any:
        """What the trace's info says, and what its run says."""
        of = {info["client_request_id"]: info for info in self.traces.values()}
        [run] = [r for r in self.runs.values() if r["tags"]["qitos.trace_id"] == trace_id]
        [in_run] = [point.value for point in run["metrics"] if point.key == "total_cost"]
        return {**orjson.loads(of[trace_id]["trace_metadata"]["mlflow.trace.cost"]), "run": in_run}


def tag_in(question: Any) -> str:
    """The QitOS trace that a question is about."""
    return str(question["filters"][0].split("'")[1])


def test_a_cost_takes_one_question_once_the_price_is_known() -> None:
    """If the sum is what the price of the trace before comes to, its parts are known, too."""
    server = Priced()
    sink = sink_to(server)
    deliver(sink, *server.use("one", 100, 10))
    assert server.calls.count("sum_spans") == 2
    deliver(sink, *server.use("two", 7, 3), *server.use("three", 1000, 77))
    assert server.calls.count("sum_spans") == 4
    server.prices = (0.5, 1.5)  # Prices change; so does what is known of them.
    deliver(sink, *server.use("four", 8, 2), *server.use("five", 9, 1))
    assert server.calls.count("sum_spans") == 4 + 3 + 1
    # Cached tokens have a price of their own.
    deliver(sink, *server.use("six", 8, 2, cache_read_input_tokens=4))
    assert server.calls.count("sum_spans") == 8 + 2
    for trace_id, asked, answered in [
        ("one", 25.0, 5.0),
        ("two", 1.75, 1.5),
        ("three", 250.0, 38.5),
        ("four", 4.0, 3.0),
        ("five", 4.5, 1.5),
        ("six", 4.0, 3.0),
    ]:
        parts = {"input_cost": asked, "output_cost": answered}
        total = asked + answered
        assert server.cost_of(trace_id) == {**parts, "total_cost": total, "run": total}


def test_traces_that_end_together_take_few_requests() -> None:
    """What is of a run is a call for each run; spans of all traces are one."""
    server = Priced()
    sink = sink_to(server)
    traces = [server.use(f"trace-{number}", 100, 10) for number in range(8)]
    deliver(sink, *[records[0] for records in traces])
    assert Counter(server.calls) == {"experiment_id": 1, "create_run": 8, "log_batch": 8}
    server.calls.clear()
    deliver(sink, *[record for records in traces for record in records[1:]])
    assert Counter(server.calls) == {
        "log_batch": 8,  # With the run's cost.
        "write_spans": 1,
        "write_trace": 16,  # They begin and end here: a cost is found by its trace's info.
        "sum_spans": 9,
        "end_run": 8,
    }
    assert {run["status"] for run in server.runs.values()} == {"FINISHED"}


def test_a_server_without_prices_is_asked_once(server: FakeTransport) -> None:
    """Where the question is refused, it is not asked again."""
    server.fail = lambda call, _: Refused("HTTP 404", "") if call == "sum_spans" else None
    sink = sink_to(server)
    assert deliver(sink, *a_priced_trace("one")) == deliver(sink, *a_priced_trace("two")) == []
    assert server.calls.count("sum_spans") == 1


# -- refusals --------------------------------------------------------------------------------


def holds(key: str) -> Callable[[str, Any], Exception | None]:
    """Refuse every batch that has this metric, param or tag."""

    def refuse(call: str, what: Any) -> Exception | None:
        if call == "log_batch" and any(key == (getattr(i, "key", None) or i[0]) for i in what):
            return Refused("INVALID_PARAMETER_VALUE", f"{key} is bad")
        return None

    return refuse


@pytest.mark.parametrize("key", ["step/number", "late", "stop_reason"])
def test_what_is_refused_loses_only_itself(server: FakeTransport, key: str) -> None:
    """One bad item is found by halving its batch; all the rest arrives, and the run ends."""
    start, *rest = a_trace()
    rest[-1]["metadata"] = {"stop_reason": "final", "late": "param"}
    straight = FakeTransport()
    for transport in (straight, server):
        sink = sink_to(transport)
        dead = deliver(sink, start)
        transport.fail = holds(key) if transport is server else transport.fail
        dead += deliver(sink, *rest)
    assert {letter.reason for letter in dead} == {f"INVALID_PARAMETER_VALUE: {key} is bad"}
    for letter in dead:
        kept = orjson.loads(letter.record)
        assert (kept["trace_id"], kept["run_id"]) == ("trace-1", "run-0")
        assert key in str(kept["item"])
    run, whole = server.runs["run-0"], straight.runs["run-0"]
    assert set(whole["params"]) - set(run["params"]) == {key} & {"late"}
    assert set(whole["tags"]) - set(run["tags"]) == {key} & {"stop_reason"}
    lost = [point.key for point in whole["metrics"] - run["metrics"]]
    assert lost == [key] * (3 if key == "step/number" else 0)
    assert run["status"] == "FINISHED"


def test_a_span_that_is_refused_is_in_the_ledger(server: FakeTransport) -> None:
    """The ledger of a run counts the spans that the server would not have."""
    records = a_trace()
    records[2]["type"], records[2]["data"] = "custom", {"name": "bad one"}

    def refuse(call: str, names: Any) -> Exception | None:
        return Refused("BAD", "no") if call == "write_spans" and "bad one" in names else None

    server.fail = refuse
    (letter,) = deliver(sink_to(server), *records)
    assert orjson.loads(letter.record)["item"]["name"] == "bad one"
    tags = server.runs["run-0"]["tags"]
    assert (tags["qitos.spans.recorded"], tags["qitos.spans.delivered"]) == ("3", "2")
    assert tags["qitos.spans.dropped"] == "refused=1"


def test_a_run_that_is_refused_takes_its_records_along(server: FakeTransport) -> None:
    """Without a run every record of its trace is kept aside once; other traces are unharmed."""

    def refuse(call: str, tags: Any) -> Exception | None:
        refused = call == "create_run" and tags["qitos.trace_id"] == "bad"
        return Refused("INVALID_STATE", "the experiment is deleted") if refused else None

    server.fail = refuse
    sink = sink_to(server)
    bad, good = a_trace("bad"), a_trace("good")
    dead = deliver(sink, *bad[:3], *good)
    assert [orjson.loads(letter.record) for letter in dead] == bad[:3]
    dead = deliver(sink, *bad[3:])
    assert [orjson.loads(letter.record) for letter in dead] == bad[3:]
    assert {letter.reason for letter in dead} == {"INVALID_STATE: the experiment is deleted"}
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]
    assert len(server.traces) == 1
    assert len(server.spans) == 4  # Of the good one only, and the root that stands for its trace.


def test_an_experiment_that_is_refused_is_asked_for_once(server: FakeTransport) -> None:
    """However many spans wait, a deleted experiment costs one request a trace."""
    server.fail = lambda call, _: Refused("INVALID_STATE", "deleted")
    dead = deliver(sink_to(server), *a_trace("one", 50), *a_trace("two", 50))
    assert len(dead) == 2 * 52
    assert server.calls == ["experiment_id"] * 2


def test_an_experiment_that_is_replaced(server: FakeTransport) -> None:
    """The id of an experiment that is gone is looked up again, and the run created there."""
    sink = sink_to(server)
    deliver(sink, *a_trace("one"))
    gone = ["7"]
    server.experiment_id = lambda name, timeout_s: "8"  # type: ignore[method-assign]
    create = server.create_run

    def refuse(run: NewRun, timeout_s: float) -> RunRef:
        if run.experiment_id in gone:
            raise Refused("RESOURCE_DOES_NOT_EXIST", f"No Experiment with id={run.experiment_id}")
        return create(run, timeout_s)

    server.create_run = refuse  # type: ignore[method-assign]
    assert deliver(sink, *a_trace("two")) == []
    assert len(server.runs) == 2
    gone.append("8")
    assert len(deliver(sink, *a_trace("three"))) == 5
    gone.clear()
    assert deliver(sink, *a_trace("four")) == []


def test_a_run_that_was_deleted(server: FakeTransport) -> None:
    """A run that takes nothing any more is found out at once, and its trace's records kept."""
    sink = sink_to(server)
    records = a_trace(spans=200)
    deliver(sink, *records[:2])
    server.runs.clear()
    server.calls.clear()
    other = a_trace("other")
    dead = deliver(sink, *records[2:100], *other)
    assert [orjson.loads(letter.record) for letter in dead] == records[2:100]
    assert {letter.reason for letter in dead} == {"RESOURCE_DOES_NOT_EXIST: run-0"}
    assert server.calls.count("log_batch") == 3
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]
    server.calls.clear()
    assert len(deliver(sink, *records[100:])) == 102
    assert server.calls == []


def test_a_run_that_was_deleted_before_its_end(server: FakeTransport) -> None:
    """Whichever call finds it out."""
    sink = sink_to(server)
    *records, end = a_trace()
    deliver(sink, *records)
    gone = Refused("INVALID_PARAMETER_VALUE", "must be in the 'active' state")
    server.fail = lambda call, _: gone if call in ("log_batch", "end_run") else None
    assert [orjson.loads(letter.record) for letter in deliver(sink, end)] == [end]


@pytest.mark.parametrize("settings_in", ["header", "end"])
def test_the_start_of_a_trace_was_lost(server: FakeTransport, settings_in: str) -> None:
    """A run is made of what there is once its end is known, and says so.

    The settings are in the end as well; those of the first version's traces, in the header.
    """
    _, *spans, end = a_trace(spans=4)
    settings = {**SETTINGS, "user": "me", "tags": {"env": "dev", "mlflow.runName": "by-tag"}}
    if settings_in == "header":
        sink = MlflowSink(header(**settings), server)
    else:
        sink = MlflowSink(header(tracking_uri=None, cwd="/"), server)
        end["settings"] = settings
    assert deliver(sink, *spans, end) == []
    (run,) = server.runs.values()
    wanted = {"qitos.start_lost": "true", "qitos.trace_id": "trace-1", "env": "dev"}
    assert wanted.items() <= run["tags"].items()
    assert (run["name"], run["tags"]["mlflow.user"]) == ("by-tag", "me")
    assert "mlflow.runName" not in run["tags"]
    assert run["status"] == "FINISHED"
    assert (run["tags"]["qitos.spans.delivered"], server.values()["total_steps"]) == ("4", [4])
    (info,) = server.traces.values()
    assert info["trace_metadata"]["mlflow.sourceRun"] == "run-0"
    assert info["request_time"].startswith("2026")
    assert all(span.start_time_unix_nano for span in server.spans.values())


def test_refused_traces_leave_nothing_behind(server: FakeTransport) -> None:
    """Once it has ended nothing is kept of a refused trace; one that did not end is no run."""
    server.fail = lambda call, _: Refused("INVALID_STATE", "deleted")
    sink = sink_to(server)
    empty = sink.state()
    for number in range(3):
        records = a_trace(f"t{number}")
        assert len(deliver(sink, *records[:2])) == 2
        again = sink_to(server)
        again.restore(sink.state())
        sink = again
        assert len(deliver(sink, *records[2:])) == 3
    assert len(deliver(sink, *a_trace("whole"))) == 5
    assert sink.state() == empty
    deliver(sink, *a_trace("open")[:2])
    assert len(sink.state()) < 200
    server.fail = lambda call, _: None
    assert not sink.abandoned(0)


def test_a_call_that_breaks_the_server_is_given_up_in_the_end(
    server: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An internal error is tried again, for it may pass; the one item that causes it is not."""

    def poison(call: str, what: Any) -> Exception | None:
        bad = call == "write_artifact" and what == "bad.txt"
        return Poisoned("INTERNAL_ERROR") if bad else None

    server.fail = poison
    start, *rest = a_trace()
    files = [
        {"kind": "artifact", "trace_id": "trace-1", "path": path, "content": "x"}
        for path in ("good.txt", "bad.txt", "better.txt")
    ]
    sink = sink_to(server)
    sink.prepare(lines(start, *files, *rest))
    for _ in range(call_list.FAILING_TRIES + 3):
        with pytest.raises(RetryLater):
            sink.send(TIMEOUT_S)
    monkeypatch.setattr(call_list, "FAILING_S", 0.0)
    (letter,) = sink.send(TIMEOUT_S)
    assert letter.reason == "INTERNAL_ERROR"
    assert set(server.artifacts) == {"good.txt", "better.txt"}
    assert server.runs["run-0"]["status"] == "FINISHED"


def test_a_broken_server_is_no_reason_to_give_up(
    server: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails while the server itself is out of order is kept, for however long that takes."""
    monkeypatch.setattr(call_list, "FAILING_S", 0.0)
    sink = sink_to(server)
    sink.prepare(lines(*a_trace()))

    def broken(call: str, _: Any) -> Exception | None:
        away = server.runs and call in ("write_spans", "experiment_id")
        return Poisoned("HTTP 422") if away else None

    server.fail = broken
    for _ in range(3 * call_list.FAILING_TRIES):
        with pytest.raises(RetryLater):
            sink.send(TIMEOUT_S)
    server.fail = lambda call, _: Poisoned("HTTP 422") if call == "write_spans" else None
    with pytest.raises(RetryLater):  # What failed before says nothing of a server that is back.
        sink.send(TIMEOUT_S)
    server.fail = lambda call, _: None
    assert sink.send(TIMEOUT_S) == []
    assert len(server.spans) == 4


def test_a_server_without_traces_has_runs(
    server: FakeTransport, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a server is too old for traces, one warning says so, without its password."""
    monkeypatch.setattr(_guard, "_last_logged", {})

    def refuse(call: str, _: Any) -> Exception | None:
        return Refused("NOT_IMPLEMENTED", "") if call in ("write_spans", "write_trace") else None

    server.fail = refuse
    sink = sink_to(server)
    with caplog.at_level(logging.WARNING):
        assert deliver(sink, *a_trace("one")) == deliver(sink, *a_trace("two")) == []
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"] * 2
    assert server.calls.count("write_spans") == 1
    assert caplog.text.count("cannot store traces") == 1
    for run in server.runs.values():
        tags = run["tags"]
        assert (tags["qitos.spans.delivered"], tags["qitos.spans.dropped"]) == ("0", "no_traces=3")
    assert "password" not in caplog.text


def test_what_is_no_record_is_kept_aside(server: FakeTransport) -> None:
    """A line that cannot be read loses only itself."""
    start, *rest = lines(*a_trace())
    bad = [b"", b"[1]", b'{"kind": "span"}', b"\xff", b'{"trace_id": "trace-1"}']
    sink = sink_to(server)
    sink.prepare([start, *bad, *rest])
    dead = sink.send(TIMEOUT_S)
    assert [letter.record for letter in dead] == bad
    assert all(letter.reason.startswith("not a record") for letter in dead)
    assert server.runs["run-0"]["status"] == "FINISHED"
    assert server.values()["total_steps"] == [3]


# -- opening ---------------------------------------------------------------------------------


def test_the_header_says_where_it_goes() -> None:
    """A segment's header is all that is needed; another destination can be given instead."""
    one, two = "http://one.test", "http://two.test"
    assert MlflowSink(segment_header(Destination.of(one)))._transport.uri == one
    assert MlflowSink(segment_header(Destination.of(one)), tracking_uri=two)._transport.uri == two


def test_the_transport_for_each_destination(tmp_path: Any) -> None:
    """Servers are spoken to directly, local stores through MLflow, the default as of then."""
    assert isinstance(open_transport("https://server.test"), RestTransport)
    store = open_transport("sqlite:///runs.db", str(tmp_path))
    assert isinstance(store, StoreTransport)
    assert store.uri == f"sqlite:///{tmp_path}/runs.db"
    default = open_transport(None, str(tmp_path / "elsewhere"))
    assert isinstance(default, StoreTransport)
    assert default.uri == f"sqlite:///{tmp_path}/elsewhere/mlflow.db"


@pytest.mark.parametrize("uri", ["htp://x", "localhost:5000", "postgresql+missing://h/d"])
def test_a_store_that_cannot_be_opened_refuses_no_record(uri: str) -> None:
    """An unusable destination says nothing about the records: they are kept for a better one."""
    with pytest.raises(RetryLater, match="cannot be opened"):
        open_transport(uri)


def test_spans_of_several_traces_go_in_one_request(server: FakeTransport) -> None:
    """One request carries those of an experiment, so traces at once cost few requests."""
    other = {"settings": {**SETTINGS, "experiment_name": "another"}}
    records = [*a_trace("one"), *a_trace("two"), *a_trace("three")]
    elsewhere = [{**record, **other} for record in a_trace("four")]
    assert deliver(sink_to(server), *records, *elsewhere) == []
    assert server.calls.count("write_spans") == 2
    assert server.calls.index("write_spans") < server.calls.index("write_trace")


@pytest.mark.parametrize("failure", [Refused("BAD", "no"), Poisoned("HTTP 500"), RetryLater("no")])
def test_a_request_for_several_traces_that_fails_is_made_for_each(
    server: FakeTransport, failure: Exception
) -> None:
    """What one trace causes does not keep back the others' spans."""
    server.fail = lambda call, spans: (
        failure if call == "write_spans" and len(set(server.runs)) == 2 and len(spans) > 4 else None
    )
    sink = sink_to(server)
    sink.prepare(lines(*a_trace("one"), *a_trace("two")))
    with suppress(RetryLater):
        sink.send(TIMEOUT_S)
    assert sink.send(TIMEOUT_S) == []
    assert server.calls.count("write_spans") == 3
    assert {run["status"] for run in server.runs.values()} == {"FINISHED"}


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError(), OSError(24, "too many open files"), KeyError("bug")]
)
def test_a_failure_while_mapping_gives_no_record_up(
    server: FakeTransport, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is handed on; what was mapped before it is forgotten, and mapped again."""
    sink = sink_to(server)
    before, take = sink.state(), TraceState.take

    def failing(trace: TraceState, record: Any, *data: bytes) -> None:
        take(trace, record, *data)
        if record["kind"] == "trace_end":
            raise error

    monkeypatch.setattr(TraceState, "take", failing)
    with pytest.raises(type(error)):
        sink.prepare(lines(*a_trace()))
    monkeypatch.setattr(TraceState, "take", take)
    sink.restore(before)
    assert deliver(sink, *a_trace()) == []
    assert server.values()["total_steps"] == [3]
