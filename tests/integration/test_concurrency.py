"""One processor, many traces at once: in threads, in tasks, and spans that change threads."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.tracing import SpanType, create_trace
from tests.bridge.agents import FINAL, Model, ModelAgent, answer, toolbox
from tests.integration.logged import LoggedRun, logged, only_run, runs_of
from tests.integration.server import MlflowServer

TIMEOUT_S = 30.0


@pytest.fixture
def log(
    mlflow_server: MlflowServer, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowTraceProcessor]:
    """A processor that logs to where MLflow itself does, in an experiment of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    with logged(None, experiment_name=experiment_name) as processor:
        yield processor
    assert mlflow.active_run() is None


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


def tokens(count: int) -> dict[str, int]:
    """So many prompt tokens, and one completion token."""
    return {"prompt_tokens": count, "completion_tokens": 1, "total_tokens": count + 1}


def generate(trace: Any, count: int) -> Any:
    """A generation of `trace` that is started, not finished."""
    data = tracing.GenerationSpanData(token_usage=tokens(count))
    return trace.create_span(SpanType.GENERATION, data).start()


def complete(run: LoggedRun) -> bool:
    """Whether the run ended well, with all its spans and no loss."""
    recorded = run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"]
    return recorded and run.status == "FINISHED" and "qitos.spans.dropped" not in run.tags


def test_sixteen_agents_in_eight_threads(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Sixteen runs, each with its own task, tool, tokens and steps, all finished."""
    together = threading.Barrier(8)

    def work(number: int) -> None:
        def measure() -> str:
            """Wait for the other agents, and measure."""
            together.wait(TIMEOUT_S)
            mlflow.log_metric("measured", number)
            return "measured"

        name = f"measure_{number}"
        script = [
            answer(f"Thought: x\nAction: {name}()", usage=tokens(1000 + number), model_name="m"),
            answer(FINAL, usage=tokens(number), model_name="m"),
        ]
        agent = ModelAgent(Model(*script), toolbox(**{name: measure}))
        agent.run(f"task {number}", render=False, trace=False)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert log.force_flush(timeout_s=TIMEOUT_S) is True

    runs = {run.params["task"]: run for run in runs_of(client, experiment_name)}
    assert set(runs) == {f"task {number}" for number in range(16)}
    for number in range(16):
        run = runs[f"task {number}"]
        assert complete(run)
        assert run.points("generation/prompt_tokens") == [(0, 1000 + number), (1, number)]
        assert run.metrics["total_tokens"] == 1000 + 2 * number + 2
        assert run.metrics["measured"] == number
        assert run.tags["tool/name"] == f"measure_{number}"
        assert (run.metrics["total_steps"], run.metrics["total_tool_calls"]) == (2, 1)
        assert [key for key in run.metrics if key.endswith("/calls")] == [
            f"tool/measure_{number}/calls"
        ]


def test_spans_finished_on_other_threads(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Spans of two traces, finished on threads that know neither, reach their own runs."""
    with create_trace("ones") as ones, create_trace("tens") as tens:
        spans = [
            generate(trace, count) for _ in range(8) for trace, count in ((ones, 1), (tens, 10))
        ]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda span: span.finish(), spans))
    assert log.force_flush(timeout_s=TIMEOUT_S) is True
    runs = {run.name: run for run in runs_of(client, experiment_name)}
    assert all(map(complete, runs.values()))
    prompt = {name: run.metrics["total_prompt_tokens"] for name, run in runs.items()}
    assert prompt == {"ones": 8, "tens": 80}


def test_one_trace_in_many_threads(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Spans made and finished by eight threads at once are counted to the last one."""
    together = threading.Barrier(8)
    with create_trace("wide") as trace:

        def work(_: int) -> None:
            together.wait(TIMEOUT_S)
            for _ in range(25):
                generate(trace, 1).finish()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: contextvars.copy_context().run(work, n), range(8)))
    assert log.force_flush(timeout_s=TIMEOUT_S) is True
    run = only_run(client, experiment_name)
    assert complete(run)
    assert run.tags["qitos.spans.recorded"] == "200"
    assert run.metrics["total_generations"] == run.metrics["total_prompt_tokens"] == 200


def test_tasks_of_one_thread(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Traces gathered by asyncio, span after span in turn, are runs of their own, and siblings."""

    async def work(number: int) -> None:
        with create_trace(f"task {number}") as trace:
            for step in range(3):
                await asyncio.sleep(0)
                span = generate(trace, number)
                mlflow.log_metric("measured", number, step=step)
                await asyncio.sleep(0)
                span.finish()

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(5)))

    asyncio.run(main())
    assert log.force_flush(timeout_s=TIMEOUT_S) is True
    runs = {run.name: run for run in runs_of(client, experiment_name)}
    assert set(runs) == {f"task {number}" for number in range(5)}
    for number in range(5):
        run = runs[f"task {number}"]
        assert complete(run)
        assert run.metrics["total_prompt_tokens"] == 3 * number
        assert run.points("measured") == [(0, number), (1, number), (2, number)]
        assert "mlflow.parentRunId" not in run.tags


def test_a_span_that_outlives_its_trace(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """A span that another thread finishes after the trace has ended is in the trace's run."""
    started, ended = threading.Event(), threading.Event()

    def work(trace: Any) -> None:
        span = generate(trace, 40)
        started.set()
        ended.wait(TIMEOUT_S)
        span.finish()

    with create_trace("short") as trace:
        generate(trace, 2).finish()
        late = threading.Thread(target=work, args=(trace,))
        late.start()
        started.wait(TIMEOUT_S)
    assert log.force_flush(timeout_s=TIMEOUT_S) is True
    assert only_run(client, experiment_name).status == "FINISHED"
    ended.set()
    late.join()
    assert log.force_flush(timeout_s=TIMEOUT_S) is True
    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert sorted(value for _, value in run.points("generation/prompt_tokens")) == [2, 40]
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_traces(locations=[experiment.experiment_id])
    assert [span.name for span in found.data.spans].count("generation") == 2


def test_a_processor_that_was_added_twice(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """A notebook's cell that is run again leaves one run, and it ends."""
    tracing.add_trace_processor(log)
    with create_trace("once") as trace:
        generate(trace, 3).finish()
    assert log.force_flush() is True
    assert only_run(client, experiment_name).status == "FINISHED"


def test_two_processors_at_once(
    log: MlflowTraceProcessor,
    mlflow_server: MlflowServer,
    client: MlflowClient,
    experiment_name: str,
) -> None:
    """Each logs the whole trace to its own destination: a run and a tree of its own."""
    names = (experiment_name, f"{experiment_name} too")
    with logged(mlflow_server.uri, experiment_name=names[1]) as second:
        with create_trace("twice") as trace:
            generate(trace, 3).finish()
        assert log.force_flush() is True
        assert second.force_flush() is True
    for name in names:
        run = only_run(client, name)
        assert complete(run)
        assert run.metrics["total_tokens"] == 4
        (tree,) = client.search_traces(locations=[run.experiment_id], run_id=run.id)
        assert len(tree.data.spans) == 2


def test_two_processors_into_one_experiment(
    mlflow_server: MlflowServer, client: MlflowClient, experiment_name: str
) -> None:
    """They do not take each other's runs, whatever their tags say."""
    some = [
        logged(mlflow_server.uri, experiment_name=experiment_name, tags={"of": f"{number}"})
        for number in range(2)
    ]
    with some[0] as first, some[1] as second:
        with create_trace("twice") as trace:
            generate(trace, 3).finish()
        assert first.force_flush() is True
        assert second.force_flush() is True
    experiment = client.get_experiment_by_name(experiment_name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["of"] for run in runs) == ["0", "1"]
    assert {run.data.tags["qitos.spans.delivered"] for run in runs} == {"1"}
    assert len({run.data.tags["qitos.trace_id"] for run in runs}) == 2
