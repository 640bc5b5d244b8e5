"""What is promised of `MlflowTraceProcessor`: real QitOS agents, a real server, read back."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from qitos.engine.critic import Critic

from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.recording.normalize import nanoseconds
from qitos_mlflow.tracing import SpanType, create_trace
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer, toolbox
from tests.fakes.recorder import Recorder
from tests.integration.logged import AGENT, logged, only_run, run_script, runs_of
from tests.integration.proxy import Hang, Proxy, Refuse
from tests.integration.server import MlflowServer

FAIL = "Thought: try\nAction: fail(why='no luck')"

SNIPPET = """
    from qitos.tracing import add_trace_processor
    from {module} import MlflowTraceProcessor
    from my_agent import agent

    add_trace_processor(MlflowTraceProcessor(experiment_name="qitos-runs", run_name="gaia-eval-001",
                                             tracking_uri="{uri}", tags={{"env": "dev"}}))
    result = agent.run(task="...", return_state=True)
"""


class Grades(Critic):
    """Gives these scores, one a step; None: a verdict without a score."""

    def __init__(self, *scores: Any) -> None:
        self.scores = list(scores)

    def evaluate(self, state: Any, decision: Any, results: list[Any]) -> dict[str, Any]:
        verdict = {"action": "continue", "reason": "as planned"}
        score = self.scores.pop(0)
        return verdict if score is None else {**verdict, "score": score}


def tokens(prompt: int, completion: int) -> dict[str, int]:
    """A model's usage."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def step(trace: Any, data: Any, error: str | None = None) -> None:
    """One span of a trace, from start to finish."""
    trace.create_span(SpanType(data.type), data).start().finish(error)


@pytest.fixture
def log(mlflow_server: MlflowServer, experiment_name: str) -> Iterator[MlflowTraceProcessor]:
    """A processor that logs to the server, in an experiment of the test's own."""
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        yield processor


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


# -- the snippets ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["qitos.tracing.mlflow_processor", "qitos_mlflow"])
def test_the_snippet_logs_a_real_agent(
    module: str, mlflow_server: MlflowServer, client: MlflowClient, tmp_path: Path
) -> None:
    """The documented lines, with nothing before them, log an agent's run, under either name."""
    (tmp_path / "my_agent.py").write_text(AGENT)
    before = {run.id for run in runs_of(client, "qitos-runs")}
    run_script(SNIPPET.format(module=module, uri=mlflow_server.uri))
    run = next(run for run in runs_of(client, "qitos-runs") if run.id not in before)
    assert (run.name, run.status) == ("gaia-eval-001", "FINISHED")
    assert run.tags["env"] == "dev"
    assert run.tags["stop_reason"] == "final"
    assert run.metrics["total_tokens"] == 30
    assert run.params["agent_name"] == "asker"


def test_without_mlflow_the_import_says_how_to_get_it() -> None:
    """Importing the processor without mlflow is an ImportError that names the pip command."""
    done = run_script(
        """
        import sys
        sys.modules["mlflow"] = None  # As if it were not installed.
        import qitos_mlflow
        for module in ("qitos_mlflow", "qitos.tracing.mlflow_processor"):
            try:
                exec(f"from {module} import MlflowTraceProcessor")
            except ImportError as error:
                print(error)
        """
    )
    assert done.stdout.count("pip install mlflow") == 2


def test_nothing_but_the_background_imports_mlflow(mlflow_server: MlflowServer) -> None:
    """Importing, constructing and a whole run at an http server never import mlflow."""
    run_script(
        f"""
        import sys
        import qitos_mlflow
        from qitos_mlflow import MlflowTraceProcessor
        from qitos.tracing import add_trace_processor
        processor = MlflowTraceProcessor(tracking_uri={mlflow_server.uri!r})
        add_trace_processor(processor)
        """,
        AGENT,
        """
        agent.run("sum", render=False)
        assert processor.force_flush() is True
        assert "mlflow" not in sys.modules
        """,
    )


# -- the two tables --------------------------------------------------------------------------


def test_each_span_is_logged_at_its_step(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Metrics of every span, to the digit: the x axis is the step's number, the time its end."""
    recorder = Recorder()
    tracing.add_trace_processor(recorder)
    model = Model(
        answer(ADD, usage=tokens(100, 7), model_name="gpt-x"),
        answer(FAIL, usage=tokens(210, 9), model_name="gpt-x"),
        answer(FINAL, usage=tokens(330, 11), model_name="gpt-x"),
    )
    try:
        ModelAgent(model).run("sum", critics=[Grades(0.25, None, 1.0)], render=False)
    finally:
        tracing.remove_trace_processor(recorder)
    assert log.force_flush() is True

    run = only_run(client, experiment_name)
    assert run.points("generation/prompt_tokens") == [(0, 100), (1, 210), (2, 330)]
    assert run.points("generation/completion_tokens") == [(0, 7), (1, 9), (2, 11)]
    assert run.points("generation/total_tokens") == [(0, 107), (1, 219), (2, 341)]
    assert run.points("step/number") == [(0, 0), (1, 1), (2, 2)]
    assert run.points("critic/score") == [(0, 0.25), (2, 1.0)]
    assert run.tags["tool/name"] == "fail"
    assert "action/name" not in run.tags
    for kind, key in (("generation", "generation/total_tokens"), ("step", "step/number")):
        ends = [(nanoseconds(node.ended_at) or 0) // 1_000_000 for node in recorder.of(kind)]
        assert [point.timestamp for point in run.history(key)] == ends
    for kind in ("generation", "step", "tool"):
        lasted = [
            ((nanoseconds(node.ended_at) or 0) - (nanoseconds(node.started_at) or 0)) / 1e6
            for node in recorder.of(kind)
        ]
        assert [value for _, value in run.points(f"{kind}/latency_ms")] == lasted


def test_the_totals_of_a_run(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Totals, scores and stop reason at the end of the trace, to the digit."""
    model = Model(
        answer(ADD, usage=tokens(100, 7), model_name="gpt-x"),
        answer(FAIL, usage={"input_tokens": 20, "output_tokens": 3}, model_name="gpt-y"),
        answer(FINAL),
    )
    ModelAgent(model).run("sum", critics=[Grades(0.25, 0.5, 1.0)], render=False)
    assert log.force_flush() is True

    run = only_run(client, experiment_name)
    wanted = {
        "total_tokens": 130,
        "total_prompt_tokens": 120,
        "total_completion_tokens": 10,
        "total_generations": 3,
        "total_steps": 3,
        "total_tool_calls": 2,
        "critic/avg_score": 1.75 / 3,
        "critic/min_score": 0.25,
        "critic/max_score": 1.0,
        "tool/error_rate": 0.5,
        "tool/add/calls": 1,
        "tool/add/errors": 0,
        "tool/fail/calls": 1,
        "tool/fail/errors": 1,
        "model/gpt-x/total_tokens": 107,
        "model/gpt-y/total_tokens": 23,
        "success": 1,
    }
    assert {key: run.metrics.get(key) for key in wanted} == wanted
    assert {key: run.points(key) for key in wanted} == {key: [(2, wanted[key])] for key in wanted}
    assert run.tags["stop_reason"] == "final"
    assert run.status == "FINISHED"  # A tool failed, the run did not.
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"]
    assert {"qitos.spans.dropped", "qitos.values.dropped"}.isdisjoint(run.tags)


def test_what_went_into_a_run_is_its_params(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Agent, model, protocol, limits and versions are params, and the run has the agent's name."""
    ModelAgent(Model(FINAL)).run("sum", max_steps=4, render=False)
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    assert run.name == "asker"
    wanted = {
        "agent_name": "asker",
        "model_name": "scripted-1",
        "protocol": "react_text_v1",
        "max_steps": "4",
        "task": "sum",
        "qitos_version": "0.3.0",
    }
    assert {key: run.params.get(key) for key in wanted} == wanted
    assert run.params["qitos_mlflow_version"]


def test_an_action_span_counts_where_it_names_its_action(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Tool calls are tool spans plus action spans with a name; those without one say nothing."""
    with create_trace("by hand") as trace:
        step(trace, tracing.StepSpanData(7))
        step(trace, tracing.ActSpanData(action_name="look up"))
        step(trace, tracing.ActSpanData())
        step(trace, tracing.ToolSpanData(tool_name="search"))
        step(trace, tracing.MCPSpanData(server_name="files", tool_name="read"))
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    assert run.tags["action/name"] == "look up"
    assert run.tags["tool/name"] == "read"
    assert run.metrics["total_tool_calls"] == 3
    assert run.points("step/number") == [(7, 7)]
    assert run.metrics["total_steps"] == 1


def test_nothing_is_made_up_for_what_a_run_does_not_have(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Without critics, usage or tools there are no scores and tokens, and the totals are zero."""
    ModelAgent(Model(FINAL)).run("sum", render=False)
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    absent = ("critic/", "generation/prompt", "generation/compl", "generation/total", "tool/")
    assert [key for key in run.metrics if key.startswith(absent)] == []
    assert "tool/name" not in run.tags
    assert (run.metrics["total_tokens"], run.metrics["total_tool_calls"]) == (0, 0)


def test_a_whole_tree_beside_the_numbers(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """The run has one MLflow trace with every span of the agent."""
    ModelAgent(Model(ADD, FINAL)).run("sum", render=False)
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_traces(
        locations=[experiment.experiment_id], filter_string=f"attributes.run_id = '{run.id}'"
    )
    assert len(found.data.spans) == int(run.tags["qitos.spans.recorded"]) == 11


# -- how a run ends --------------------------------------------------------------------------


def interrupted() -> Any:
    raise KeyboardInterrupt


class Broken(Critic):
    """Leaves the run with an exception."""

    def evaluate(self, state: Any, decision: Any, results: list[Any]) -> Any:
        raise OSError("no paper left")


@pytest.mark.parametrize(
    ("script", "options", "raised", "status", "stop_reason"),
    [
        ([ADD, FINAL], {}, None, "FINISHED", "final"),
        ([FAIL, FINAL], {}, None, "FINISHED", "final"),
        ([ADD], {"max_steps": 2}, None, "FINISHED", "budget_steps"),
        ([RuntimeError("no such model")], {}, None, "FAILED", "unrecoverable_error"),
        ([FINAL], {"critics": [Broken()]}, OSError, "FAILED", "unrecoverable_error"),
        ([KeyboardInterrupt()], {}, KeyboardInterrupt, "KILLED", "interrupted"),
        (["Thought: x\nAction: interrupted()"], {}, KeyboardInterrupt, "KILLED", "interrupted"),
    ],
    ids=["good", "tool-error", "budget", "model-error", "critic-error", "ctrl-c", "ctrl-c-in-tool"],
)
def test_the_status_says_how_the_agent_ended(
    log: MlflowTraceProcessor,
    client: MlflowClient,
    experiment_name: str,
    script: list[Any],
    options: dict[str, Any],
    raised: type[BaseException] | None,
    status: str,
    stop_reason: str,
) -> None:
    """FINISHED, FAILED for what cannot go on, KILLED for an interrupt; the exception goes on."""
    agent = ModelAgent(Model(*script), toolbox(interrupted=interrupted))
    if raised is None:
        agent.run("sum", render=False, **options)
    else:
        with pytest.raises(raised):
            agent.run("sum", render=False, **options)
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    assert (run.status, run.tags["stop_reason"]) == (status, stop_reason)
    assert run.metrics["success"] == (stop_reason == "final")


def test_a_script_that_is_interrupted(
    mlflow_server: MlflowServer, client: MlflowClient, experiment_name: str
) -> None:
    """Ctrl-C ends the script as ever, and its run as KILLED before the process is gone."""
    done = run_script(
        f"""
        import os, signal
        from tests.bridge.agents import FINAL, Model, ModelAgent, toolbox
        from qitos_mlflow import MlflowTraceProcessor
        from qitos.tracing import add_trace_processor

        # A job in the background of a shell without job control begins with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def work():
            os.kill(os.getpid(), signal.SIGINT)

        add_trace_processor(
            MlflowTraceProcessor({experiment_name!r}, tracking_uri={mlflow_server.uri!r})
        )
        ModelAgent(Model("Thought: x\\nAction: work()", FINAL), toolbox(work=work)).run("sum")
        """,
        check=False,
    )
    assert done.returncode in (-signal.SIGINT, 130), str(done)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    run = only_run(client, experiment_name)
    assert (run.status, run.metrics["success"]) == ("KILLED", 0)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_the_status_of_a_with_block_that_is_left(
    log: MlflowTraceProcessor,
    client: MlflowClient,
    experiment_name: str,
    error: BaseException,
    status: str,
) -> None:
    """An exception that leaves the block of a trace made by hand decides its status."""
    with pytest.raises(type(error)), create_trace("by hand"):
        raise error
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    assert run.status == status
    assert run.tags["qitos.error"].startswith(type(error).__name__)


def test_a_retry_inside_an_except_clause_succeeds(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """An exception that was being handled before the trace began is not the trace's own."""
    try:
        raise ConnectionError("first try")
    except ConnectionError:
        with create_trace("second try"):
            pass
        ModelAgent(Model(FINAL)).run("third try", render=False)
    assert log.force_flush() is True
    assert [run.status for run in runs_of(client, experiment_name)] == ["FINISHED"] * 2


# -- one processor, many traces --------------------------------------------------------------


def test_traces_one_after_another_share_nothing(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """A second trace starts from zero: totals, scores, models and tools are its own."""
    model = Model(
        answer(ADD, usage=tokens(100, 7), model_name="gpt-x"),
        answer(FINAL, usage=tokens(1, 1), model_name="gpt-x"),
    )
    ModelAgent(model).run("sum", critics=[Grades(0.1, 0.2)], render=False)
    model = Model(answer(FINAL, usage=tokens(5, 2), model_name="gpt-y"))
    ModelAgent(model).run("sum", critics=[Grades(0.9)], render=False)
    assert log.force_flush() is True
    _, second = runs_of(client, experiment_name)
    assert second.metrics["total_tokens"] == 7
    assert second.metrics["total_steps"] == 1
    assert second.metrics["total_tool_calls"] == 0
    assert second.metrics["critic/avg_score"] == 0.9
    assert second.params["model_name"] == "scripted-1"
    assert "model/gpt-x/total_tokens" not in second.metrics
    assert "tool/name" not in second.tags


def test_a_trace_inside_a_trace_is_a_run_of_its_own(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Of two nested traces each has its own numbers and its own end."""
    with create_trace("outer") as outer:
        step(outer, tracing.GenerationSpanData(token_usage=tokens(1, 1)))
        with create_trace("inner") as inner:
            step(inner, tracing.GenerationSpanData(token_usage=tokens(10, 10)))
        step(outer, tracing.GenerationSpanData(token_usage=tokens(2, 2)))
    assert log.force_flush() is True
    runs = {run.name: run for run in runs_of(client, experiment_name)}
    assert {name: run.metrics["total_tokens"] for name, run in runs.items()} == {
        "outer": 6,
        "inner": 20,
    }
    assert {run.status for run in runs.values()} == {"FINISHED"}


def test_processors_of_others_hear_everything_as_before(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Ours is appended, stands beside others in either order, and leaves with `set` alone."""
    first, last = Recorder(), Recorder()
    tracing.set_trace_processors([first, log, last])
    try:
        ModelAgent(Model(ADD, FINAL)).run("sum", render=False)
        assert tracing.processors() == (first, log, last)
        tracing.set_trace_processors([last])
        ModelAgent(Model(FINAL)).run("sum", render=False)
    finally:
        tracing.set_trace_processors([])
    assert log.force_flush() is True
    assert len(runs_of(client, experiment_name)) == 1
    assert (len(first.ended), len(last.ended)) == (1, 2)
    first.check()
    last.check()


def test_the_hosts_own_log_is_what_it_was(log: MlflowTraceProcessor, tmp_path: Path) -> None:
    """QitOS's run directory has the same events and steps with and without a processor."""

    def written(attached: bool) -> dict[str, list[Any]]:
        if not attached:
            tracing.set_trace_processors([])
        directory = tmp_path / str(attached)
        ModelAgent(Model(ADD, FINAL)).run("sum", render=False, trace_logdir=str(directory))
        (run_dir,) = directory.iterdir()
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        steps = (run_dir / "steps.jsonl").read_text().splitlines()
        return {"events": [(e["phase"], e["step_id"]) for e in events], "steps": [len(steps)]}

    assert written(attached=True) == written(attached=False)


# -- the server's absence --------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Hang(), Refuse()], ids=["hangs", "refuses"])
def test_the_agent_never_waits_for_an_answer(
    proxy: Proxy, client: MlflowClient, experiment_name: str, fault: Any
) -> None:
    """A whole run goes by while the server gives no answer at all, and arrives afterwards."""
    proxy.set(fault)
    options = {"experiment_name": experiment_name, "start_timeout_s": 0.05}
    with logged(proxy.uri, **options) as processor:
        result = ModelAgent(Model(ADD, FINAL)).run("sum", render=False, return_state=True)
        assert result.state.final_result == "42"
        assert processor.force_flush(timeout_s=0.05) is False
        assert [request.status for request in proxy.requests if request.status] == []
        proxy.set(None)
        assert processor.force_flush(timeout_s=30) is True
    run = only_run(client, experiment_name)
    assert (run.status, run.metrics["total_steps"]) == ("FINISHED", 2)


def test_a_deleted_experiment_is_reported_and_nothing_is_lost(
    log: MlflowTraceProcessor,
    client: MlflowClient,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """What goes to a deleted experiment is kept aside, and a flush does not claim otherwise."""
    client.delete_experiment(client.create_experiment(experiment_name))
    ModelAgent(Model(FINAL)).run("sum", render=False)
    assert log.force_flush() is False
    log.shutdown()
    kept = "".join(path.read_text("utf-8", "replace") for path in tmp_path.rglob("*dead*"))
    assert "mlflow experiments restore" in kept
    assert "generation" in kept


# -- shutdown --------------------------------------------------------------------------------


def test_shutdown_ends_open_runs_early(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """From any thread and any number of times; the run of an open trace is ended, once."""
    with create_trace("long") as trace:
        step(trace, tracing.StepSpanData(0))
        threads = [threading.Thread(target=log.shutdown) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run = only_run(client, experiment_name)
        assert run.status == "FINISHED"
        assert run.metrics["total_steps"] == 1
        step(trace, tracing.StepSpanData(1))
    log.shutdown()
    assert only_run(client, experiment_name).metrics["total_steps"] == 1


def test_a_flush_that_succeeds_means_on_the_server(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """After True the run of an open trace has everything recorded so far."""
    with create_trace("long") as trace:
        for number in range(3):
            step(trace, tracing.StepSpanData(number))
            assert log.force_flush() is True
            run = only_run(client, experiment_name)
            assert run.points("step/number") == [(n, n) for n in range(number + 1)]
            assert run.status == "RUNNING"
