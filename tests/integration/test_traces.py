"""What is promised of the trace: real QitOS agents, read back from a server and a local store."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pluggy
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import SpanStatusCode, Trace, TraceState

from qitos_mlflow import tracing
from qitos_mlflow.cli import main
from qitos_mlflow.cli._demo_agent import (
    TASKS,
    DeskAgent,
    Reviewer,
    ScriptedModel,
    act,
    answer,
    run_task,
)
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import SPAN_KINDS
from qitos_mlflow.recording.normalize import nanoseconds
from qitos_mlflow.tracing import AgentSpanData, SpanType, ToolSpanData, create_trace
from tests.cli.conftest import run_cli
from tests.cli.test_demo_agent import STOPS
from tests.fakes.recorder import Node, Recorder
from tests.integration.agents import Agent
from tests.integration.logged import logged, only_run, run_script
from tests.integration.made_store import make_store
from tests.integration.proxy import Proxy
from tests.integration.server import MlflowServer
from tests.waiting import eventually

FLUSH_S = 90.0
PATIENT = {"QITOS_MLFLOW_FLUSH_TIMEOUT_S": str(FLUSH_S)}
"""The machine that tests run on may be busy with others."""
MODEL = "gpt-4o-mini"
INPUT_USD, OUTPUT_USD = 0.15e-6, 0.6e-6
"""MLflow's price of that model's tokens."""


class Store:
    """A place that traces are logged to, and read back from."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(uri)

    def traces(self, experiment_name: str, *, spans: bool = True) -> list[Trace]:
        """The traces of an experiment as `mlflow.search_traces` finds them, the first one first."""
        experiment = self.client.get_experiment_by_name(experiment_name)
        if experiment is None:
            return []
        found = self.client.search_traces(
            locations=[experiment.experiment_id],
            order_by=["timestamp_ms ASC"],
            include_spans=spans,
        )
        return list(found)

    def only(self, experiment_name: str) -> Trace:
        """The one trace of an experiment, as `get_trace` returns it."""
        (found,) = self.traces(experiment_name, spans=False)
        return self.client.get_trace(found.info.trace_id)


@pytest.fixture(autouse=True)
def _own_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow in this process goes by the prices it has, not by those on the internet."""
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", "")


@pytest.fixture(scope="module")
def local_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local store, with its tables."""
    database = tmp_path_factory.mktemp("local") / "mlflow.db"
    make_store(database)
    return f"sqlite:///{database}"


@pytest.fixture(params=["server", "local"])
def store(request: pytest.FixtureRequest) -> Store:
    """A server, and a local store."""
    if request.param == "server":
        return Store(request.getfixturevalue("mlflow_server").uri)
    return Store(request.getfixturevalue("local_database"))


@pytest.fixture
def server(mlflow_server: MlflowServer) -> Store:
    """The server."""
    return Store(mlflow_server.uri)


@pytest.fixture
def heard() -> Iterator[Recorder]:
    """What every other processor hears, to compare with."""
    recorder = Recorder()
    yield recorder
    tracing.remove_trace_processor(recorder)


@contextlib.contextmanager
def agents(store: Store, experiment_name: str, heard: Recorder, **options: Any) -> Iterator[None]:
    """Log what runs inside, and deliver it."""
    with logged(store.uri, experiment_name=experiment_name, **options) as processor:
        tracing.add_trace_processor(heard)
        yield
        assert processor.force_flush(FLUSH_S) is True
        tracing.remove_trace_processor(heard)


class PricedModel(ScriptedModel):
    """A scripted model under the name of one that MLflow has prices of."""

    provider = "openai"

    def __init__(self, *replies: str) -> None:
        super().__init__(MODEL, replies)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def fail(why: str) -> None:
    """Raise, as broken tools do."""
    raise LookupError(why)


def same(trace: Trace, heard: Recorder, trace_id: str) -> None:
    """Assert that `trace` is, span by span, what the processors heard of `trace_id`."""
    spans = {span.attributes.get("qitos.span_id"): span for span in trace.data.spans}
    assert len(spans) == len(trace.data.spans), "a span is there twice"
    nodes: dict[str, Node] = {
        node.span.span_id: node for node in heard.nodes.values() if node.trace_id == trace_id
    }
    made = spans.pop(None, None)  # The root of a trace that is not one agent's run.
    assert spans.keys() == nodes.keys()
    for span_id, node in nodes.items():
        span = spans[span_id]
        assert span.start_time_ns == nanoseconds(node.started_at)
        assert span.end_time_ns == nanoseconds(node.ended_at)
        assert span.span_type == SPAN_KINDS[node.type].mlflow_type
        failed = SpanStatusCode.ERROR if node.error is not None else SpanStatusCode.OK
        assert span.status.status_code == failed
        above = spans[node.parent_id] if node.parent_id else made
        assert span.parent_id == (above.span_id if above is not None else None)
    roots = [span for span in trace.data.spans if span.parent_id is None]
    assert len(roots) == 1
    assert trace.info.request_time == roots[0].start_time_ns // 1_000_000


def tokens(heard: Recorder, trace_id: str) -> dict[str, int]:
    """The sum of what a trace's generations used, as MLflow spells it."""
    names = {"input_tokens": "prompt", "output_tokens": "completion", "total_tokens": "total"}
    used = [node.data["token_usage"] for node in heard.of("generation", trace_id)]
    return {
        key: sum(usage[f"{name}_tokens"] for usage in used if usage) for key, name in names.items()
    }


def ancestors(span_id: str, parents: dict[str, str | None]) -> list[str]:
    """The spans above one, the nearest first."""
    above = parents[span_id]
    return [] if above is None else [above, *ancestors(above, parents)]


def by_name(trace: Trace, name: str) -> Any:
    """The trace's one span of this name."""
    (span,) = [span for span in trace.data.spans if span.name == name]
    return span


# -- what agents did -------------------------------------------------------------------------


def test_the_demos_agents(
    store: Store, heard: Recorder, experiment_name: str, tmp_path: Path
) -> None:
    """Tree, times, types, statuses, tokens, previews, session, user, tags, links of all tasks."""
    with agents(store, experiment_name, heard, tags={"env": "test"}):
        for task in TASKS:
            run_task(task)
    traces = store.traces(experiment_name)
    assert len(traces) == len(TASKS) == len(heard.started)
    for trace, heard_of, task in zip(traces, heard.started, TASKS, strict=True):
        info, metadata = trace.info, heard_of.metadata
        same(trace, heard, heard_of.trace_id)
        usage = tokens(heard, heard_of.trace_id)
        if usage["total_tokens"]:
            assert {key: info.token_usage[key] for key in usage} == usage
        assert info.request_preview == task.objective
        stopped = f"stopped: {STOPS.get(task.id, 'final')}"
        answer = metadata.get("final_result") or metadata.get("error") or stopped
        assert info.response_preview == answer
        failed = metadata["status"] == "error"
        assert info.state == (TraceState.ERROR if failed else TraceState.OK)
        assert "mlflow.trace.session" not in info.trace_metadata
        assert info.trace_metadata["mlflow.trace.user"]
        assert info.cost is None, "scripted models have no price"
        expected = {
            "mlflow.traceName": task.agent,
            "qitos.agent": task.agent,
            "qitos.task_id": task.id,
            "qitos.benchmark": "desk-questions",
            "qitos.run_id": metadata["qitos_run_id"],
            "qitos.trace_id": heard_of.trace_id,
            "stop_reason": STOPS.get(task.id, "final"),
            "env": "test",
        }
        assert {key: info.tags.get(key) for key in expected} == expected
        run = store.client.get_run(info.trace_metadata["mlflow.sourceRun"])
        assert run.data.tags["qitos.trace_id"] == heard_of.trace_id
        of_run = store.client.search_traces(
            locations=[run.info.experiment_id], run_id=run.info.run_id
        )
        assert [found.info.trace_id for found in of_run] == [info.trace_id]

    nested = next(trace for trace in traces if len(trace.search_spans(span_type="AGENT")) > 1)
    (librarian,) = nested.search_spans(name="librarian")
    (asking,) = nested.search_spans(name="ask_librarian")
    assert (librarian.span_type, librarian.parent_id) == ("AGENT", asking.span_id)
    parents = {span.span_id: span.parent_id for span in nested.data.spans}
    (search,) = [
        span
        for span in nested.search_spans(name="search_almanac")
        if librarian.span_id in ancestors(span.span_id, parents)
    ]
    assert search.span_type == "TOOL"


def test_the_conversation(store: Store, heard: Recorder, experiment_name: str) -> None:
    """A generation is a chat with roles, its model, tokens and tools; a tool has what went in."""
    model = PricedModel(act("Add.", ("add", {"a": 1, "b": 2})), answer("Added.", "3"))
    with agents(store, experiment_name, heard):
        DeskAgent("adder", model, [add]).run(task="What is 1 + 2?", trace=False, render=False)
    trace = store.only(experiment_name)
    first, second = trace.search_spans(span_type="CHAT_MODEL")
    assert first.name == MODEL
    assert first.attributes["mlflow.message.format"] == "openai"
    assert first.attributes["mlflow.llm.model"] == MODEL
    assert first.attributes["mlflow.llm.provider"] == "openai"
    roles = [message["role"] for message in second.inputs["messages"]]
    assert roles[0] == "system"
    assert "user" in roles
    (choice,) = second.outputs["choices"]
    assert choice["message"]["role"] == "assistant"
    assert "3" in choice["message"]["content"]
    usage = heard.of("generation")[0].data["token_usage"]
    assert first.attributes["mlflow.chat.tokenUsage"] == {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }
    names = [tool["function"]["name"] for tool in first.attributes["mlflow.chat.tools"]]
    assert "add" in names
    (tool,) = trace.search_spans(span_type="TOOL")
    assert (tool.name, tool.inputs, tool.outputs) == ("add", {"a": 1, "b": 2}, 3)


def test_the_cost(store: Store, experiment_name: str) -> None:
    """Each generation has its price, and the trace their sum, whatever batches they came in."""
    with logged(store.uri, experiment_name=experiment_name) as processor:
        with create_trace("priced") as trace:
            for number in (1, 2, 3):
                usage = {"prompt_tokens": 1000 * number, "completion_tokens": 10}
                response = {"provider": "openai"}
                data = tracing.GenerationSpanData(
                    model=MODEL, token_usage=usage, model_response=response
                )
                trace.create_span(SpanType.GENERATION, data).start().finish()
                assert processor.force_flush(FLUSH_S) is True  # A batch of its own.
        assert processor.force_flush(FLUSH_S) is True
    logged_trace = store.only(experiment_name)
    info = logged_trace.info
    assert info.token_usage == {
        "input_tokens": 6000,
        "output_tokens": 30,
        "total_tokens": 6030,
    }
    costs = [span.llm_cost for span in logged_trace.search_spans(span_type="CHAT_MODEL")]
    inputs = [one["input_cost"] for one in costs]
    assert sorted(inputs) == pytest.approx([1000 * n * INPUT_USD for n in (1, 2, 3)])
    assert info.cost == pytest.approx(
        {
            "input_cost": 6000 * INPUT_USD,
            "output_cost": 30 * OUTPUT_USD,
            "total_cost": 6000 * INPUT_USD + 30 * OUTPUT_USD,
        }
    )


def test_a_failing_agent(store: Store, heard: Recorder, experiment_name: str) -> None:
    """The span that failed has the exception as an event; the trace and its run failed too."""
    model = ScriptedModel("scripted-small", [act("Try.", ("fail", {"why": "no luck"}))])
    with agents(store, experiment_name, heard):
        agent = DeskAgent("unlucky", model, [fail])
        with contextlib.suppress(RuntimeError):  # Its script has no second reply.
            agent.run(task="Try.", max_steps=3, trace=False, render=False)
    trace = store.only(experiment_name)
    same(trace, heard, heard.only().trace_id)
    tool = by_name(trace, "fail")
    assert tool.status.status_code == SpanStatusCode.ERROR
    assert "no luck" in tool.status.description
    (event,) = tool.events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "LookupError"
    assert event.attributes["exception.message"] == "no luck"
    assert "raise LookupError(why)" in event.attributes["exception.stacktrace"]
    assert trace.info.state == TraceState.ERROR
    (root,) = [span for span in trace.data.spans if span.parent_id is None]
    assert root.status.status_code == SpanStatusCode.ERROR
    run = store.client.get_run(trace.info.trace_metadata["mlflow.sourceRun"])
    assert run.info.status == "FAILED"


def test_critics_are_feedback(store: Store, heard: Recorder, experiment_name: str) -> None:
    """Each verdict is one assessment on the trace and on the critic's span, with its reason."""
    replies = [answer("Quick.", "It boils."), answer("Better.", "It boils at 70 degrees.")]
    model = ScriptedModel("scripted-small", replies)
    with agents(store, experiment_name, heard):
        DeskAgent("taster", model, []).run(
            task="Why?", critics=[Reviewer("boils", "70")], trace=False, render=False
        )
    trace = store.only(experiment_name)
    spans = trace.search_spans(span_type="EVALUATOR")
    verdicts = sorted(trace.info.assessments, key=lambda one: one.create_time_ms)
    assert [verdict.name for verdict in verdicts] == ["Reviewer", "Reviewer"]
    assert [verdict.feedback.value for verdict in verdicts] == [0.5, 1.0]
    assert verdicts[0].rationale == "does not mention 70"
    assert {verdict.source.source_type for verdict in verdicts} == {"CODE"}
    assert [verdict.span_id for verdict in verdicts] == [span.span_id for span in spans]


def test_parallel_spans_and_interleaved_traces(
    store: Store, heard: Recorder, experiment_name: str
) -> None:
    """Spans of many threads and traces at once have their own trace, parent and times."""
    meet = threading.Barrier(4)

    def work(trace: Any, parent: Any, number: int) -> None:
        data = ToolSpanData(tool_name=f"tool-{number}", tool_args={"number": number})
        span = trace.create_span(SpanType.TOOL, data, parent=parent).start()
        meet.wait()
        span.finish()

    with agents(store, experiment_name, heard):
        first, second = create_trace("first"), create_trace("second")
        with first, second, ThreadPoolExecutor(4) as pool:
            above = [
                trace.create_span(SpanType.AGENT, AgentSpanData(name=trace.name)).start()
                for trace in (first, second)
            ]
            for number in range(20):
                trace = (first, second)[number % 2]
                pool.submit(work, trace, above[number % 2], number)
            pool.shutdown()
            for span in above:
                span.finish()
    for trace in store.traces(experiment_name):
        name = trace.info.tags["mlflow.traceName"]
        same(trace, heard, {"first": first, "second": second}[name].trace_id)
        assert len(trace.search_spans(span_type="TOOL")) == 10
        assert {span.trace_id for span in trace.data.spans} == {trace.info.trace_id}


def test_a_span_that_outlives_its_trace(
    store: Store, heard: Recorder, experiment_name: str
) -> None:
    """A span that ends after its trace is in the tree, and leaves the trace as it ended."""
    with agents(store, experiment_name, heard):
        with create_trace("short", metadata={"task": "Be quick."}) as trace:
            late = trace.create_span(SpanType.TOOL, ToolSpanData(tool_name="slow")).start()
        assert heard.ended == [trace]
        late.finish()
    found = store.only(experiment_name)
    same(found, heard, trace.trace_id)
    assert found.info.state == TraceState.OK
    assert found.info.request_preview == "Be quick."


@pytest.mark.parametrize("spans", [1_200, pytest.param(5_000, marks=pytest.mark.soak)])
def test_a_trace_of_many_spans(
    store: Store, heard: Recorder, experiment_name: str, spans: int
) -> None:
    """It is there in full, in however many batches it comes."""
    with agents(store, experiment_name, heard), create_trace("long") as trace:
        agent = trace.create_span(SpanType.AGENT, AgentSpanData(name="long")).start()
        for number in range(spans - 1):
            data = ToolSpanData(tool_name=f"tool-{number % 7}", tool_args={"number": number})
            trace.create_span(SpanType.TOOL, data, parent=agent).start().finish()
        agent.finish()
    found = store.only(experiment_name)
    same(found, heard, trace.trace_id)
    assert len(found.search_spans(span_type="TOOL")) == spans - 1


# -- while it runs, and when it dies -----------------------------------------------------------


RunAgent = Callable[..., Agent]


def test_a_trace_is_live_and_survives_its_process(
    server: Store, run_agent: RunAgent, experiment_name: str, tmp_path: Path
) -> None:
    """Finished spans show while the agent runs; after a SIGKILL two syncs close it, once."""
    options = {"tracking_uri": server.uri, "experiment_name": experiment_name}
    agent = run_agent(steps=6, options=options, scores=[0.5], gates=["mid"])
    agent.wait_for("mid")  # In the tool of the fourth step.

    def steps_seen() -> Trace | None:
        found = server.traces(experiment_name)
        steps = [s for t in found for s in t.data.spans if s.name.startswith("step ")]
        # The spans come first, and what is known of their trace with the next request; the server
        # itself shows the tokens of spans only.
        known = [t for t in found if "mlflow.sourceRun" in t.info.trace_metadata]
        return known[0] if len(steps) == 3 and known and known[0].info.token_usage else None

    trace = eventually(steps_seen)
    assert trace.info.state == TraceState.IN_PROGRESS
    assert trace.info.request_preview == "task 0"
    assert trace.info.token_usage["total_tokens"] > 0
    run_id = trace.info.trace_metadata["mlflow.sourceRun"]
    assert server.client.get_run(run_id).info.status == "RUNNING"

    agent.signal(signal.SIGKILL)
    agent.finish()
    for _ in range(2):
        done = run_cli("sync", str(tmp_path / "spool"))
        assert done.returncode == 0, done.stderr
        trace = server.only(experiment_name)
        assert trace.info.state == TraceState.ERROR
        assert trace.info.tags["qitos.killed"]
        names = [span.name for span in trace.data.spans]
        assert [name for name in sorted(names) if name.startswith("step ")] == [
            "step 0",
            "step 1",
            "step 2",
        ]
        assert len({span.span_id for span in trace.data.spans}) == len(names)
        assert len(trace.info.assessments) == 3
        run = only_run(server.client, experiment_name)
        assert (run.id, run.status) == (run_id, "KILLED")


def test_a_replay_changes_nothing(
    store: Store, heard: Recorder, experiment_name: str, tmp_path: Path
) -> None:
    """A segment delivered twice from its beginning is one trace, each span and score once."""
    replies = [act("Add.", ("add", {"a": 1, "b": 2})), answer("Added.", "3")]
    with logged(store.uri, experiment_name=experiment_name, offline=True):
        tracing.add_trace_processor(heard)
        DeskAgent("adder", PricedModel(*replies), [add]).run(
            task="What is 1 + 2?", critics=[Reviewer("3")], trace=False, render=False
        )
    shutil.copytree(tmp_path / "spool", tmp_path / "copy")
    seen = []
    for directory in ("spool", "copy"):
        done = CliRunner().invoke(main, ["sync", "--trust", str(tmp_path / directory)])
        assert done.exit_code == 0, done.output
        trace = store.only(experiment_name)
        same(trace, heard, heard.only().trace_id)
        info = trace.info
        seen.append((info.token_usage, info.cost, info.state, info.execution_duration))
        assert len(info.assessments) == 1
        only_run(store.client, experiment_name)
    assert seen[0] == seen[1]
    assert seen[0][1] is not None


def test_requests_are_few(
    proxy: Proxy, server: Store, run_agent: RunAgent, experiment_name: str
) -> None:
    """A run of 100 steps, in 600 spans, comes to fewer than 20 requests."""
    options = {"tracking_uri": proxy.uri, "experiment_name": experiment_name}
    report = run_agent(steps=99, options=options, flush=True, env=PATIENT).finish()
    assert report.flushed is True
    trace = server.only(experiment_name)
    assert trace.info.state == TraceState.OK
    assert len(trace.data.spans) == len(report.spans()) == 599
    assert len(proxy.requests) < 20, [request.path for request in proxy.requests]


# -- what goes in ------------------------------------------------------------------------------


SECRET = "the plan nobody may read"


def all_of(trace: Trace) -> str:
    """Everything MLflow has of the trace, as text."""
    return str(trace.to_json())


def talkative(store: Store, experiment_name: str, heard: Recorder, **options: Any) -> Trace:
    """The trace of an agent whose task, conversation, tool and error are secret."""
    replies = [act(SECRET, ("fail", {"why": SECRET})), answer(SECRET, SECRET)]
    with agents(store, experiment_name, heard, **options):
        DeskAgent("talker", PricedModel(*replies), [fail]).run(
            task=SECRET, critics=[Reviewer(SECRET)], trace=False, render=False
        )
    return store.only(experiment_name)


def test_content_can_be_kept_out(store: Store, heard: Recorder, experiment_name: str) -> None:
    """Without content there are tree, times, tokens, cost, scores, and not a word of the task."""
    trace = talkative(store, experiment_name, heard, capture_content=False)
    assert SECRET not in all_of(trace)
    same(trace, heard, heard.only().trace_id)
    usage = tokens(heard, heard.only().trace_id)
    assert trace.info.token_usage["total_tokens"] == usage["total_tokens"] > 0
    assert trace.info.cost["total_cost"] > 0
    assert [one.feedback.value for one in trace.info.assessments] == [1.0]
    (event,) = by_name(trace, "fail").events
    assert event.attributes["exception.type"] == "LookupError"
    run = store.client.get_run(trace.info.trace_metadata["mlflow.sourceRun"])
    assert SECRET not in str(run.to_dictionary())
    assert store.client.list_artifacts(run.info.run_id) == []


def test_the_hosts_mode_without_data_is_obeyed(
    server: Store, heard: Recorder, experiment_name: str
) -> None:
    """In QitOS's mode ENABLED_WITHOUT_DATA nothing of the content leaves the process either."""
    tracing.set_tracing_mode(tracing.TracingMode.ENABLED_WITHOUT_DATA)
    try:
        trace = talkative(server, experiment_name, heard)
    finally:
        tracing.set_tracing_mode(tracing.TracingMode.ENABLED)
    assert SECRET not in all_of(trace)
    assert len(trace.search_spans(span_type="CHAT_MODEL")) == 2
    assert trace.info.token_usage["total_tokens"] > 0


def test_long_fields_are_cut_where_they_are_long(
    server: Store, heard: Recorder, experiment_name: str
) -> None:
    """What is longer than the setting says so and how long it was; a chat stays a chat."""

    def read_book(title: str) -> str:
        """Read a book."""
        return "word " * 10_000

    replies = [act("Read.", ("read_book", {"title": "it"})), answer("Read.", "Long.")]
    with agents(server, experiment_name, heard, field_bytes=5_000):
        DeskAgent("reader", PricedModel(*replies), [read_book]).run(
            task="Read it.", trace=False, render=False
        )
    trace = server.only(experiment_name)
    output = by_name(trace, "read_book").outputs
    assert len(output) < 6_000
    assert "50000" in output[-60:], "how long it was"
    last = trace.search_spans(span_type="CHAT_MODEL")[-1]
    assert [message["role"] for message in last.inputs["messages"]][:2] == ["system", "user"]
    assert len(str(last.inputs)) < 8_000


def test_traces_can_be_left_out(server: Store, heard: Recorder, experiment_name: str) -> None:
    """With `log_traces=False` there is the run, and no trace."""
    with agents(server, experiment_name, heard, log_traces=False):
        DeskAgent("quiet", PricedModel(answer("It is.", "3")), []).run(
            task="What is 1 + 2?", trace=False, render=False
        )
    assert only_run(server.client, experiment_name).metrics["total_tokens"] > 0
    assert server.traces(experiment_name) == []


def test_another_plugin_adds_to_run_and_trace(
    store: Store, heard: Recorder, experiment_name: str
) -> None:
    """What a plugin's `qitos_record` returns is on the run, the trace and the span."""

    class Adds:
        @pluggy.HookimplMarker("qitos")
        def qitos_record(self, record: dict[str, Any]) -> Any:
            if record.get("type") != "tool":
                return None
            sum_ = record["data"]["output_content"]
            return {"attributes": {"sum": sum_}, "metrics": {"sum": sum_}, "tags": {"adds": "yes"}}

    replies = [act("Add.", ("add", {"a": 1, "b": 2})), answer("Added.", "3")]
    with logged(store.uri, experiment_name=experiment_name) as processor:
        processor.register(Adds(), "adds")
        DeskAgent("adder", PricedModel(*replies), [add]).run(
            task="What is 1 + 2?", trace=False, render=False
        )
        assert processor.force_flush(FLUSH_S) is True
    trace = store.only(experiment_name)
    assert by_name(trace, "add").attributes["sum"] == 3
    assert trace.info.tags["adds"] == "yes"
    run = only_run(store.client, experiment_name)
    assert (run.metrics["sum"], run.tags["adds"]) == (3, "yes")


# -- beside MLflow's own tracing ---------------------------------------------------------------


BESIDE = """
    import mlflow
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, act, answer
    from qitos_mlflow.tracing import set_trace_processors

    USED = {{"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}}

    class Model(ScriptedModel):  # As mlflow.openai.autolog() makes of a client.
        provider = "openai"

        def __call__(self, messages, **options):
            with mlflow.start_span("Completions", span_type="CHAT_MODEL") as span:
                span.set_attribute("mlflow.chat.tokenUsage", USED)
                span.set_attribute("mlflow.llm.model", {model!r})
                return super().__call__(messages, **options)

    def look(what: str) -> str:
        "Look."
        with mlflow.start_span("inside"):
            mlflow.update_current_trace(tags={{"set.in": "tool"}})
        return "seen"

    for uri in {uris!r}:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment({experiment!r} + " of its own")
        processor = MlflowTraceProcessor(experiment_name={experiment!r})
        set_trace_processors([processor])
        provider = mlflow.tracing.provider.provider.get()
        replies = [act("Look.", ("look", {{"what": "it"}})), answer("Seen.", "so")]
        agent = DeskAgent("beside", Model({model!r}, replies), [look])
        agent.run(task="Look.", trace=False, render=False)
        with mlflow.start_span("afterwards"):
            pass
        assert mlflow.get_current_active_span() is None
        assert processor.force_flush(90)
        assert mlflow.tracing.provider.provider.get() is provider or provider is None
        mlflow.flush_trace_async_logging()
"""


def test_mlflows_own_spans_nest(server: Store, local_database: str, experiment_name: str) -> None:
    """A provider's span is below the generation or tool it was made in; tokens count once."""
    stores = [server, Store(local_database)]
    uris = [store.uri for store in stores]
    script = BESIDE.format(uris=uris, experiment=experiment_name, model=MODEL)
    run_script(script, MLFLOW_RUN_ID=None)
    for store in stores:
        nested(store, experiment_name)
        (own,) = store.traces(f"{experiment_name} of its own")
        assert [span.name for span in own.data.spans] == ["afterwards"]


def nested(store: Store, experiment_name: str) -> None:
    """Assert that spans of MLflow are in the agent's trace, and counted once."""

    def all_there() -> Trace | None:
        trace = store.only(experiment_name)
        names = [span.name for span in trace.data.spans]
        return trace if names.count("Completions") == 2 and "inside" in names else None

    trace = eventually(all_there)
    names = {span.span_id: span.name for span in trace.data.spans}
    parents = {span.name: names.get(span.parent_id) for span in trace.data.spans}
    assert parents["Completions"] == MODEL
    assert parents["inside"] == "look"
    assert len([span for span in trace.data.spans if span.parent_id is None]) == 1
    assert trace.info.state == TraceState.OK
    assert trace.info.tags["set.in"] == "tool"
    ours = [span for span in trace.search_spans(span_type="CHAT_MODEL") if span.name == MODEL]
    used = [span.attributes["mlflow.chat.tokenUsage"]["total_tokens"] for span in ours]
    assert trace.info.token_usage["total_tokens"] == sum(used)
    prices = [span.llm_cost["total_cost"] for span in ours]
    assert trace.info.cost["total_cost"] == pytest.approx(sum(prices))


# -- files -------------------------------------------------------------------------------------


def test_files_go_with_the_run(store: Store, experiment_name: str, tmp_path: Path) -> None:
    """The answer and QitOS's own run directory are the run's artifacts, byte for byte."""
    answers = [answer("Known.", "3"), answer("Known.", "4")]
    with logged(store.uri, experiment_name=experiment_name) as processor:
        DeskAgent("filer", ScriptedModel("scripted-small", answers[:1]), []).run(
            task="What is 1 + 2?", trace=True, render=False
        )
        assert processor.force_flush(FLUSH_S) is True
    (manifest,) = (
        path for path in tmp_path.rglob("manifest.json") if "artifacts" not in path.parts
    )
    run = only_run(store.client, experiment_name)
    copy = Path(store.client.download_artifacts(run.id, "", str(tmp_path / "copy")))
    assert (copy / "final_answer.txt").read_text() == "3"
    for name in ("manifest.json", "events.jsonl", "steps.jsonl"):
        assert (copy / "qitos" / name).read_text() == (manifest.parent / name).read_text()


def test_an_answer_that_is_no_text_is_a_json_file(
    server: Store, experiment_name: str, tmp_path: Path
) -> None:
    """A structured final answer is an artifact that reads back as it was."""
    answer = {"cities": ["Oslo", "Åre"], "warm": False, "degrees": 4.5, "wind": None}
    with logged(server.uri, experiment_name=experiment_name) as processor:
        with create_trace("structured") as trace:
            trace.metadata["final_result"] = answer
        assert processor.force_flush(FLUSH_S) is True
    run = only_run(server.client, experiment_name)
    copy = server.client.download_artifacts(run.id, "final_answer.json", str(tmp_path))
    assert orjson.loads(Path(copy).read_bytes()) == answer


def test_files_can_be_left_out(server: Store, experiment_name: str) -> None:
    """With `log_artifacts=False` the run has none."""
    with logged(server.uri, experiment_name=experiment_name, log_artifacts=False) as processor:
        DeskAgent("filer", ScriptedModel("scripted-small", [answer("Known.", "3")]), []).run(
            task="What is 1 + 2?", trace=True, render=False
        )
        assert processor.force_flush(FLUSH_S) is True
    run = only_run(server.client, experiment_name)
    assert server.client.list_artifacts(run.id) == []
