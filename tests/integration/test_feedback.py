"""`qitos_mlflow.score` and `expect`: what is said of a run after it has ended is in MLflow, once.

Each script runs in a process of its own, with the package installed and nothing set in its code.
"""

from __future__ import annotations

import json
import textwrap
import uuid
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import AssessmentSource

from qitos_mlflow import expect, score
from qitos_mlflow.cli import main
from qitos_mlflow.mlflow_plugin.sink import assessments
from tests.integration.logged import AGENT, Done, LoggedRun, logged, only_run, run_script, runs_of
from tests.integration.proxy import Cut, Proxy, Refuse
from tests.integration.server import MlflowServer

RUN = """
import json, os, signal, sys
import qitos_mlflow
from qitos_mlflow import context, expect, score

def run(task):
    return ModelAgent(Model(FINAL)).run(task, return_state=True, render=False, trace=False)

def flush():
    from qitos_mlflow import tracing
    assert tracing.get_tracing_provider().force_flush() is not False
"""


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def name() -> str:
    """Of an experiment that no other test logs to."""
    return f"feedback {uuid.uuid4().hex[:12]}"


def script(uri: str, name: str, body: str, *, check: bool = True, **environ: str) -> Done:
    """Run `body` with a server and an experiment configured."""
    return run_script(
        *(AGENT, RUN, textwrap.dedent(body)),
        check=check,
        MLFLOW_TRACKING_URI=uri,
        QITOS_MLFLOW_EXPERIMENT_NAME=name,
        QITOS_MLFLOW_FLUSH_TIMEOUT_S="90",
        **environ,
    )


def qitos_mlflow_command(*arguments: str, exit_code: int = 0) -> str:
    """What `qitos-mlflow` says on stdout."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == exit_code, done.output
    return done.output


def synced(server: MlflowServer, exit_code: int = 0) -> None:
    """Have `qitos-mlflow sync` deliver what waits."""
    qitos_mlflow_command("sync", "--tracking-uri", server.uri, exit_code=exit_code)


def said_of(client: MlflowClient, trace_id: str) -> dict[str, Any]:
    """The assessments of a trace by their names; fails if there are two of one name and source."""
    found = client.get_trace(trace_id).info.assessments
    named = {(one.name, one.source.source_id): one for one in found}
    assert len(named) == len(found), found
    return {one.name: one for one in found}


def trace_of(client: MlflowClient, run: LoggedRun) -> str:
    """MLflow's id of the trace of a run."""
    [trace] = client.search_traces(locations=[run.experiment_id], run_id=run.id)
    return str(trace.info.trace_id)


def test_what_can_be_scored(mlflow_server: MlflowServer, client: MlflowClient, name: str) -> None:
    """A result, a context, a Trace, both ids; while the trace is open, and after it has ended."""
    script(
        mlflow_server.uri,
        name,
        """
        from mlflow.entities import AssessmentSource
        with context() as request:
            result = run("the task")
        score(result, "correct", True, rationale="it is", source="a test", source_type="HUMAN")
        score(request, "relevance", 0.25, source=AssessmentSource("LLM_JUDGE", "judge"))
        score(request.trace_ids[0], "label", "good", metadata={"version": 3})
        expect(result, "answer", {"parts": [1, "two", None]})
        expect(result, "length", 42)
        flush()
        score(request.trace_ids[0], "later", 7)

        from qitos.tracing import StepSpanData, SpanType, create_trace
        with create_trace("by hand") as trace:
            trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
            score(trace, "open", 1.5)
            score(trace, "open", 2.5)
        score(trace.trace_id, "ended", False)
        """,
    )
    by_task = {run.params.get("task"): run for run in runs_of(client, name)}
    run, by_hand = by_task["the task"], by_task[None]
    said = said_of(client, trace_of(client, run))
    values = {key: one.value for key, one in said.items()}
    assert values == {
        "correct": True,
        "relevance": 0.25,
        "label": "good",
        "later": 7,
        "answer": {"parts": [1, "two", None]},
        "length": 42,
    }
    assert (said["correct"].rationale, said["correct"].source.source_type) == ("it is", "HUMAN")
    assert said["relevance"].source == AssessmentSource("LLM_JUDGE", "judge")
    assert said["label"].metadata["version"] == "3"
    assert type(said["answer"]).__name__ == "Expectation"
    numbers = {key: run.metrics.get(key) for key in values}
    assert numbers == {**dict.fromkeys(values), "correct": 1, "relevance": 0.25, "later": 7}
    said = said_of(client, trace_of(client, by_hand))
    assert {key: one.value for key, one in said.items()} == {"open": 2.5, "ended": False}
    assert (by_hand.metrics["open"], by_hand.metrics["ended"]) == (2.5, 0)
    assert {run.status for run in by_task.values()} == {"FINISHED"}


def test_the_last_score_of_a_name_and_source_counts(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Those of other sources stay, and so do a person's own, and what a person has overridden."""
    with logged(mlflow_server.uri, experiment_name=name) as processor:
        [trace_id] = ended_traces(processor)
        score(trace_id, "quality", 1, rationale="first", source="a")
        score(trace_id, "quality", 2, source="b")
        assert processor.force_flush()
        [first] = [
            one
            for one in client.get_trace(trace_id).info.assessments
            if one.source.source_id == "a"
        ]
        theirs = mlflow.entities.Feedback(
            name="quality", value=9, source=AssessmentSource("HUMAN", "a"), overrides=None
        )
        tracing_client(mlflow_server).log_assessment(trace_id, theirs)
        score(trace_id, "quality", 3, rationale="again", source="a")
        score(trace_id, "quality", 3, rationale="again", source="a")
        assert processor.force_flush()
    found = client.get_trace(trace_id).info.assessments
    by_source = sorted((one.source.source_type, one.source.source_id, one.value) for one in found)
    assert by_source == [("CODE", "a", 3), ("CODE", "b", 2), ("HUMAN", "a", 9)]
    [again] = [one for one in found if one.value == 3]
    assert (again.assessment_id, again.rationale) == (first.assessment_id, "again")
    assert only_run(client, name).metrics["quality"] == 3


def ended_traces(processor: Any, number: int = 1) -> list[str]:
    """MLflow's ids of traces that have been logged."""
    from qitos_mlflow import context
    from qitos_mlflow.tracing import SpanType, StepSpanData, create_trace

    with context() as request:
        for index in range(number):
            with create_trace(f"trace {index}") as trace:
                trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
    assert processor.force_flush()
    return request.trace_ids


def tracing_client(server: MlflowServer) -> Any:
    """MLflow's own client of traces."""
    from mlflow.tracing.client import TracingClient

    return TracingClient(server.uri)


def test_another_process_scores_by_id(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """It knows neither run nor experiment, and makes none."""
    done = script(
        mlflow_server.uri,
        name,
        """
        with context() as request:
            run("task")
        flush()
        print(json.dumps([request.trace_ids[0], request.begun[0].qitos_trace_id]))
        """,
    )
    trace_id, qitos_id = json.loads(done.stdout.splitlines()[-1])
    before = {one.name for one in client.search_experiments()}
    for number in (1, 2):
        run_script(
            f"""
            import qitos_mlflow
            qitos_mlflow.score({trace_id!r}, "rating", {number}, source="ann", source_type="HUMAN")
            qitos_mlflow.expect({qitos_id!r}, "answer", "42")
            """,
            MLFLOW_TRACKING_URI=mlflow_server.uri,
        )
    said = said_of(client, trace_id)
    assert {key: one.value for key, one in said.items()} == {"rating": 2, "answer": "42"}
    assert only_run(client, name).metrics["rating"] == 2
    assert {one.name for one in client.search_experiments()} == before


def test_offline_and_killed_it_arrives_once(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Recorded with the run, or in a second process that knows the id only; delivered by sync.

    So does what a context says, with the ids that it gave out.
    """
    killed = script(
        mlflow_server.uri,
        name,
        """
        from qitos_mlflow import tracing
        with context(session="s", user="ann", tags={"n": 1}) as request:
            result = run("task")
        score(result, "correct", True)
        score(result, "correct", False)
        expect(result, "answer", "42")
        tracing.get_tracing_provider().force_flush()
        print(json.dumps(request.trace_ids), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        check=False,
        QITOS_MLFLOW_OFFLINE="true",
    )
    [trace_id] = json.loads(killed.stdout.splitlines()[-1])
    offline = {"MLFLOW_TRACKING_URI": mlflow_server.uri, "QITOS_MLFLOW_OFFLINE": "true"}
    run_script(f"import qitos_mlflow; qitos_mlflow.score({trace_id!r}, 'rating', 5)", **offline)
    assert runs_of(client, name) == []
    synced(mlflow_server)
    said = said_of(client, trace_id)
    values = {key: one.value for key, one in said.items()}
    assert values == {"correct": False, "answer": "42", "rating": 5}
    run = only_run(client, name)
    assert (run.metrics["correct"], run.metrics["rating"], run.status) == (0, 5, "FINISHED")
    assert run.tags["n"] == "1"
    metadata = client.get_trace(trace_id).info.trace_metadata
    assert metadata["mlflow.trace.session"] == "s"
    assert metadata["mlflow.trace.user"] == "ann"


def test_killed_while_it_delivers_it_arrives_once(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """A replay finds what it has written."""
    done = script(
        mlflow_server.uri,
        name,
        """
        from qitos_mlflow.mlflow_plugin.sink.assessments import Assessments

        def killed(write):
            def write_and_die(*args):
                write(*args)
                print(args[2][0]["trace_id"], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return write_and_die

        result = run("task")
        flush()
        Assessments._write = killed(Assessments._write)
        score(result, "correct", True)
        flush()
        """,
        check=False,
    )
    trace_id = done.stdout.split()[-1]
    assert said_of(client, trace_id)["correct"].value is True
    synced(mlflow_server)
    assert said_of(client, trace_id)["correct"].value is True
    assert only_run(client, name).points("correct") == [(0, 1.0)]


@pytest.mark.parametrize("fault", [Refuse(), Cut()], ids=["refused", "cut"])
def test_an_outage_loses_and_doubles_nothing(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, proxy: Proxy, fault: Any
) -> None:
    """Also if the server has stored it, and the answer does not arrive."""
    with logged(proxy.uri, experiment_name=name) as processor:
        [trace_id] = ended_traces(processor)
        proxy.set(fault)
        score(trace_id, "quality", 1)
        expect(trace_id, "answer", [1])
        assert not processor.force_flush(2.0)
        proxy.set(None)
        assert processor.force_flush(60.0)
    said = said_of(client, trace_id)
    assert {key: one.value for key, one in said.items()} == {"quality": 1, "answer": [1]}
    assert only_run(client, name).points("quality") == [(0, 1.0)]


def test_a_trace_that_never_was_is_a_dead_letter(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason; what comes after it arrives, and `sync` tries it again."""
    qitos_id = uuid.uuid4()
    missing = f"tr-{qitos_id.hex}"
    script(
        mlflow_server.uri,
        name,
        f"""
        from qitos_mlflow.mlflow_plugin.sink import assessments

        assessments.WAIT_S = 0.5  # Sooner than in earnest.
        score({missing!r}, "correct", True)
        result = run("task")
        score(result, "correct", True)
        """,
    )
    assert only_run(client, name).metrics["correct"] == 1
    status = qitos_mlflow_command("status")
    assert f"has no trace {missing}" in status
    assert "Deliver the records of dead processes: qitos-mlflow sync " in status
    monkeypatch.setattr(assessments, "WAIT_S", 0.5)
    synced(mlflow_server, exit_code=1)
    script(
        mlflow_server.uri,
        name,
        f"""
        from qitos.tracing import StepSpanData, SpanType, create_trace
        trace = create_trace("late")
        trace.trace_id = {str(qitos_id)!r}
        with trace:
            trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
        """,
    )
    synced(mlflow_server)
    assert said_of(client, missing)["correct"].value is True


def test_a_local_store_has_it_once(local_store: str, name: str) -> None:
    """Also the second time, and with another value."""
    script(
        local_store,
        name,
        """
        with context() as request:
            result = run("task")
        flush()
        for number in (1, 2, 2):
            score(request, "rating", number, rationale=str(number))
            expect(request, "answer", [number])
            flush()
        """,
    )
    client = MlflowClient(local_store)
    run = only_run(client, name)
    said = said_of(client, trace_of(client, run))
    assert {key: one.value for key, one in said.items()} == {"rating": 2, "answer": [2]}
    assert said["rating"].rationale == "2"
    assert run.metrics["rating"] == 2


def test_qitos_evaluations_are_logged_by_themselves(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """What suites and evaluators say of a run, benchmarks of a task, and metrics of many runs."""
    script(
        mlflow_server.uri,
        name,
        f"""
        import mlflow
        from qitos.core.task import Task
        from qitos.evaluate import (
            EvaluationContext, EvaluationResult, EvaluationSuite, TrajectoryEvaluator,
        )
        from qitos.kit.evaluate import CyBenchEvaluator, ModelBasedEvaluator
        from qitos.metric import Metric, MetricInput, MetricRegistry, MetricReport

        class Exact(TrajectoryEvaluator):
            name = "exact"
            def evaluate(self, context):
                return EvaluationResult("exact", True, 0.75, reasons=["the same", "text"])

        class Broken(TrajectoryEvaluator):
            def evaluate(self, context):
                return EvaluationResult("broken", False, float("nan"))

        class Rate(Metric):
            def compute(self, rows):
                return MetricReport("rate", 0.5)

        class Pass(Metric):
            def compute(self, rows):
                return MetricReport("pass", {{"1": 0.75, "2": 0.25, "note": "text"}})

        registry = MetricRegistry([Rate()]).register(Pass())
        task = Task(id="t", objective="task")

        # A suite, and evaluators by themselves.
        result = run("task")
        judge = ModelBasedEvaluator(llm=lambda messages: '{{"success": true, "reason": "good"}}')
        verdict = EvaluationSuite([Exact(), Broken(), judge]).evaluate(
            EvaluationContext(task=task, run=result)
        )
        assert type(verdict).__name__ == "SuiteEvaluationResult" and not verdict.success
        EvaluationSuite([Exact()]).evaluate(EvaluationContext(task=task))  # Of no run.
        flags = {{"predictions": ["a", "b"], "references": ["a", "c"]}}
        assert not CyBenchEvaluator().evaluate(
            EvaluationContext(task=task, run=result, extras=flags)
        ).success

        # A benchmark, with metrics of all its runs.
        with qitos_mlflow.evaluation("gaia", benchmark="gaia") as evaluation:
            with evaluation.task("t1") as one:
                run("judged")
                one.result(True, reward=0.5)
            registry.compute_all([MetricInput("t")])

        # Metrics by themselves.
        mlflow.set_experiment({name + " metrics"!r})
        with mlflow.start_run(run_name="benchmark"):
            reports = registry.compute_all([MetricInput("t")])
        assert [report.name for report in reports] == ["rate", "pass"]
        registry.compute_all([MetricInput("t")])  # Outside of any run.
        flush()
        """,
    )
    runs = {run.params.get("task") or run.name: run for run in runs_of(client, name)}
    said = said_of(client, trace_of(client, runs["task"]))
    assert {key: one.value for key, one in said.items()} == {
        "exact_success": True,
        "exact_score": 0.75,
        "broken_success": False,
        "model_based_success": True,
        "model_based_score": 1.0,
        "evaluation_success": False,
        "cybench_success": False,
        "cybench_score": 0.5,
    }
    assert said["exact_score"].rationale == "the same; text"
    assert said["model_based_score"].source.source_type == "LLM_JUDGE"
    assert runs["task"].points("exact_score") == [(0, 0.75)]
    said = said_of(client, trace_of(client, runs["judged"]))
    assert {key: (one.value, one.source.source_id) for key, one in said.items()} == {
        "verdict/success": (True, "gaia"),
        "verdict/reward": (0.5, "gaia"),
    }
    numbers = {"rate": 0.5, "pass/1": 0.75, "pass/2": 0.25}
    assert numbers.items() <= runs["gaia"].metrics.items()
    assert only_run(client, f"{name} metrics").metrics == numbers


def test_inside_mlflows_own_trace_it_is_on_that_one(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """While MLflow has it in memory, once it has sent it, and from another process."""
    done = script(
        mlflow_server.uri,
        name,
        f"""
        import mlflow

        mlflow.set_experiment({name!r})

        @mlflow.trace
        def handle():
            with context(session="s", user="ann", tags={{"plan": "pro"}}) as request:
                result = run("task")
            score(result, "early", 1, rationale="first")
            score(result, "early", 2)
            score(request, "label", "good")
            expect(result, "answer", [42])
            return request, result

        request, result = handle()
        mlflow.flush_trace_async_logging()
        score(result, "late", True)
        score(request.trace_ids[0], "early", 3)
        flush()
        print(json.dumps([request.trace_ids, request.run_ids, request.url]))
        """,
    )
    [trace_id], [run_id], url = json.loads(done.stdout.splitlines()[-1])
    assert url.endswith(f"={trace_id}")
    run_script(
        f"import qitos_mlflow; qitos_mlflow.score({trace_id!r}, 'elsewhere', 4)",
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    said = said_of(client, trace_id)
    assert {key: one.value for key, one in said.items()} == {
        "early": 3,
        "label": "good",
        "answer": [42],
        "late": True,
        "elsewhere": 4,
    }
    run = only_run(client, name)
    assert run.id == run_id
    assert {key: run.metrics[key] for key in ("early", "late", "elsewhere")} == {
        "early": 3,
        "late": 1,
        "elsewhere": 4,
    }
    info = client.get_trace(trace_id).info
    assert info.tags["plan"] == "pro"
    assert info.trace_metadata["mlflow.trace.session"] == "s"
    assert info.trace_metadata["mlflow.trace.user"] == "ann"
