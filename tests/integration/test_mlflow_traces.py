"""Inside MLflow's own spans: one tree, which `mlflow.genai.evaluate` and its scorers see, too.

The scripts run in processes of their own, with the package installed and MLflow's tracer at work.
Each part of a script logs to an experiment of its own.
"""

from __future__ import annotations

import json
import re
import textwrap
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Span, Trace

from qitos_mlflow.cli import main
from tests.integration.browser import Browser, Pages
from tests.integration.logged import LONG_SCRIPT_TIMEOUT_S, LoggedRun, run_script, runs_of
from tests.integration.made_store import make_store
from tests.integration.server import MlflowServer

pytestmark = pytest.mark.timeout(300)
"""The first test that reads what a script has logged waits for the whole script."""

PARENT = "mlflow.parentRunId"
TREE = "qitos.mlflow_trace_id"
MODEL = "gpt-4o-mini"
COST_OF_CALL = (1000 * 0.15 + 100 * 0.60) / 1e6
"""Of the scripted model's tokens, at that model's prices (dollars)."""
LARGE = (1750, 1300)
"""Of a browser's window (pixels)."""

AGENTS = """
import asyncio, contextlib, json, os, sys, threading
import mlflow
import pluggy
import qitos_mlflow
from qitos import Decision
from qitos.engine.critic import Critic
from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, act, answer
from tests.bridge import agents
from tests.bridge.agents import ScriptAgent, toolbox

MODEL = "gpt-4o-mini"

def add(a: int, b: int) -> int:
    "Add."
    return a + b

class Priced(ScriptedModel):
    "A scripted model under the name of one that MLflow has prices of."
    provider = "openai"
    knows_tokens = True

    def __call__(self, messages, **options):
        found = super().__call__(messages, **options)
        found.usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        if not self.knows_tokens:
            found.usage = None
        return found

class Autologged(Priced):
    "Leaves the span that mlflow.openai.autolog() leaves of a call."

    def __call__(self, messages, **options):
        with mlflow.start_span("Completions", span_type="CHAT_MODEL") as span:
            used = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
            span.set_attribute("mlflow.chat.tokenUsage", used)
            span.set_attribute("mlflow.llm.model", MODEL)
            span.set_attribute("mlflow.llm.provider", "openai")
            return super().__call__(messages, **options)

def run(task, kind=Priced, **options):
    model = kind(MODEL, [act("Add.", ("add", {"a": 1, "b": 2})), answer("Added.", "42")])
    agent = DeskAgent("asker", model, [add])
    return agent.run(task, render=False, trace=False, **options)

class Strict(Critic):
    def evaluate(self, state, decision, results):
        return {"action": "continue", "reason": "fine", "score": 0.5}

def nested():
    secret = agents.act("fail", why="sk-proj-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    inner = ScriptAgent(secret, Decision.final("inner"), tools=toolbox())
    inner.run("in", render=False, trace=False)
    return "back"

def go():
    tools = toolbox(nested=nested)
    outer = ScriptAgent(agents.act("nested"), agents.act("add", "add", a=1, b=2),
                        Decision.final("out"), tools=tools)
    outer.name = "outer"
    outer.run("out", critics=[Strict()], render=False, trace=False)

class ToolSizes:
    "A plugin."
    seen = []

    @pluggy.HookimplMarker("qitos")
    def qitos_record(self, record):
        if record["kind"] != "span":
            return None
        self.seen.append(record["span_id"])
        found = {"metrics": {"seen": len(self.seen)}}
        if record["type"] == "tool":
            found["attributes"] = {"tool": "by a plugin"}
        return found

@contextlib.contextmanager
def by_hand(**options):
    processor = qitos_mlflow.MlflowTraceProcessor(**options)
    qitos_mlflow.tracing.add_trace_processor(processor)
    try:
        yield processor
    finally:
        processor.force_flush(0 if options.get("offline") else 60)
        qitos_mlflow.tracing.remove_trace_processor(processor)

@contextlib.contextmanager
def broken(name):
    def fails(*args, **kwargs):
        raise ValueError("a tracer's")

    works = getattr(mlflow, name)
    setattr(mlflow, name, fails)
    try:
        yield
    finally:
        setattr(mlflow, name, works)

"""


@dataclass(frozen=True)
class Said:
    """What a script has logged, and what each of its parts returned."""

    client: MlflowClient
    uri: str
    name: str
    parts: dict[str, Any]

    def __getitem__(self, part: str) -> Any:
        return self.parts[part]

    def experiment_id(self, part: str) -> str:
        """MLflow's id of the part's experiment."""
        return str(self.client.get_experiment_by_name(f"{self.name} {part}").experiment_id)

    def pages(self, part: str) -> Pages:
        """MLflow's pages about the part's experiment."""
        return Pages(self.uri, self.experiment_id(part))

    def runs(self, part: str) -> list[LoggedRun]:
        """The first one first."""
        return runs_of(self.client, f"{self.name} {part}")

    def traces(self, part: str) -> list[Trace]:
        """The first one first."""
        found = self.client.search_traces(
            locations=[self.experiment_id(part)], max_results=100, order_by=["timestamp_ms ASC"]
        )
        return list(found)

    def trace(self, part: str) -> Trace:
        """The only one."""
        [trace] = self.traces(part)
        return trace

    def cost(self, part: str) -> float:
        """What the Overview page says that all calls cost: the sum over all spans."""
        spans = [span for trace in self.traces(part) for span in trace.data.spans]
        return sum((span.llm_cost or {}).get("total_cost", 0.0) for span in spans)


def run_parts(server: MlflowServer, parts: dict[str, str], begin: str = "") -> Said:
    """Run function bodies one after another in one process, each in its experiment."""
    name = f"mlflow traces {uuid.uuid4().hex[:12]}"
    script = [AGENTS, begin, f"ELSEWHERE = '{name} elsewhere'", "said = {}"]
    for part, body in parts.items():
        script += [
            f"def part_{part}():\n" + textwrap.indent(textwrap.dedent(body), "    "),
            f"mlflow.set_experiment('{name} {part}')\nsaid['{part}'] = part_{part}()",
        ]
    script.append("print(json.dumps(said))")
    done = run_script(
        *script,
        timeout_s=LONG_SCRIPT_TIMEOUT_S,
        MLFLOW_TRACKING_URI=server.uri,
        MLFLOW_RUN_ID=None,
        MLFLOW_GENAI_EVAL_MAX_WORKERS="4",
    )
    return Said(server.client, server.uri, name, json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for what the tests of this module share."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("traces")
        patch.chdir(directory)
        patch.setenv("QITOS_MLFLOW_SPOOL_DIR", str(directory / "spool"))
        yield directory


def tree(trace: Trace) -> dict[str, list[str]]:
    """The names of the spans below each span, in the order they began; the root's below ``""``."""
    names: dict[str | None, str] = {span.span_id: span.name for span in trace.data.spans}
    found: dict[str, list[str]] = {}
    for span in sorted(trace.data.spans, key=lambda span: span.start_time_ns):
        found.setdefault(names.get(span.parent_id, ""), []).append(span.name)
    return found


def shown(span: Span) -> dict[str, Any]:
    """All that a span shows, but for ids and times."""
    own = {"mlflow.traceRequestId", "mlflow.spanLogLevel", "mlflow.spanStartTimeNs"}
    attributes = {
        key: value
        for key, value in span.attributes.items()
        if key not in own and key not in ("qitos.span_id", "qitos.trace_id")
    }
    events = [(event.name, event.attributes.get("exception.message")) for event in span.events]
    return {
        "name": span.name,
        "status": span.status.status_code.value,
        "attributes": attributes,
        "events": events,
    }


def in_order(trace: Trace, *, but: str = "") -> list[dict[str, Any]]:
    spans = sorted(trace.data.spans, key=lambda span: (span.start_time_ns, -span.end_time_ns))
    return [shown(span) for span in spans if span.name != but]


# -- one tree ----------------------------------------------------------------------------------

IN_SPANS = {
    "imports": """
        before = set(sys.modules)
        run("as ever")
        more = {one for one in set(sys.modules) - before if one.split(".")[0] == "mlflow"}
        return sorted(more)
    """,
    # Before MLflow sends: its exit (3.12) waits for ever in a child that was forked meanwhile.
    "forked": """
        with mlflow.start_span("top"):
            if (pid := os.fork()) == 0:
                run("in a fork")
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
    """,
    "own": """
        run("how much?")
        first = mlflow.get_last_active_trace_id(thread_local=True)
        run("and then?")
        return {"how much?": first, "and then?": mlflow.get_last_active_trace_id()}
    """,
    "disabled": """
        mlflow.tracing.disable()
        run("as ever")
        mlflow.tracing.enable()
    """,
    "traced": """
        @mlflow.trace
        def handle(question):
            with mlflow.start_span("look up"):
                pass
            found = run(question)
            inner = mlflow.get_current_active_span()
            return [found, inner.name]

        value = handle("how much?")
        return {"last": mlflow.get_last_active_trace_id(), "value": value}
    """,
    "awaited": """
        @mlflow.trace
        async def handle(question):
            return await asyncio.to_thread(run, question)

        async def both():
            return await asyncio.gather(handle("one"), handle("two"))

        return asyncio.run(both())
    """,
    "generated": """
        @mlflow.trace
        def handle(question):
            yield "soon"
            yield run(question)
            yield run(question)

        return list(handle("how much?"))
    """,
    "nested": "return mlflow.trace(go)()",
    "nested_own": "return go()",
    "code": """
        from qitos.tracing import create_trace

        with mlflow.start_span("top"):
            with create_trace("a batch") as trace:
                trace.metadata["final_result"] = "all done"
                run("in it")
            try:
                with create_trace("a bad batch"):
                    raise KeyError("nothing")
            except KeyError:
                pass
    """,
    "autologged": """
        with mlflow.start_span("top"):
            run("how much?", Autologged)
    """,
    "autologged_own": """
        run("how much?", Autologged)
    """,
    "no_tokens": """
        Autologged.knows_tokens = False
        run("how much?", Autologged)
    """,
    "no_starts": """
        with mlflow.start_span("top"), broken("start_span_no_context"):
            return run("on and on")
    """,
    "no_current": """
        with mlflow.start_span("top"), broken("get_current_active_span"):
            return run("on and on")
    """,
    "interrupted": """
        from qitos_mlflow.mlflow_plugin.fluent.in_background import InBackground

        import signal

        def interrupted(*args):
            signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may ignore it.
        wait, InBackground.wait = InBackground.wait, interrupted
        try:
            with mlflow.start_span("top"):
                run("to the end")
        except KeyboardInterrupt:
            return mlflow.active_run() is None
        finally:
            InBackground.wait = wait
    """,
    "by_hand": """
        with mlflow.start_span("top"), by_hand(capture_content=False) as processor:
            processor.register(ToolSizes(), "tool-sizes")
            run("a private question")
            processor.force_flush(60)
        return ToolSizes.seen
    """,
    "offline": """
        with by_hand(offline=True), mlflow.start_span("top"):
            run("offline")
    """,
    "elsewhere": """
        with by_hand(tracking_uri=mlflow.get_tracking_uri(), experiment_name=ELSEWHERE):
            mlflow.set_tracking_uri(f"sqlite:///{os.getcwd()}/other.db")
            with mlflow.start_span("elsewhere"):
                run("here")
    """,
}
"""Bodies of functions, run one after another."""


@pytest.fixture(scope="module")
def in_spans(shared_server: MlflowServer, workspace: Path) -> Said:
    """Agents inside MLflow's spans, and beside them, for comparison, agents of their own."""
    make_store(workspace / "other.db")
    return run_parts(shared_server.ensure_running(), IN_SPANS)


def test_a_traced_function(in_spans: Said) -> None:
    """The agent is its subtree, with all that an agent's own trace shows; run and trace link."""
    trace = in_spans.trace("traced")
    assert in_spans["traced"] == {"last": trace.info.trace_id, "value": ["42", "handle"]}
    found = tree(trace)
    assert found[""] == ["handle"]
    assert found["handle"] == ["look up", "asker"]
    assert found["asker"] == ["step 0", "step 1"]
    assert found["act"] == ["add"]
    [run] = in_spans.runs("traced")
    assert run.metrics["total_tokens"] == 2200
    assert run.tags[TREE] == trace.info.trace_id
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run.id
    assert trace.info.tags["qitos.trace_id"] == run.tags["qitos.trace_id"]
    assert trace.info.tags["qitos.agent"] == "asker"
    assert TREE not in trace.info.tags
    linked = in_spans.client.search_traces(locations=[run.experiment_id], run_id=run.id)
    assert [one.info.trace_id for one in linked] == [trace.info.trace_id]
    assert trace.info.token_usage["total_tokens"] == 2200

    own, _ = in_spans.traces("own")
    below = [one for one in in_order(trace) if one["name"] not in ("handle", "look up")]
    assert below == in_order(own)
    assert in_spans.cost("traced") == pytest.approx(in_spans.cost("own") / 2)
    assert in_spans.cost("traced") > 0


def test_traced_coroutines_and_generators(in_spans: Said) -> None:
    """Each call is one tree, also if the agent runs on a thread that it waits for."""
    assert in_spans["awaited"] == ["42", "42"]
    for trace in in_spans.traces("awaited"):
        found = tree(trace)
        assert (found[""], found["handle"]) == (["handle"], ["asker"])
        assert found["asker"] == ["step 0", "step 1"]
    assert len(in_spans.runs("awaited")) == 2
    assert in_spans["generated"] == ["soon", "42", "42"]
    found = tree(in_spans.trace("generated"))
    assert (found[""], found["handle"]) == (["handle"], ["asker", "asker"])


def test_what_goes_on_in_agents(in_spans: Said) -> None:
    """Nested agents, two tools, errors and critics' verdicts are as in an agent's own trace."""
    trace, own = in_spans.trace("nested"), in_spans.trace("nested_own")
    assert tree(trace)["go"] == ["outer"]
    assert tree(trace)["nested"] == ["script"]
    ours = Counter(json.dumps(one, sort_keys=True) for one in in_order(own))
    theirs = Counter(json.dumps(one, sort_keys=True) for one in in_order(trace, but="go"))
    assert theirs == ours
    [failed] = [span for span in trace.data.spans if span.name == "fail"]
    assert failed.status.status_code.value == "ERROR"
    assert not any("sk-proj-aaaa" in json.dumps(one) for one in in_order(trace))
    verdicts = [(one.name, one.value, one.rationale) for one in trace.info.assessments]
    assert verdicts == [(one.name, one.value, one.rationale) for one in own.info.assessments]
    assert len(verdicts) == 3
    [run] = in_spans.runs("nested")
    [run_own] = in_spans.runs("nested_own")
    timed = ("latency", "duration")
    numbers = {key: n for key, n in run.metrics.items() if not any(one in key for one in timed)}
    assert numbers == {key: run_own.metrics[key] for key in numbers}


def test_a_trace_of_the_users_own_code(in_spans: Said) -> None:
    """A trace that is no agent's has a span of its own there, too, also when it fails."""
    trace = in_spans.trace("code")
    assert tree(trace)["top"] == ["a batch", "a bad batch"]
    assert tree(trace)["a batch"] == ["asker"]
    [batch] = [span for span in trace.data.spans if span.name == "a batch"]
    assert (batch.span_type, batch.outputs) == ("CHAIN", "all done")
    [bad] = [span for span in trace.data.spans if span.name == "a bad batch"]
    assert bad.status.status_code.value == "ERROR"
    assert {run.name: run.status for run in in_spans.runs("code")} == {
        "a batch": "FINISHED",
        "asker": "FINISHED",
        "a bad batch": "FAILED",
    }


def test_without_content_and_with_a_plugin(in_spans: Said) -> None:
    """What an agent's own trace leaves out is left out here, and what plugins add is there."""
    trace = in_spans.trace("by_hand")
    agents = [span for span in trace.data.spans if span.name != "top"]
    assert len(agents) > 5
    assert [span.inputs for span in agents] == [None] * len(agents)
    assert [span.outputs for span in agents] == [None] * len(agents)
    assert "private" not in json.dumps([span.to_dict() for span in agents])
    assert trace.info.token_usage["total_tokens"] == 2200
    added = {span.name: span.attributes.get("tool") for span in agents}
    assert added["add"] == "by a plugin"
    assert set(added.values()) == {None, "by a plugin"}
    seen = in_spans["by_hand"]
    assert len(seen) == len(set(seen)) == len(agents), "plugins are asked once for each span"
    [run] = in_spans.runs("by_hand")
    assert run.metrics["seen"] == len(agents)


def test_another_servers_trace_is_its_own(in_spans: Said) -> None:
    """A span of MLflow that goes to another place has no part in the agent's trace."""
    assert tree(in_spans.trace("elsewhere"))[""] == ["asker"]


def test_a_tracer_that_fails_harms_nothing(in_spans: Said) -> None:
    """The agent goes on and the numbers are there."""
    for part in ("no_starts", "no_current"):
        assert in_spans[part] == "42"
        [run] = in_spans.runs(part)
        assert (run.status, run.metrics["total_tokens"]) == ("FINISHED", 2200)


def test_ctrl_c_while_spans_are_sent_leaves_nothing_behind(in_spans: Said) -> None:
    """The end of a trace may wait for that; then its run is no longer MLflow's active one."""
    assert in_spans["interrupted"] is True
    [run] = in_spans.runs("interrupted")
    assert (run.status, run.metrics["total_tokens"]) == ("FINISHED", 2200)


def test_disabled_tracing_is_no_evaluation(in_spans: Said) -> None:
    """`mlflow.tracing.disable()` turns off MLflow's spans, not the agent's trace."""
    assert tree(in_spans.trace("disabled"))[""] == ["asker"]
    assert len(in_spans.runs("disabled")) == 1


def test_a_trace_imports_nothing_of_mlflow(in_spans: Said) -> None:
    """MLflow imports itself bit by bit; the agent's thread is not where that is to happen."""
    assert in_spans["imports"] == []


def test_the_last_trace_is_known(in_spans: Said) -> None:
    """`mlflow.get_last_active_trace_id()` answers after an agent's run, on its thread."""
    found = {one.info.request_preview: one.info.trace_id for one in in_spans.traces("own")}
    assert found == in_spans["own"]


def test_a_call_that_autologging_logs_is_priced_once(in_spans: Said) -> None:
    """Its span is below the agent's, and one of both counts: MLflow's if ours has no tokens."""
    once = in_spans.cost("traced")
    assert once > 0
    for part in ("autologged", "autologged_own", "no_tokens"):
        trace = in_spans.trace(part)
        assert tree(trace)[MODEL] == ["Completions"] * 2
        assert in_spans.cost(part) == pytest.approx(once)
        if part != "no_tokens":
            assert trace.info.token_usage["total_tokens"] == 2200
    # Of its own trace, MLflow leaves out what it sends after the trace's end: docs/traces.md.
    trace = in_spans.trace("autologged_own")
    assert trace.info.cost["total_cost"] == pytest.approx(once)


def test_offline_and_in_forks_it_is_its_own(in_spans: Said, workspace: Path) -> None:
    """Where MLflow's tracer could not deliver it, the agent's trace goes through the spool."""
    uri = ("--tracking-uri", in_spans.uri)
    done = CliRunner().invoke(main, ["sync", *uri, str(workspace / "spool")])
    assert done.exit_code == 0, done.output
    for part in ("forked", "offline"):
        roots = Counter(tree(trace)[""][0] for trace in in_spans.traces(part))
        assert roots == {"top": 1, "asker": 1}
        assert len(in_spans.runs(part)) == 1


# -- evaluations -------------------------------------------------------------------------------

SCORERS = """
from mlflow.genai import evaluate, scorer

@scorer
def calls_add(trace):
    calls = trace.search_spans(span_type="TOOL", name="add")
    return len(calls) == len(trace.search_spans(name="step 0"))

@scorer
def as_expected(outputs, expectations):
    return outputs == expectations["answer"]

def rows(count):
    return [{"inputs": {"question": f"question {n}"}, "expectations": {"answer": "42"}}
            for n in range(count)]

def scores(data, predict, scorers=(calls_add, as_expected)):
    found = evaluate(data=data, predict_fn=predict, scorers=list(scorers))
    return {"run": found.run_id, "metrics": found.metrics}
"""

EVALUATIONS = {
    "six": """
        def predict(question):  # With a number of steps QitOS makes it a task, which has an id.
            return run(question, max_steps=5)

        return scores(rows(6), predict)  # More than MLflow's threads here, which are four.
    """,
    "twice": """
        def predict(question):
            run(question, Autologged)
            return run(question, Autologged)

        return scores(rows(2), predict)
    """,
    "untried": """
        def predict(question):
            run(question)
            return run(question)

        os.environ["MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION"] = "true"
        try:
            return scores(rows(2), predict)
        finally:
            del os.environ["MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION"]
    """,
    "meanwhile": """
        tried, done = threading.Event(), threading.Event()

        def work():
            tried.wait(60)
            run("meanwhile")
            done.set()

        def predict(question):
            tried.set()
            done.wait(60)
            answers = []
            thread = threading.Thread(target=lambda: answers.append(run(question)))
            thread.start()
            thread.join()
            return answers[0]

        worker = threading.Thread(target=work)
        worker.start()
        return scores(rows(1), predict)
    """,
    "logged": """
        from mlflow.genai.datasets import create_dataset
        from mlflow.genai.scorers import ToolCallCorrectness
        from qitos_mlflow import tracing

        for number in range(3):
            run(f"question {number}")
        last = mlflow.get_last_active_trace_id()
        [processor.force_flush(60) for processor in tracing.processors()]
        traces = mlflow.search_traces()
        found = evaluate(data=traces, scorers=[calls_add])
        trace = mlflow.get_trace(last)
        judge = ToolCallCorrectness(should_exact_match=True)
        expected = {"expected_tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]}
        data = create_dataset(name=f"made of {trace.info.trace_id}")
        data.merge_records(traces)

        def predict(task):
            return run(task)

        return {
            "run": found.run_id,
            "metrics": found.metrics,
            "last": trace.info.request_preview,
            "verdict": str(judge(trace=trace, expectations=expected).value),
            "dataset": scores(data, predict, [calls_add]),
        }
    """,
    "hangs": """
        from qitos_mlflow.mlflow_plugin.fluent import mlflow_tree
        from tests.integration.proxy import Hang, Proxy

        mlflow_tree.STALL_S = 0.5  # Sooner than in earnest.
        proxy = Proxy(int(mlflow.get_tracking_uri().rsplit(":", 1)[1]))
        mlflow.set_tracking_uri(proxy.uri)
        tried = []

        def hang():
            if tried:
                proxy.set(Hang())
            return "hung"

        def predict(question):
            model = Priced(MODEL, [act("Hang.", ("hang", {})),
                                   *[act("Add.", ("add", {"a": 1, "b": 2}))] * 5,
                                   answer("Added.", "42")])
            found = DeskAgent("asker", model, [add, hang]).run(
                question, max_steps=9, render=False, trace=False)
            # Nothing has ended it but this.
            proxy.set(None)
            tried.append(question)
            return found

        # What MLflow's exporter was sending is lost: MLflow 3.12 finds no trace then.
        with contextlib.suppress(AttributeError):
            scores(rows(1), predict)
        return tried
    """,
}


@pytest.fixture(scope="module")
def evaluations(shared_server: MlflowServer, workspace: Path) -> Said:
    """Evaluations by `mlflow.genai.evaluate`, of agents and of what agents have logged."""
    return run_parts(shared_server.ensure_running(), EVALUATIONS, SCORERS)


def evaluated(said: Said, part: str, rows: int, runs_of_a_row: int = 1) -> list[LoggedRun]:
    """What every evaluation must have; returns the agents' runs."""
    assert said[part]["metrics"] == {"calls_add/mean": 1.0, "as_expected/mean": 1.0}
    runs = said.runs(part)
    children = [run for run in runs if run.id != said[part]["run"]]
    assert len(children) == rows * runs_of_a_row == len(runs) - 1
    assert {run.tags[PARENT] for run in children} == {said[part]["run"]}
    assert {run.status for run in runs} == {"FINISHED"}
    assert {run.metrics["total_tokens"] for run in children} == {2200}
    assert {run.params["task"] for run in children} == {f"question {n}" for n in range(rows)}
    return children


def test_an_evaluation(evaluations: Said) -> None:
    """Scorers see the agents' tools; each row is a child run and one trace, the trial is none."""
    children = evaluated(evaluations, "six", 6)
    traces = {trace.info.trace_id: trace for trace in evaluations.traces("six")}
    assert {run.tags[TREE] for run in children} == traces.keys()
    assert len(traces) == 6
    for trace in traces.values():
        assert trace.info.trace_metadata["mlflow.sourceRun"] == evaluations["six"]["run"]
        assert trace.info.state.value == "OK"
        found = tree(trace)
        assert (found[""], found["predict"]) == (["predict"], ["asker"])
        assert found["asker"] == ["step 0", "step 1"]
    client = evaluations.client
    for run in children:
        [shown_there] = client.search_traces(locations=[run.experiment_id], run_id=run.id)
        assert shown_there.info.trace_id == run.tags[TREE]
        assert shown_there.info.tags["qitos.trace_id"] == run.tags["qitos.trace_id"]


def test_two_agents_in_a_row_are_one_trace(evaluations: Said) -> None:
    """Also if autologging makes spans in them, for which MLflow would make one trace each."""
    evaluated(evaluations, "twice", 2, runs_of_a_row=2)
    traces = evaluations.traces("twice")
    assert len(traces) == 2
    for trace in traces:
        found = tree(trace)
        assert (found[""], found["predict"]) == (["predict"], ["asker", "asker"])
        assert found[MODEL] == ["Completions"] * 4


def test_an_evaluation_without_a_trial(evaluations: Said) -> None:
    """MLflow puts no span around a row: each agent is a trace, and none of them is deleted."""
    children = evaluated(evaluations, "untried", 2, runs_of_a_row=2)
    traces = {trace.info.trace_id: trace for trace in evaluations.traces("untried")}
    assert {run.tags[TREE] for run in children} == traces.keys()
    assert len(traces) == 4
    assert {trace.info.tags["stop_reason"] for trace in traces.values()} == {"final"}


def test_what_others_do_during_the_trial_is_logged(evaluations: Said) -> None:
    """It is the calls of `predict_fn` that are tried, on whatever thread they start."""
    assert evaluations["meanwhile"]["metrics"] == {"calls_add/mean": 1.0, "as_expected/mean": 1.0}
    tasks = Counter(run.params.get("task") for run in evaluations.runs("meanwhile"))
    assert tasks == {None: 1, "meanwhile": 1, "question 0": 1}


def test_what_agents_have_logged_is_evaluated(evaluations: Said) -> None:
    """By scorers on `search_traces`, by a judge's object, and as a dataset that is run again."""
    said = evaluations["logged"]
    assert said["metrics"] == {"calls_add/mean": 1.0}
    assert said["last"] == "question 2"
    assert said["verdict"] == "yes"
    assert said["dataset"]["metrics"] == {"calls_add/mean": 1.0}
    tasks = Counter(run.params.get("task") for run in evaluations.runs("logged"))
    assert tasks == {None: 2, **{f"question {n}": 2 for n in range(3)}}
    traces = evaluations.traces("logged")
    assert len(traces) == 6
    assert [len(trace.info.assessments) for trace in traces] == [1] * 6


@pytest.mark.browser
def test_the_pages_of_an_evaluation(
    mlflow_server: MlflowServer, browser: Browser, tmp_path: Path
) -> None:
    """A row for each trace with its scores, in it the agents' tree, and the cost of the calls."""
    body = EVALUATIONS["twice"].replace("rows(2)", "rows(3)")
    said = run_parts(mlflow_server, {"rows": body}, SCORERS)
    pages = said.pages("rows")
    page = pages.evaluated(said["rows"]["run"])
    rows = [f'"question": "question {number}"' for number in range(3)]
    scorers = ["calls_add", "as_expected"]
    browser.page_shot(
        page, tmp_path / "rows.png", wait_for_text=["3 of 3", *scorers, *rows], size=LARGE
    )
    trace = said.traces("rows")[0]
    tool, _ = trace.search_spans(span_type="TOOL", name="add")
    text = browser.page_shot(
        f"{page}?selectedEvaluationId={trace.info.trace_id}",
        tmp_path / "tree.png",
        click=[f"css=[data-testid='timeline-tree-node-{tool.span_id}']"],
        wait_for_text=["asker", "step 1", *scorers],
        size=LARGE,
    )
    names = {"predict", "asker", "step 0", "decide", MODEL, "Completions", "act", "add"}
    assert names <= set(text.split("\n"))
    calls = 3 * 2 * 2
    assert said.cost("rows") == pytest.approx(calls * COST_OF_CALL)
    text = browser.page_shot(
        pages.overview, tmp_path / "overview.png", wait_for_text=["Total Cost"], size=LARGE
    )
    [shown, *_] = re.findall(r"\$([\d.]+)\s+Total Cost", text)
    assert float(shown) == pytest.approx(calls * COST_OF_CALL, rel=0.01)
    assert browser.errors == []


# -- a server that fails -----------------------------------------------------------------------


def test_a_server_that_hangs_does_not_hold_the_agent(evaluations: Said) -> None:
    """In the middle of an evaluation, where MLflow sends each span as it ends."""
    assert evaluations["hangs"] == ["question 0"] * 2
    children = [run for run in evaluations.runs("hangs") if PARENT in run.tags]
    assert [run.metrics["total_steps"] for run in children] == [7]


def test_a_kill_loses_nothing_of_the_run(mlflow_server: MlflowServer, experiment_name: str) -> None:
    """What MLflow has not sent is gone; the run's numbers are not."""
    body = f"""
        import signal

        mlflow.set_experiment({experiment_name!r})

        def die():
            [processor.force_flush(60) for processor in qitos_mlflow.tracing.processors()]
            os.kill(os.getpid(), signal.SIGKILL)

        with mlflow.start_span("top"):
            steps = [act("Add.", ("add", {{"a": 1, "b": 2}})), act("Die.", ("die", {{}}))]
            model = Priced(MODEL, steps)
            DeskAgent("asker", model, [add, die]).run("to the end", render=False, trace=False)
    """
    done = run_script(AGENTS, body, check=False, MLFLOW_TRACKING_URI=mlflow_server.uri)
    assert done.returncode == -9, str(done)
    synced = CliRunner().invoke(main, ["sync"])
    assert synced.exit_code == 0, synced.output
    [run] = runs_of(mlflow_server.client, experiment_name)
    assert (run.status, run.metrics["total_tokens"]) == ("KILLED", 2200)
