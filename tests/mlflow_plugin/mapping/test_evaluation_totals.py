"""An evaluation's numbers from its runs: exact values, and which runs count."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest

from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef, StoredRun
from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import attempts, table, totals, wilson

_ids = count()


def run(
    task: str | None = None,
    trial: int | None = 0,
    *,
    attempt: str | None = None,
    status: str = "FINISHED",
    tags: dict[str, str] | None = None,
    **metrics: float,
) -> StoredRun:
    """A run that starts after the one before; ``__`` in a metric's name is a slash."""
    number = next(_ids)
    found: dict[str, Any] = {"qitos.task_id": task, "qitos.attempt": attempt}
    found["qitos.trace_id"] = f"trace-{number}"
    found["qitos.trial"] = None if trial is None else str(trial)
    return StoredRun(
        RunRef(f"run-{number}", "1", "", "", number),
        status,
        number + 1,
        {key.replace("__", "/"): value for key, value in metrics.items()},
        {**{key: text for key, text in found.items() if text is not None}, **(tags or {})},
    )


def numbers(*runs: StoredRun, expected: int | None = None) -> dict[str, float]:
    found = totals(attempts(runs), expected)
    assert all(key.startswith("eval/") for key in found)
    return {key.removeprefix("eval/"): value for key, value in found.items()}


def test_the_interval_of_a_rate() -> None:
    """Wilson's, by values from the literature: 81 of 263 (Newcombe 1998), and the edges."""
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson(0, 20)
    assert low == 0.0
    assert round(high, 4) == 0.1611
    low, high = wilson(29, 29)
    assert (round(low, 4), high) == (0.8830, 1.0)


def test_means_and_percentiles() -> None:
    """p95 is the value at rank ceil(0.95 n); what no run has is left out."""
    found = numbers(*(run(f"t{n}", total_steps=n, total_tokens=10 * n) for n in range(1, 41)))
    assert found["steps_mean"] == 20.5
    assert found["steps_p95"] == 38
    assert found["tokens_total"] == 8200
    assert "cost_mean" not in found


def test_the_benchmark_counts_more_than_the_agent() -> None:
    """And the agent's own word counts where the benchmark says nothing."""
    found = numbers(
        run("a", success=1, verdict__success=0),
        run("b", success=0, verdict__success=1),
        run("c", success=1),
        run("d", verdict__reward=0.5),
    )
    assert (found["n"], found["success"]) == (4, 2)
    assert found["success_rate"] == pytest.approx(2 / 3)


def test_skipped_failed_unfinished_and_not_run_are_kept_apart() -> None:
    """Only what failed counts as not solved."""
    found = numbers(
        run("a", verdict__success=1),
        run("b", status="FAILED"),
        run("c", tags={"qitos.skipped": "no data"}),
        run("d", status="KILLED"),
        run("e", status="RUNNING"),
        expected=7,
    )
    kept = {key: found[key] for key in ("n", "failed", "skipped", "unfinished", "not_run")}
    assert kept == {"n": 2, "failed": 1, "skipped": 1, "unfinished": 2, "not_run": 2}
    assert sum(kept.values()) - kept["failed"] == 7
    assert found["success_rate"] == 0.5


def test_the_newest_attempt_that_is_over_counts() -> None:
    """A task that was begun again counts as before until that is over, too."""
    first = run("a", attempt="1", verdict__success=0, total_steps=5)
    killed = run("a", attempt="2", status="KILLED", total_steps=9)
    assert numbers(first, killed)["steps_total"] == 5
    again = run("a", attempt="3", verdict__success=1, total_steps=7)
    found = numbers(first, killed, again)
    assert (found["n"], found["success"], found["steps_total"]) == (1, 1, 7)


def test_runs_of_one_attempt_count_together() -> None:
    """A planner and a worker at one task are one attempt, judged once."""
    planner = run("a", attempt="1", total_steps=2, total_cost=0.25, success=1)
    worker = run("a", attempt="1", total_steps=3, total_cost=0.5, success=0)
    found = numbers(planner, worker)
    assert (found["n"], found["steps_total"], found["cost_total"]) == (1, 5, 0.75)
    assert found["success"] == 0


def test_runs_without_a_trial_are_trials_of_their_own() -> None:
    """As in a user's own run, where agents do the same task again and again."""
    assert numbers(run("a", None), run("a", None), run(None, None))["n"] == 3


def test_a_background_agent_is_no_task() -> None:
    """It is part of the run that it is linked to."""
    background = run(None, None, tags={"qitos.linked_trace_id": "1"})
    assert numbers(run("a"), background)["n"] == 1


def test_only_runs_of_agents_count_and_each_trace_once() -> None:
    """Not a nested run of the user's own, nor the run of a second processor."""
    mine = run(None, None, tags={"qitos.trace_id": ""}, success=0)
    first = run("a", attempt="1", tags={"qitos.trace_id": "t"}, total_steps=2)
    second = run("a", attempt="1", tags={"qitos.trace_id": "t~2"}, total_steps=2)
    found = numbers(mine, first, second)
    assert (found["n"], found["steps_total"]) == (1, 2)


def test_beside_tasks_no_agent_counts() -> None:
    """Such as a judge between them, or one in a process that a task has started."""
    found = numbers(run("a", attempt="1", verdict__success=1), run(None, None, success=0))
    assert (found["n"], found["success_rate"]) == (1, 1)


def test_how_likely_all_of_several_trials_succeed() -> None:
    """pass^k as tau-bench has it: choose(c, k) / choose(n, k), the mean over the tasks."""
    good = [run("a", n, verdict__success=1) for n in range(4)]
    mixed = [run("b", n, verdict__success=n < 3) for n in range(4)]
    single = [run("c", 0, verdict__success=0)]
    found = numbers(*good, *mixed, *single)
    assert found["pass_hat_2"] == pytest.approx((1 + math.comb(3, 2) / math.comb(4, 2)) / 2)
    assert found["pass_hat_4"] == 0.5
    assert "pass_hat_5" not in found


def test_categories_and_stop_reasons() -> None:
    """Each has its numbers."""
    found = numbers(
        run("a", tags={"qitos.category": "1", "stop_reason": "final"}, verdict__success=1),
        run("b", tags={"qitos.category": "2", "stop_reason": "max_steps"}, verdict__success=0),
        run("c", tags={"qitos.category": "2", "stop_reason": "final"}, verdict__success=1),
    )
    assert (found["stop/final"], found["stop/max_steps"]) == (2, 1)
    assert (found["category/1/success_rate"], found["category/2/success_rate"]) == (1, 0.5)


def test_the_table_of_results() -> None:
    """One row an attempt, with both words on success and all of the benchmark's scores."""
    found = table(
        attempts(
            [
                run("b", verdict__success=1, success=0, total_steps=2),
                run("a", verdict__success=0, verdict__reward=0.5, tags={"qitos.prediction": "42"}),
            ]
        )
    )
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]
    assert [row["task"] for row in rows] == ["a", "b"]
    assert (rows[0]["verdict/reward"], rows[0]["prediction"]) == (0.5, "42")
    assert (rows[1]["success"], rows[1]["agent_success"], rows[1]["steps"]) == (True, False, 2)


def test_nothing_to_count() -> None:
    """No run is no number to divide by."""
    assert numbers(expected=3)["not_run"] == 3
