"""Two evaluations of the same tasks, paired by task and trial. Pure.

Receives runs as plain values, hands on what differs between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

from qitos_mlflow.comparison.statistics import Difference, difference

SUCCESS = "success"
"""The metric that says whether a task was solved: 0 or 1."""

TOTALS = (SUCCESS, "reward", "score", "exact_match", "cost")
"""Metrics that come first, and ..."""
SERIES = ("generation/", "step/", "critic/score", "tool/", "model/", "system/")
"""... those that say nothing of a task as a whole: their last value is that of its last step."""


class Task(NamedTuple):
    """What a run worked on; equal for runs that are compared."""

    benchmark: str
    split: str
    task: str
    trial: str

    def __str__(self) -> str:
        parts = (self.benchmark, self.split, self.task)
        text = "/".join(part for part in parts if part)
        return text if self.trial == "0" else f"{text}#{self.trial}"


@dataclass(frozen=True)
class Run:
    """One run of an agent, as MLflow has it; `start_ms` is milliseconds since the epoch."""

    run_id: str
    start_ms: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def said(self, *names: str) -> str:
        """The first of these tags or params that there is; else empty."""
        found = (source.get(name) for name in names for source in (self.tags, self.params))
        return str(next(filter(None, found), ""))


@dataclass
class Comparison:
    """How the second evaluation differs from the first.

    Attributes:
        first: its name.
        second: its name.
        metrics: the differences, by metric.
        won: tasks that only the second solved.
        lost: tasks that only the first solved.
        only_first: tasks that the second has not run.
        only_second: tasks that the first has not run.
    """

    first: str
    second: str
    metrics: dict[str, Difference] = field(default_factory=dict)
    won: list[Task] = field(default_factory=list)
    lost: list[Task] = field(default_factory=list)
    only_first: list[Task] = field(default_factory=list)
    only_second: list[Task] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        lists = {
            name: [task._asdict() for task in getattr(self, name)]
            for name in ("won", "lost", "only_first", "only_second")
        }
        metrics = {
            name: {**found._asdict(), "difference": found.mean}
            for name, found in self.metrics.items()
        }
        return {"first": self.first, "second": self.second, "metrics": metrics, **lists}


def compare(
    first: tuple[str, Iterable[Run]],
    second: tuple[str, Iterable[Run]],
    only: Sequence[str] = (),
) -> Comparison:
    """Compare two evaluations, each a name and its runs; `only` these metrics, if any are given."""
    left, right = by_task(first[1]), by_task(second[1])
    both = [task for task in left if task in right]
    found = Comparison(first[0], second[0])
    found.only_first = [task for task in left if task not in right]
    found.only_second = [task for task in right if task not in left]
    values: dict[str, list[tuple[float, float]]] = {}
    for task in both:
        before, after = left[task].metrics, right[task].metrics
        for name in before.keys() & after.keys():
            if isfinite(before[name]) and isfinite(after[name]):
                values.setdefault(name, []).append((before[name], after[name]))
        solved = [metrics.get(SUCCESS) for metrics in (before, after)]
        if solved == [0.0, 1.0]:
            found.won.append(task)
        elif solved == [1.0, 0.0]:
            found.lost.append(task)
    wanted = only or sorted((name for name in values if not name.startswith(SERIES)), key=_place)
    found.metrics = {name: difference(values[name]) for name in wanted if name in values}
    return found


def by_task(runs: Iterable[Run]) -> dict[Task, Run]:
    """The runs by what they worked on, in the order in which they began.

    Of runs that name no trial, the n-th one of a task is its n-th trial.
    """
    found: dict[Task, Run] = {}
    for run in sorted(runs, key=lambda run: (run.start_ms, run.run_id)):
        benchmark = run.said("qitos.benchmark", "benchmark_name")
        split = run.said("qitos.split", "benchmark_split")
        name = run.said("qitos.task_id", "task_id", "task")
        trial = run.said("qitos.trial", "trial")
        if not name:
            continue
        number = 0
        while (task := Task(benchmark, split, name, trial or str(number))) in found and not trial:
            number += 1
        found[task] = run  # Of a trial that ran again, the last one counts.
    return dict(sorted(found.items()))


def _place(name: str) -> tuple[int, str]:
    return (TOTALS.index(name) if name in TOTALS else len(TOTALS)), name
