"""Inside MLflow's own spans: one tree, which `mlflow.genai.evaluate` and its scorers see, too.

Each script runs in a process of its own, with the package installed and MLflow's tracer at work.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Span, Trace

from qitos_mlflow.cli import main
from tests.integration.logged import LoggedRun, run_script, runs_of
from tests.integration.server import MlflowServer

PARENT = "mlflow.parentRunId"
TREE = "qitos.mlflow_trace_id"
MODEL = "gpt-4o-mini"

AGENTS = """
import json, os, sys, threading
import mlflow
from qitos import Decision
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

def run(task, kind=Priced):
    model = kind(MODEL, [act("Add.", ("add", {"a": 1, "b": 2})), answer("Added.", "42")])
    agent = DeskAgent("asker", model, [add])
    return agent.run(task, render=False, trace=False)
"""


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def name() -> str:
    """Of an experiment that no other test logs to."""
    return f"mlflow traces {uuid.uuid4().hex[:12]}"


def script(body: str, server: MlflowServer, name: str, **environ: str) -> dict[str, Any]:
    """Run `body` in the experiment; returns what it prints as JSON at its end."""
    begin = f"mlflow.set_experiment({name!r})"
    done = run_script(
        AGENTS,
        begin,
        body,
        MLFLOW_TRACKING_URI=server.uri,
        MLFLOW_RUN_ID=None,
        MLFLOW_GENAI_EVAL_MAX_WORKERS="4",
        **environ,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def traces_of(client: MlflowClient, name: str) -> list[Trace]:
    experiment = client.get_experiment_by_name(name)
    return list(client.search_traces(locations=[experiment.experiment_id], max_results=100))


def only(client: MlflowClient, name: str) -> Trace:
    [trace] = traces_of(client, name)
    return trace


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


def cost(client: MlflowClient, name: str) -> float:
    """What the Overview page says that an experiment's calls cost: the sum over all spans."""
    spans = [span for trace in traces_of(client, name) for span in trace.data.spans]
    return sum((span.llm_cost or {}).get("total_cost", 0.0) for span in spans)


# -- one tree ----------------------------------------------------------------------------------


def test_a_traced_function(mlflow_server: MlflowServer, client: MlflowClient, name: str) -> None:
    """The agent is its subtree, with all that an agent's own trace shows; run and trace link."""
    said = script(
        """
        @mlflow.trace
        def handle(question):
            with mlflow.start_span("look up"):
                pass
            found = run(question)
            inner = mlflow.get_current_active_span()
            return [found, inner.name]

        value = handle("how much?")
        print(json.dumps({"last": mlflow.get_last_active_trace_id(), "value": value}))
        """,
        mlflow_server,
        name,
    )
    trace = only(client, name)
    assert said == {"last": trace.info.trace_id, "value": ["42", "handle"]}
    found = tree(trace)
    assert found[""] == ["handle"]
    assert found["handle"] == ["look up", "asker"]
    assert found["asker"] == ["step 0", "step 1"]
    assert found["act"] == ["add"]
    [run] = runs_of(client, name)
    assert run.metrics["total_tokens"] == 2200
    assert run.tags[TREE] == trace.info.trace_id
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run.id
    assert trace.info.tags["qitos.trace_id"] == run.tags["qitos.trace_id"]
    assert trace.info.tags["qitos.agent"] == "asker"
    assert TREE not in trace.info.tags
    linked = client.search_traces(locations=[run.experiment_id], run_id=run.id)
    assert [one.info.trace_id for one in linked] == [trace.info.trace_id]
    assert trace.info.token_usage["total_tokens"] == 2200

    script('run("how much?")', mlflow_server, f"{name} own")
    own = only(client, f"{name} own")
    below = [one for one in in_order(trace) if one["name"] not in ("handle", "look up")]
    assert below == in_order(own)
    assert cost(client, name) == pytest.approx(cost(client, f"{name} own"))
    assert cost(client, name) > 0


def test_what_goes_on_in_agents(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Nested agents, two tools, errors and critics' verdicts are as in an agent's own trace."""
    body = """
        from qitos.engine.critic import Critic

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
        """
    script(f"{body}\n        mlflow.trace(go)()\n", mlflow_server, name)
    script(f"{body}\n        go()\n", mlflow_server, f"{name} own")
    trace, own = only(client, name), only(client, f"{name} own")
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
    [run] = runs_of(client, name)
    [run_own] = runs_of(client, f"{name} own")
    timed = ("latency", "duration")
    numbers = {key: n for key, n in run.metrics.items() if not any(one in key for one in timed)}
    assert numbers == {key: run_own.metrics[key] for key in numbers}


def test_a_trace_of_the_users_own_code(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """A trace that is no agent's has a span of its own there, too, also when it fails."""
    script(
        """
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
        mlflow_server,
        name,
    )
    trace = only(client, name)
    assert tree(trace)["top"] == ["a batch", "a bad batch"]
    assert tree(trace)["a batch"] == ["asker"]
    [batch] = [span for span in trace.data.spans if span.name == "a batch"]
    assert (batch.span_type, batch.outputs) == ("CHAIN", "all done")
    [bad] = [span for span in trace.data.spans if span.name == "a bad batch"]
    assert bad.status.status_code.value == "ERROR"
    assert {run.name: run.status for run in runs_of(client, name)} == {
        "a batch": "FINISHED",
        "asker": "FINISHED",
        "a bad batch": "FAILED",
    }


def test_without_content(mlflow_server: MlflowServer, client: MlflowClient, name: str) -> None:
    """What is left out of an agent's own trace is left out of MLflow's: the tree stays."""
    script(
        """
        with mlflow.start_span("top"):
            run("a private question")
        """,
        mlflow_server,
        name,
        QITOS_MLFLOW_CAPTURE_CONTENT="0",
    )
    trace = only(client, name)
    agents = [span for span in trace.data.spans if span.name != "top"]
    assert len(agents) > 5
    assert [span.inputs for span in agents] == [None] * len(agents)
    assert [span.outputs for span in agents] == [None] * len(agents)
    assert "private" not in json.dumps([span.to_dict() for span in agents])
    assert trace.info.token_usage["total_tokens"] == 2200


def test_another_servers_trace_is_its_own(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, tmp_path: Any
) -> None:
    """A span of MLflow that goes to another place has no part in the agent's trace."""
    script(
        f"""
        import qitos_mlflow
        uri = mlflow.get_tracking_uri()
        qitos_mlflow.autolog(tracking_uri=uri, experiment_name={name!r})
        mlflow.set_tracking_uri("sqlite:///{tmp_path}/other.db")
        with mlflow.start_span("elsewhere"):
            run("here")
        """,
        mlflow_server,
        name,
    )
    assert tree(only(client, name))[""] == ["asker"]


def test_offline_and_in_forks_it_is_its_own(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Where MLflow's tracer could not deliver it, the agent's trace goes through the spool."""
    forks = """
        with mlflow.start_span("top"):
            if (pid := os.fork()) == 0:
                run("in a fork")
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
        """
    script(forks, mlflow_server, name)
    script('with mlflow.start_span("top"):\n    run("offline")', mlflow_server, name,
           QITOS_MLFLOW_OFFLINE="1")  # fmt: skip
    done = CliRunner().invoke(main, ["sync"])
    assert done.exit_code == 0, done.output
    roots = Counter(tree(trace)[""][0] for trace in traces_of(client, name))
    assert roots == {"top": 2, "asker": 2}
    assert {run.params["task"] for run in runs_of(client, name)} == {"in a fork", "offline"}


@pytest.mark.parametrize("broken", ["start_span_no_context", "get_current_active_span"])
def test_a_tracer_that_fails_harms_nothing(
    broken: str, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """The agent goes on and the numbers are there."""
    said = script(
        f"""
        def fails(*args, **kwargs):
            raise ValueError("a tracer's")

        with mlflow.start_span("top"):
            mlflow.{broken} = fails
            print(json.dumps({{"value": run("on and on")}}))
        """,
        mlflow_server,
        name,
    )
    assert said == {"value": "42"}
    [run] = runs_of(client, name)
    assert (run.status, run.metrics["total_tokens"]) == ("FINISHED", 2200)


def test_disabled_tracing_is_no_evaluation(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """`mlflow.tracing.disable()` turns off MLflow's spans, not the agent's trace."""
    script('mlflow.tracing.disable()\nrun("as ever")', mlflow_server, name)
    assert tree(only(client, name))[""] == ["asker"]
    assert len(runs_of(client, name)) == 1


def test_a_trace_imports_nothing_of_mlflow(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """MLflow imports itself bit by bit; the agent's thread is not where that is to happen."""
    said = script(
        """
        before = set(sys.modules)
        run("as ever")
        more = {one for one in set(sys.modules) - before if one.split(".")[0] == "mlflow"}
        print(json.dumps({"imported": sorted(more)}))
        """,
        mlflow_server,
        name,
    )
    assert said == {"imported": []}


# -- evaluations -------------------------------------------------------------------------------

EVALUATE = """
        from mlflow.genai import evaluate, scorer

        @scorer
        def calls_add(trace):
            return len(trace.search_spans(span_type="TOOL", name="add")) == 1

        @scorer
        def as_expected(outputs, expectations):
            return outputs == expectations["answer"]

        def predict(question):
            return run(question, Kind)

        rows = [{"inputs": {"question": f"question {n}"}, "expectations": {"answer": "42"}}
                for n in range(20)]
        found = evaluate(data=rows, predict_fn=predict, scorers=[calls_add, as_expected])
        print(json.dumps({"run": found.run_id, "metrics": found.metrics}))
"""


def evaluated(client: MlflowClient, name: str, said: dict[str, Any]) -> list[LoggedRun]:
    """What every evaluation of 20 rows must have; returns the agents' runs."""
    assert said["metrics"]["calls_add/mean"] == 1.0
    assert said["metrics"]["as_expected/mean"] == 1.0
    runs = runs_of(client, name)
    assert len(runs) == 21
    children = [run for run in runs if run.id != said["run"]]
    assert {run.tags[PARENT] for run in children} == {said["run"]}
    assert {run.status for run in runs} == {"FINISHED"}
    assert {run.metrics["total_tokens"] for run in children} == {2200}
    tasks = {run.params["task"] for run in children}
    assert tasks == {f"question {n}" for n in range(20)}
    traces = {trace.info.trace_id: trace for trace in traces_of(client, name)}
    assert {run.tags[TREE] for run in children} == traces.keys()
    assert len(traces) == 20
    for trace in traces.values():
        assert trace.info.trace_metadata["mlflow.sourceRun"] == said["run"]
        assert trace.info.state.value == "OK"
    for run in children:
        [shown_there] = client.search_traces(locations=[run.experiment_id], run_id=run.id)
        assert shown_there.info.trace_id == run.tags[TREE]
        assert shown_there.info.tags["qitos.trace_id"] == run.tags["qitos.trace_id"]
    return children


def test_an_evaluation(mlflow_server: MlflowServer, client: MlflowClient, name: str) -> None:
    """Scorers see the agents' tools; each row is a child run and one trace, the trial is none."""
    said = script("Kind = Priced" + EVALUATE.replace("\n        ", "\n"), mlflow_server, name)
    evaluated(client, name, said)
    for trace in traces_of(client, name):
        found = tree(trace)
        assert found[""] == ["predict"]
        assert found["predict"] == ["asker"]
        assert found["asker"] == ["step 0", "step 1"]


def test_an_evaluation_with_autolog(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """MLflow leaves out the span of `predict_fn` if the trial made spans; still one trace each."""
    said = script("Kind = Autologged" + EVALUATE.replace("\n        ", "\n"), mlflow_server, name)
    evaluated(client, name, said)
    for trace in traces_of(client, name):
        found = tree(trace)
        assert len(found[""]) == 1
        assert found["asker"] == ["asker", "step 0", "step 1"]  # The trace's span and the agent's.
        assert found[MODEL] == ["Completions"] * 2


def test_an_evaluation_of_plain_agents_traces(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """`search_traces` finds them and `evaluate` scores them, without another run of an agent."""
    said = script(
        """
        from mlflow.genai import evaluate, scorer
        from qitos_mlflow import tracing

        @scorer
        def calls_add(trace):
            return len(trace.search_spans(span_type="TOOL", name="add")) == 1

        for number in range(3):
            run(f"question {number}")
        last = mlflow.get_last_active_trace_id()
        [processor.force_flush(60) for processor in tracing.processors()]
        traces = mlflow.search_traces()
        found = evaluate(data=traces, scorers=[calls_add])
        same = mlflow.get_trace(last).info.request_preview
        print(json.dumps({"run": found.run_id, "metrics": found.metrics, "last": same}))
        """,
        mlflow_server,
        name,
    )
    assert said["metrics"] == {"calls_add/mean": 1.0}
    assert said["last"] == "question 2"
    assert len(runs_of(client, name)) == 4
    traces = traces_of(client, name)
    assert len(traces) == 3
    assert [len(trace.info.assessments) for trace in traces] == [1] * 3


# -- what MLflow's autologging adds ------------------------------------------------------------


@pytest.mark.parametrize("around", [True, False])
def test_a_call_is_priced_once(
    around: bool, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """The span of a call that autologging makes is below the agent's, and one of both counts."""
    body = 'run("how much?", {kind})'
    if around:
        body = f'with mlflow.start_span("top"):\n    {body}'
    script(body.format(kind="Priced"), mlflow_server, f"{name} plain")
    script(body.format(kind="Autologged"), mlflow_server, name)

    trace = only(client, name)
    assert tree(trace)[MODEL] == ["Completions"] * 2
    assert cost(client, f"{name} plain") > 0
    assert cost(client, name) == pytest.approx(cost(client, f"{name} plain"))
    assert trace.info.token_usage["total_tokens"] == 2200
    assert trace.info.cost["total_cost"] == pytest.approx(cost(client, name))


def test_the_price_is_autologs_if_the_agent_knows_no_tokens(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """A call whose tokens only MLflow's span has is not free."""
    script(
        """
        Autologged.knows_tokens = False
        run("how much?", Autologged)
        """,
        mlflow_server,
        name,
    )
    assert cost(client, name) > 0


def test_the_last_trace_is_known(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """`mlflow.get_last_active_trace_id()` answers after an agent's run, on its thread."""
    said = script(
        """
        run("one")
        first = mlflow.get_last_active_trace_id(thread_local=True)
        run("two")
        print(json.dumps({"one": first, "two": mlflow.get_last_active_trace_id()}))
        """,
        mlflow_server,
        name,
    )
    found = {one.info.request_preview: one.info.trace_id for one in traces_of(client, name)}
    assert found == said
