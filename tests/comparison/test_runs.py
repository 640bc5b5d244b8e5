"""Two evaluations, paired by what their runs worked on."""

from __future__ import annotations

import json
from typing import Any

from qitos_mlflow.comparison.runs import Run, Task, by_task, compare


def run(task: str, number: int = 0, *, tags: Any = None, **metrics: float) -> Run:
    """A run on a task; `number` says when it began."""
    about = {"qitos.task_id": task, "qitos.benchmark": "gaia", **(tags or {})}
    return Run(f"{task}-{number}", number, metrics, {"benchmark_split": "test"}, about)


def test_runs_are_paired_by_task_and_trial() -> None:
    """The n-th run of a task is its n-th trial, whatever the order in which the server has them."""
    found = by_task([run("b", 5), run("a", 3), run("a", 1), run("a", 2), run("b", 4)])
    assert {str(task): one.run_id for task, one in found.items()} == {
        "gaia/test/a": "a-1", "gaia/test/a#1": "a-2", "gaia/test/a#2": "a-3",
        "gaia/test/b": "b-4", "gaia/test/b#1": "b-5",
    }  # fmt: skip


def test_a_named_trial_counts_and_the_last_run_of_it() -> None:
    """A sweep that was resumed may have run a trial twice."""
    trial = {"qitos.trial": "7"}
    found = by_task([run("a", 1, tags=trial), run("a", 2, tags=trial)])
    assert {task: one.run_id for task, one in found.items()} == {
        Task("gaia", "test", "a", "7"): "a-2"
    }


def test_a_task_without_an_id_is_its_text() -> None:
    """A run without a task is not compared."""
    found = by_task([Run("1", params={"task": "Say hello."}), Run("2")])
    assert [str(task) for task in found] == ["Say hello."]


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
    metrics = {"total_tokens": 5.0, "success": 1.0, "step/number": 3.0, "tool/add/calls": 2.0}
    first = [run("a", **metrics, only_here=1.0), run("b", **metrics)]
    found = compare(("A", first), ("B", [run("a", **metrics), run("b", **metrics)]))
    assert [*found.metrics] == ["success", "total_tokens"]
    chosen = compare(("A", first), ("B", first), ["step/number", "unknown"])
    assert [*chosen.metrics] == ["step/number"]


def test_values_that_are_no_numbers_are_left_out() -> None:
    first = [run("a", loss=float("nan")), run("b", loss=1.0), run("c", loss=2.0)]
    assert compare(("A", first), ("B", first)).metrics["loss"].n == 2


def test_it_is_json() -> None:
    first = [run("a", success=0.0, total_tokens=3.0), run("b", success=0.0, total_tokens=4.0)]
    second = [run("a", success=1.0, total_tokens=2.0)]
    found = json.loads(json.dumps(compare(("A", first), ("B", second)).to_json()))
    assert found["won"] == [{"benchmark": "gaia", "split": "test", "task": "a", "trial": "0"}]
    assert found["metrics"]["success"]["difference"] == 1.0
    assert found["metrics"]["total_tokens"]["p"] is None
