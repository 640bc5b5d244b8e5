"""Two evaluations, paired by what their runs worked on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qitos_mlflow.comparison.runs import by_task, compare
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef, StoredRun


def run(
    task: str, number: int = 0, *, status: str = "FINISHED", tags: Any = None, **metrics: float
) -> StoredRun:
    """A run on a task; `number` says when it began, ``__`` in a metric's name is a slash."""
    about = {"qitos.task_id": task, "qitos.benchmark": "gaia", "qitos.split": "test"}
    about["qitos.trace_id"] = f"{task}-{number}-{tags}"
    ref = RunRef(f"{task}-{number}", "1", "", "", number)
    found = {key.replace("__", "/"): value for key, value in metrics.items()}
    return StoredRun(ref, status, None, found, {**about, **(tags or {})})


def ids(runs: list[StoredRun]) -> dict[str, list[str]]:
    """The ids of the runs that count, by task."""
    return {str(task): [r.ref.run_id for r in one.runs] for task, one in by_task(runs).items()}


def test_runs_are_paired_by_task_and_trial() -> None:
    """The n-th run of a task is its n-th trial, whatever the order in which the server has them."""
    found = ids([run("b", 5), run("a", 3), run("a", 1), run("a", 2), run("b", 4)])
    assert found == {
        "gaia/test/a": ["a-1"], "gaia/test/a#1": ["a-2"], "gaia/test/a#2": ["a-3"],
        "gaia/test/b": ["b-4"], "gaia/test/b#1": ["b-5"],
    }  # fmt: skip


def test_a_named_trial_counts_and_the_last_run_of_it_that_is_over() -> None:
    """A sweep that was resumed may have run a trial twice. Another split is another task."""
    trial = {"qitos.trial": "7"}
    other, split = trial | {"qitos.benchmark": "other"}, trial | {"qitos.split": "val"}
    runs = [run("a", 1, tags=trial), run("a", 2, tags=trial), run("a", 4, tags=other)]
    runs += [run("a", 3, tags=trial, status="KILLED"), run("a", 5, tags=split)]
    assert ids(runs) == {
        "gaia/test/a#7": ["a-2"], "gaia/val/a#7": ["a-5"], "other/test/a#7": ["a-4"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "left_out",
    [
        run("a", status="RUNNING"),
        run("a", status="KILLED"),
        run("a", tags={"qitos.skipped": "no data"}),
        run("a", tags={"qitos.linked_trace_id": "of an agent"}),
        run(""),
    ],
)
def test_runs_that_do_not_count(left_out: StoredRun) -> None:
    """As in an evaluation's own numbers: what is not over, was skipped, or is another run's."""
    assert ids([left_out, run("b")]) == {"gaia/test/b": ["b-0"]}


def test_the_verdict_of_the_benchmark_beats_the_agents_own_success() -> None:
    """And the runs of one attempt are one task: what was used is added up."""
    tags = {"qitos.attempt": "x", "qitos.trial": "0"}
    agents = [run("a", n, tags=tags, success=1.0, total_tokens=n) for n in (1, 2)]
    wrong = run("a", 3, tags=tags, verdict__success=0.0, verdict__reward=0.5)
    right = run("a", 9, success=0.0, verdict__success=1.0, total_tokens=5.0)
    found = compare(("A", [*agents, wrong]), ("B", [right]))
    assert [task.task for task in found.won] == ["a"]
    assert [*found.metrics] == ["success", "total_tokens"]
    assert found.metrics["total_tokens"].first == 3.0


def test_what_flipped_and_what_is_missing() -> None:
    first = [run("same", success=1.0), run("won", success=0.0), run("lost", success=1.0)]
    second = [run("same", success=1.0), run("won", success=1.0), run("lost", success=0.0)]
    found = compare(("A", [*first, run("old")]), ("B", [*second, run("new"), run("newer")]))
    names = [[task.task for task in tasks] for tasks in (found.won, found.lost)]
    assert names == [["won"], ["lost"]]
    assert [task.task for task in found.only_first] == ["old"]
    assert [task.task for task in found.only_second] == ["new", "newer"]
    success = found.metrics["success"]
    assert (success.n, success.first, success.second, success.p) == (3, 2 / 3, 2 / 3, 1.0)


def test_the_metrics_of_both() -> None:
    """Success comes first; the last values of series and single tools are no totals."""
    metrics = {"a": 5.0, "success": 1.0, "step/number": 3.0, "tool/add/calls": 2.0}
    metrics |= {"verdict/reward": 0.5}
    first = [run("a", **metrics, only_here=1.0), run("b", **metrics)]
    found = compare(("A", first), ("B", [run("a", **metrics), run("b", **metrics)]))
    assert [*found.metrics] == ["success", "verdict/reward", "a"]
    chosen = compare(("A", first), ("B", first), ["step/number", "unknown"])
    assert [*chosen.metrics] == ["step/number"]


def test_values_that_are_no_numbers_are_left_out() -> None:
    """Nor an infinity, which MLflow's stores keep as the largest number."""
    values = (float("nan"), 1.0, 2.0, 1.7976931348623157e308, float("-inf"))
    first = [run(str(number), loss=value) for number, value in enumerate(values)]
    second = [run(str(number), loss=3.0) for number in range(len(values))]
    loss = compare(("A", first), ("B", second)).metrics["loss"]
    assert (loss.n, loss.mean) == (2, 1.5)


def test_it_is_json() -> None:
    first = [run("a", success=0.0, total_tokens=3.0), run("b", success=0.0, total_tokens=4.0)]
    second = [run("a", success=1.0, total_tokens=2.0)]
    found = json.loads(json.dumps(compare(("A", first), ("B", second)).to_json()))
    assert found["won"] == [{"benchmark": "gaia", "split": "test", "task": "a", "trial": "0"}]
    assert found["metrics"]["success"]["difference"] == 1.0
    assert found["metrics"]["total_tokens"]["p"] is None
