"""A trace's records become the metrics, params and tags that README promises, to the digit."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow.mlflow_plugin.mapping.entities import Metric
from qitos_mlflow.mlflow_plugin.mapping.run_totals import MAX_NAMES, OTHERS, SAMPLE_SIZE, sample
from tests.mlflow_plugin.folding import fold, last, new_state
from tests.mlflow_plugin.records import MS, START_NS, Records


def test_a_generation_logs_its_tokens_at_its_end() -> None:
    """Tokens and latency are drawn over the agent's step, at the span's end."""
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    data = fold(Records().span("generation", step=3, model="m", token_usage=usage))
    at_ms = START_NS // MS + 5
    assert data.waiting.metrics == [
        Metric("generation/prompt_tokens", 100, at_ms, 3),
        Metric("generation/completion_tokens", 20, at_ms, 3),
        Metric("generation/total_tokens", 120, at_ms, 3),
        Metric("generation/latency_ms", 5.0, at_ms, 3),
    ]


def test_each_span_type_logs_what_the_contract_says() -> None:
    """Step number, critic score, tool and action names arrive under their keys."""
    make = Records()
    step = fold(make.span("step", step=2, step_number=2))
    assert step.waiting.metrics[0] == Metric("step/number", 2, START_NS // MS + 5, 2)
    assert last(step)["step/latency_ms"] == 5.0
    critic = fold(make.span("critic", step=2, critic_name="c", score=0.5))
    assert [(m.key, m.value, m.step) for m in critic.waiting.metrics] == [("critic/score", 0.5, 2)]
    tool = fold(make.span("tool", tool_name="search?"))
    assert tool.waiting.tags == [("tool/name", "search?")]
    assert last(tool) == {"tool/latency_ms": 5.0}
    assert fold(make.span("mcp", server_name="s", tool_name="t")).waiting.tags == [
        ("tool/name", "t")
    ]
    assert fold(make.span("act", action_name="go")).waiting.tags == [("action/name", "go")]
    for silent in (make.span("act", action_name=None), make.span("critic", score=None)):
        added = fold(silent).waiting
        assert [*added.metrics, *added.params, *added.tags] == []


def test_totals_of_a_run() -> None:
    """The end of the trace logs every total of the contract, at the last step."""
    make = Records()
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    data = fold(
        make.start(),
        make.span("generation", model="a", token_usage=usage, step=0),
        make.span("tool", tool_name="x", step=0),
        make.span("tool", tool_name="x", step=0, error="ValueError: no"),
        make.span("act", step=0),
        make.span("critic", score=1.0, step=0),
        make.span("step", step_number=0, step=0),
        make.span(
            "generation", model="b", token_usage={"input_tokens": 1, "output_tokens": 2}, step=1
        ),
        make.span("act", action_name="finish", step=1),
        make.span("critic", score=0.25, step=1),
        make.span("step", step_number=1, step=1),
        make.end(metadata={"stop_reason": "final", "success": True}),
    )
    end_ms = START_NS // MS + 1_000
    totals = {m.key: m.value for m in data.waiting.metrics if m.timestamp_ms == end_ms}
    assert totals == {
        "total_tokens": 18,
        "total_prompt_tokens": 11,
        "total_completion_tokens": 7,
        "total_generations": 2,
        "total_steps": 2,
        "total_tool_calls": 3,
        "duration_s": 1.0,
        "tool/error_rate": pytest.approx(1 / 3),
        "critic/avg_score": 0.625,
        "critic/min_score": 0.25,
        "critic/max_score": 1.0,
        "tool/finish/calls": 1,
        "tool/finish/errors": 0,
        "tool/finish/p95_latency_ms": 5.0,
        "tool/x/calls": 2,
        "tool/x/errors": 1,
        "tool/x/p95_latency_ms": 5.0,
        "model/a/generations": 1,
        "model/a/prompt_tokens": 10,
        "model/a/completion_tokens": 5,
        "model/a/total_tokens": 15,
        "model/b/generations": 1,
        "model/b/prompt_tokens": 1,
        "model/b/completion_tokens": 2,
        "model/b/total_tokens": 3,
        "success": 1.0,
    }
    assert {m.step for m in data.waiting.metrics if m.timestamp_ms == end_ms} == {1}
    assert (data.facts.status, data.facts.ended_ns) == ("FINISHED", end_ms * MS)
    assert ("stop_reason", "final") in data.waiting.tags


def test_a_run_without_critics_has_no_critic_totals() -> None:
    """Averages of nothing are not logged; counts of nothing are zero."""
    totals = last(fold(Records().start(), Records().end()))
    assert not [key for key in totals if key.startswith(("critic/", "tool/", "success"))]
    assert totals["total_tokens"] == totals["total_steps"] == totals["total_tool_calls"] == 0


def test_a_failed_run_is_no_success() -> None:
    """A run that failed or was killed has success 0 and says why."""
    error = {"type": "ValueError", "message": "bad", "stacktrace": "…"}
    data = fold(Records().start(), Records().end("FAILED", error=error))
    assert last(data)["success"] == 0
    assert ("qitos.error", "ValueError: bad") in data.waiting.tags
    assert data.facts.status == "FAILED"


def test_no_usage_logs_no_tokens() -> None:
    """A generation without real counts logs none: estimates never stand in for them."""
    make = Records()
    for usage in (None, {}, {"prompt_tokens": None}):
        data = fold(make.span("generation", model="m", token_usage=usage))
        assert set(last(data)) == {"generation/latency_ms"}


@pytest.mark.parametrize("score", ["nan", "0.5", math.nan, math.inf, True, [1], {"a": 1}])
def test_a_bad_score_is_left_out_and_counted(score: Any) -> None:
    """A score that is no number does not reach the averages, and the run says so."""
    make = Records()
    data = fold(make.span("critic", score=score), make.span("critic", score=0.5), make.end())
    assert last(data)["critic/avg_score"] == 0.5
    assert ("qitos.values.dropped", "bad_value=1") in data.waiting.tags


def test_scores_beyond_a_floats_range_do_not_stop_the_totals() -> None:
    """The score that their sum has no room for is left out and counted; the run has its end."""
    make = Records()
    huge = make.span("critic", score=1.7e308)
    data = fold(make.start(), huge, huge, make.end())
    assert last(data)["critic/avg_score"] == 1.7e308
    assert ("qitos.values.dropped", "bad_value=1") in data.waiting.tags


def test_params_are_written_once() -> None:
    """The first value of a param stays, whatever later models and metadata say."""
    make = Records()
    data = fold(
        make.start(metadata={"agent_name": "a", "seed": 7, "nested": {"x": 1, "y": {"z": None}}}),
        make.span("generation", model="first"),
        make.span("generation", model="second"),
        make.end(
            metadata={"agent_name": "b", "later": True, "final_result": "42", "success": True}
        ),
    )
    assert data.waiting.params == [
        ("agent_name", "a"),
        ("seed", "7"),
        ("nested.x", "1"),
        ("model_name", "first"),
        ("later", "True"),
    ]


def test_what_is_lost_beside_spans_is_in_the_ledger() -> None:
    """Files and the like that never reached the server are in the run's ledger."""
    data = fold(Records().start(), Records().end(lost={"artifact_disk_full": 2}))
    assert ("qitos.values.dropped", "artifact_disk_full=2") in data.waiting.tags


def test_long_and_odd_metadata_is_trimmed_not_lost() -> None:
    """A 20,000-character value and an illegal name arrive, shortened and counted."""
    data = fold(
        Records().start(metadata={"big": "x" * 20_000, "a[b]": 1, "list": ["p", "q"]}),
        Records().end(),
    )
    params = dict(data.waiting.params)
    assert len(params["big"]) == 6000
    assert params["list"] == "p, q"
    assert [key for key in params if key.startswith("a_b_-")]
    assert ("qitos.values.dropped", "text_trimmed=1") in data.waiting.tags


def test_tags_say_where_the_run_comes_from() -> None:
    """Trace, run, agent, task, benchmark and parent are tags, beside the user's own."""
    state = new_state({"tags": {"env": "dev"}, "plugin_version": "1", "user": "ada"})
    metadata = {
        "qitos_run_id": "r",
        "agent_name": "a",
        "task_id": "t",
        "benchmark_name": "gaia",
    }
    start = Records().start(metadata=metadata, parent_run_id="p", group_id="g")
    data = fold(start, state=state)
    assert dict(data.waiting.tags) == {
        "qitos.trace_id": "trace-1",
        "qitos.group_id": "g",
        "mlflow.parentRunId": "p",
        "mlflow.user": "ada",
        "qitos.run_id": "r",
        "qitos.agent": "a",
        "qitos.task_id": "t",
        "qitos.benchmark": "gaia",
        "env": "dev",
    }
    assert ("qitos_mlflow_version", "1") in data.waiting.params


def test_every_loss_is_on_the_run() -> None:
    """Spans recorded, delivered and lost, with the reasons, are tags of the run."""
    make = Records()
    tags = dict(fold(make.start(), make.span("step"), make.end()).waiting.tags)
    assert (tags["qitos.spans.recorded"], tags["qitos.spans.delivered"]) == ("1", "1")
    make = Records()
    spans = [make.span("step", step_number=n) for n in range(3)]
    data = fold(make.start(), *spans, make.end(recorded=6, dropped={"queue_full": 2, "late": 1}))
    tags = dict(data.waiting.tags)
    assert tags["qitos.spans.recorded"] == "6"
    assert tags["qitos.spans.delivered"] == "3"
    assert tags["qitos.spans.dropped"] == "late=1, queue_full=2"
    cases = [(3, {"late": 0}, None), (6, {"queue_full": 1}, "lost_in_spool=2, queue_full=1")]
    for recorded, dropped, text in cases:
        make = Records()
        end = make.end(recorded=recorded, dropped=dropped)
        data = fold(make.start(), *(make.span("step") for _ in range(3)), end)
        assert dict(data.waiting.tags).get("qitos.spans.dropped") == text


def test_the_wait_for_the_run_is_no_time_of_the_agent() -> None:
    """Otherwise a comparison of two runs would compare how fast the server was."""
    make = Records()
    began = {**make.announced(), "start_ns": START_NS + 700 * MS}
    assert last(fold(make.start(), began, make.end(after_ms=1_000)))["duration_s"] == 0.3
    assert last(fold(make.start(), make.announced(), make.end()))["duration_s"] == 1.0


def test_a_killed_run_has_its_totals() -> None:
    """A trace whose process died is ended as KILLED, with what was known."""
    make = Records()
    span = make.span("generation", model="m", token_usage={"total_tokens": 7})
    data = fold(make.start(), span)
    data.kill(START_NS + 9_000 * MS, "killed by signal 9")
    assert (data.facts.status, data.facts.ended_ns) == ("KILLED", START_NS + 9_000 * MS)
    assert last(data)["total_tokens"] == 7
    assert last(data)["duration_s"] == 9
    assert ("qitos.killed", "killed by signal 9") in data.waiting.tags


def test_a_span_without_a_step_belongs_to_the_last_one() -> None:
    """A generation outside any step is drawn at the last step seen."""
    make = Records()
    data = fold(
        make.span("step", step_number=4, step=4),
        make.span("generation", model="m", token_usage={"total_tokens": 1}, step=None),
    )
    assert {m.step for m in data.waiting.metrics} == {4}


def test_a_nested_agents_steps_are_drawn_at_the_outer_agents() -> None:
    """They overlay nothing, and the totals are at a step that the outer agent had."""
    make = Records()
    nested = [make.span("step", step_number=number, step=0) for number in range(4)]
    own = [make.span("step", step_number=number, step=number) for number in range(2)]
    data = fold(make.start(), *nested, *own, make.end())
    points = [(m.step, m.value) for m in data.waiting.metrics if m.key == "step/number"]
    assert points == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 0), (1, 1)]
    assert {m.step for m in data.waiting.metrics if m.key.startswith("total_")} == {1}


def test_odd_tool_names_keep_metrics_of_their_own() -> None:
    """Tools whose names differ only in illegal characters are not added up."""
    make = Records()
    names = ["a?", "a!", "a//b", "🙂", "", "x" * 5_000]
    data = fold(*(make.span("tool", tool_name=name) for name in names), make.end())
    calls = {key: value for key, value in last(data).items() if key.endswith("/calls")}
    assert len(calls) == len(names)
    assert set(calls.values()) == {1}
    assert all(len(key) <= 250 for key in calls)


def test_a_flood_of_names_is_bounded() -> None:
    """Generated tool names do not grow the run without end: the rest is counted together."""
    make = Records()
    data = fold(*(make.span("tool", tool_name=f"t{n}") for n in range(MAX_NAMES + 5)), make.end())
    totals = last(data)
    assert totals[f"tool/{OTHERS}/calls"] == 5
    assert totals["total_tool_calls"] == MAX_NAMES + 5


_numbers = st.floats(0, 1e6)


@given(st.lists(_numbers, min_size=1, max_size=SAMPLE_SIZE))
def test_percentiles_are_exact_while_all_is_kept(values: list[float]) -> None:
    """Up to the sample's size the 95th percentile is the true one."""
    make = Records()
    spans = [
        make.span("tool", tool_name="t", start_ns=START_NS, end_ns=START_NS + int(value * MS))
        for value in values
    ]
    found = last(fold(*spans, make.end()))["tool/t/p95_latency_ms"]
    rank = math.ceil(0.95 * len(values)) - 1
    assert found == round(int(sorted(values)[rank] * MS) / MS, 3)


def test_percentiles_stay_close_and_the_sample_small() -> None:
    """Of 100,000 numbers the sample keeps few, evenly, and their percentile is about right."""
    kept: list[float] = []
    for number in range(100_000):
        sample(kept, number, float(number * 7919 % 100_000))
        assert len(kept) <= SAMPLE_SIZE
    assert len(kept) > SAMPLE_SIZE // 2
    assert sorted(kept)[math.ceil(0.95 * len(kept)) - 1] == pytest.approx(95_000, rel=0.06)


def test_the_state_stays_small() -> None:
    """The state rides in every acknowledgement, so a long run must not make it grow."""
    make = Records()
    state = new_state()
    for number in range(3_000):
        state.take(make.span("tool", tool_name=f"tool-{number % 20}", step=number), b"")
    assert len(orjson.dumps(state.to_json())) < 20_000


def test_unknown_records_add_nothing() -> None:
    """A record of a later version is passed over."""
    later = Records().span("later_type", anything=[1])
    added = fold({"kind": "something", "trace_id": "t"}, later).waiting
    assert [*added.metrics, *added.params, *added.tags] == []
