"""Values that MLflow refuses: each loses only itself, and is counted; the rest arrives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.tracing import SpanType, create_trace
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer, toolbox
from tests.integration.logged import LoggedRun, logged, only_run
from tests.integration.made_store import make_store
from tests.integration.server import MlflowServer

NAN, INFINITY = float("nan"), float("inf")

NAMES = [
    "search?{}",
    "поиск",
    "検索",
    "🔍 look",
    "../../etc",
    "/lead/",
    "a//b",
    "..",
    ".",
    "line\nbreak",
    "tab\t",
    "x" * 300,
    "nul\0l",
    "half \ud83d",
    " blank ",
    "a\u0301\u200d",
    "#1",
    "100%",
    "calls",
]


@pytest.fixture
def log(mlflow_server: MlflowServer, experiment_name: str) -> Iterator[MlflowTraceProcessor]:
    """A processor that logs to the server, in an experiment of the test's own."""
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        yield processor


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


def step(trace: Any, data: Any) -> None:
    """One span of a trace, from start to finish."""
    trace.create_span(SpanType(data.type), data).start().finish()


def dropped(run: LoggedRun) -> dict[str, int]:
    """The values of the run's ledger that were lost or trimmed, by reason."""
    text = run.tags.get("qitos.values.dropped", "")
    pairs = (item.split("=") for item in text.split(", ") if item)
    return {reason: int(count) for reason, count in pairs}


def test_numbers_that_are_none(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Of scores and token counts the bad are missing, and counted; averages are of the rest."""
    scores = [0.25, NAN, None, "high", INFINITY, -INFINITY, True, [1], {}, 0.75, 10**400]
    usages: list[Any] = [
        {"prompt_tokens": 10, "completion_tokens": 2},
        {"prompt_tokens": None, "completion_tokens": 3},
        {"prompt_tokens": "many", "completion_tokens": 4},
        {"prompt_tokens": NAN, "completion_tokens": INFINITY},
        {"prompt_tokens": -5, "completion_tokens": 5},
        {"input_tokens": 20, "output_tokens": 6},
        {},
        "a lot",
        None,
    ]
    with create_trace("odd numbers") as trace:
        for number, score in enumerate(scores):
            step(trace, tracing.CriticSpanData(critic_name="judge", score=score))
            step(trace, tracing.StepSpanData(number))
        for usage in usages:
            step(trace, tracing.GenerationSpanData(model="m", token_usage=usage))
    assert log.force_flush() is True

    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert [value for _, value in run.points("critic/score")] == [0.25, 0.75]
    assert run.metrics["critic/avg_score"] == 0.5
    assert (run.metrics["critic/min_score"], run.metrics["critic/max_score"]) == (0.25, 0.75)
    completion = [value for _, value in run.points("generation/completion_tokens")]
    assert completion == [2, 3, 4, 5, 6]
    assert [value for _, value in run.points("generation/prompt_tokens")] == [10, 20]
    assert run.metrics["total_completion_tokens"] == 20
    assert run.metrics["total_generations"] == len(usages)
    assert run.metrics["total_steps"] == len(scores)
    bad_scores = len(scores) - 3  # Two are good, and None says nothing.
    assert dropped(run) == {"bad_value": bad_scores + 5}
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"]


def test_only_scores_are_feedback(
    log: MlflowTraceProcessor, mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """MLflow has an average of a critic's scores; what else it says is on its spans."""
    scores = [0.25, None, NAN, INFINITY, True, "0.8", "good", 10**400, 0.75]
    with create_trace("judged") as trace:
        for number, score in enumerate(scores):
            said = {"action": "retry", "reason": f"because {number}"}
            data = tracing.CriticSpanData(critic_name="judge", score=score, output_content=said)
            step(trace, data)
    assert log.force_flush() is True
    client = mlflow_server.client
    experiment = client.get_experiment_by_name(experiment_name)
    assert experiment is not None
    (found,) = client.search_traces(locations=[experiment.experiment_id])
    assert sorted(one.feedback.value for one in found.info.assessments) == [0.25, 0.75]
    judged = [span for span in found.data.spans if span.span_type == "EVALUATOR"]
    assert [span.outputs["reason"] for span in judged] == [
        f"because {number}" for number in range(len(scores))
    ]
    assert [span.outputs["action"] for span in judged] == ["retry"] * len(scores)
    found_by_score = client.search_traces(
        locations=[experiment.experiment_id], filter_string="feedback.judge = '0.75'"
    )
    assert [one.info.trace_id for one in found_by_score] == [found.info.trace_id]
    if found_averages := averages(mlflow_server.uri, experiment.experiment_id):
        assert found_averages == {"judge": 0.5}


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (NAN, "NaN"),
        ({"mean": -INFINITY, "n": 0}, {"mean": "-Infinity", "n": 0}),
        ([{"rows": (1.5, NAN)}], [{"rows": [1.5, "NaN"]}]),
        (numpy.array([INFINITY, 2.0]), ["Infinity", 2.0]),
    ],
    ids=["number", "dict", "rows", "array"],
)
def test_a_tools_result_that_is_no_number(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str, result: Any, shown: Any
) -> None:
    """NaN and infinity are readable on the span of the tool that returned them."""
    tools = toolbox(measure=lambda: result)
    ModelAgent(Model("Thought: x\nAction: measure()", FINAL), tools).run("sum", render=False)
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    (trace,) = client.search_traces(locations=[run.experiment_id])
    (span,) = [span for span in trace.data.spans if span.span_type == "TOOL"]
    assert span.outputs == shown


def averages(uri: str, experiment_id: str) -> dict[str, float]:
    """MLflow's average for each name of its assessments; none if this MLflow has no averages."""
    query = {
        "experiment_ids": [experiment_id],
        "view_type": "ASSESSMENTS",
        "metric_name": "assessment_value",
        "aggregations": [{"aggregation_type": "AVG"}],
        "dimensions": ["assessment_name"],
        "max_results": 100,
    }
    answer = requests.post(f"{uri}/api/3.0/mlflow/traces/metrics", json=query, timeout=30)
    if answer.status_code == 404:
        return {}
    answer.raise_for_status()
    points = answer.json()["data_points"]
    return {
        point["dimensions"]["assessment_name"]: float(point["values"]["AVG"]) for point in points
    }


def test_two_models_in_one_trace(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """The second model does not change the param of the first; each has numbers of its own."""
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    model = Model(
        answer(ADD, usage=usage, model_name="gpt-x"),
        answer(FINAL, usage=usage, model_name="gpt y?/v1"),
    )
    ModelAgent(model).run("sum", render=False)
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert run.params["model_name"] == "scripted-1"
    assert run.points("generation/total_tokens") == [(0, 6), (1, 6)]
    per_model = {k: v for k, v in run.metrics.items() if k.endswith("/total_tokens")}
    assert per_model.pop("model/gpt-x/total_tokens") == 6
    assert per_model.pop("generation/total_tokens") == 6
    ((key, value),) = per_model.items()
    assert key.startswith("model/gpt y_/v1-")
    assert value == 6


def test_metadata_of_any_size_and_kind(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """A long text is cut and counted; keys become legal; what is no scalar is left out."""
    metadata = {
        "long": "x" * 20_000,
        "plain": "here",
        "nested": {"deep": {"down": 3}},
        "list": ["a", 1],
        "none": None,
        "flag": True,
        "number": 1.5,
        "odd # key": "kept",
        "": "unnamed",
        "..": "up",
        "snow ☃": "white",
        "n" * 400: "long key",
        "nul": "a\0b",
        "half": "\ud83d",
        "object": object(),
        7: "seven",
    }
    with create_trace("r" * 2_000, group_id="g" * 9_000, metadata=metadata) as trace:
        step(trace, tracing.StepSpanData(0))
    assert log.force_flush() is True

    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert run.metrics["total_steps"] == 1
    wanted = {
        "plain": "here",
        "nested.deep.down": "3",
        "list": "a, 1",
        "flag": "True",
        "number": "1.5",
        "nul": "a\ufffdb",
        "7": "seven",
    }
    assert {key: run.params.get(key) for key in wanted} == wanted
    assert len(run.params["long"]) == 6_000
    assert run.params["long"].endswith("x…")
    values = list(run.params.values())
    assert [values.count(text) for text in ("kept", "unnamed", "up", "white", "long key")] == [
        1
    ] * 5
    assert "none" not in run.params
    assert dropped(run)["text_trimmed"] >= 2  # The metadata and the group.
    assert dropped(run)["text_characters"] >= 1


def test_tool_names_of_any_kind(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """Every call counts, each tool has numbers of its own, and the tag has the name itself."""
    with create_trace("odd tools") as trace:
        for name in NAMES:
            step(trace, tracing.ToolSpanData(tool_name=name, tool_args={"q": name}))
        step(trace, tracing.ActSpanData(action_name="{what?}"))
        step(trace, tracing.ToolSpanData(tool_name="🔍 last"))
    assert log.force_flush() is True
    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert run.metrics["total_tool_calls"] == len(NAMES) + 2
    calls = {key: value for key, value in run.metrics.items() if key.endswith("/calls")}
    assert calls["tool/検索/calls"] == 1
    assert len(calls) == len(NAMES) + 2
    assert set(calls.values()) == {1}
    assert run.tags["tool/name"] == "🔍 last"
    assert run.tags["action/name"] == "{what?}"
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"]


def test_more_of_everything_than_one_call_takes(
    log: MlflowTraceProcessor, client: MlflowClient, experiment_name: str
) -> None:
    """A run with more metrics, params and tools than MLflow takes at once is complete."""
    metadata = {f"param {number}": number for number in range(600)}
    with create_trace("many", metadata=metadata) as trace:
        for number in range(600):
            step(trace, tracing.StepSpanData(number))
            step(trace, tracing.ToolSpanData(tool_name=f"tool {number % 150}"))
    assert log.force_flush(timeout_s=60) is True
    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert run.points("step/number") == [(number, number) for number in range(600)]
    assert run.metrics["total_tool_calls"] == 600
    calls = [v for k, v in run.metrics.items() if k.endswith("/calls")]
    assert sum(calls) == 600
    params = [key for key in run.params if key.startswith("param ")]
    assert dropped(run) == {"too_many_params": 600 - len(params)}
    assert "qitos_mlflow_version" in run.params
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"] == "1200"


# -- anything at all, into a local store -----------------------------------------------------

ANYTHING = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(st.characters(), max_size=40)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MlflowTraceProcessor, str]]:
    """A processor that logs to a local store, and the store's URI."""
    directory: Path = tmp_path_factory.mktemp("odd-values")
    make_store(directory / "mlflow.db")
    uri = f"sqlite:///{directory / 'mlflow.db'}"
    with logged(uri, spool_dir=directory / "spool", log_artifacts=False) as processor:
        yield processor, uri


def stored(store: tuple[MlflowTraceProcessor, str], trace_id: str) -> LoggedRun:
    """The run of a trace in the local store."""
    processor, uri = store
    assert processor.force_flush(timeout_s=60) is True
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qitos")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`qitos.trace_id` = '{trace_id}'")
    return LoggedRun(client, run)


@ANYTHING
@given(names=st.lists(TEXT, min_size=1, max_size=12))
def test_any_tool_names(store: tuple[MlflowTraceProcessor, str], names: list[str]) -> None:
    """Whatever tools are called, the calls of each and of all are counted."""
    with create_trace("tools") as trace:
        for name in names:
            step(trace, tracing.ToolSpanData(tool_name=name))
    run = stored(store, trace.trace_id)
    assert run.status == "FINISHED"
    calls = sorted(value for key, value in run.metrics.items() if key.endswith("/calls"))
    distinct = Counter(name or "unnamed" for name in names)
    assert calls == sorted(distinct.values())
    assert run.metrics["total_tool_calls"] == len(names)


@ANYTHING
@given(metadata=st.dictionaries(TEXT, VALUES, max_size=6), value=VALUES)
def test_any_metadata_and_content(
    store: tuple[MlflowTraceProcessor, str], metadata: dict[str, Any], value: Any
) -> None:
    """Whatever a trace and its spans hold, the run is complete and has every valid value."""
    with create_trace("anything", metadata={**metadata, "sentinel": "here"}) as trace:
        for data in (
            tracing.GenerationSpanData(model=value, input_content=value, token_usage=value),
            tracing.CriticSpanData(critic_name=value, score=value),
            tracing.StepSpanData(value, observation=value, decision=value),
            tracing.ActSpanData(action_name=value, tool_args=value),
            tracing.CustomSpanData(name=value, data=value),
            tracing.StepSpanData(3),
        ):
            span = trace.create_span(SpanType(data.type), data).start()
            span.set_output(value)
            span.finish()
    run = stored(store, trace.trace_id)
    assert run.status == "FINISHED"
    assert run.params["sentinel"] == "here"
    assert (3, 3.0) in run.points("step/number")
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"] == "6"
