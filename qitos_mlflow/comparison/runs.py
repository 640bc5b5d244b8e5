"""Two evaluations of the same tasks, paired by task and trial. Pure.

Receives runs as the server has them, hands on what differs between them. Which runs count, and
what was solved, is the same as in an evaluation's own numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from qitos_mlflow.comparison.statistics import Difference, difference
from qitos_mlflow.mlflow_plugin.mapping.entities import StoredRun
from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import (
    MOST,
    SUMS,
    TASK_TAG,
    TRIAL_TAG,
    VERDICT,
    Attempt,
    attempts,
)

SUCCESS = "success"
"""The metric that says whether a task was solved: 0 or 1."""

SERIES = ("generation/", "step/", "critic/score", "tool/", "model/", "system/")
"""Metrics that say nothing of a task as a whole: their last value is that of its last step."""


class Task(NamedTuple):
    """What was worked on; equal for attempts that are compared."""

    benchmark: str
    split: str
    task: str
    trial: str

    def __str__(self) -> str:
        parts = (self.benchmark, self.split, self.task)
        text = "/".join(part for part in parts if part)
        return text if self.trial == "0" else f"{text}#{self.trial}"


@dataclass
class Comparison:
    """How the second evaluation differs from the first.

    Attributes:
        first: its name.
        second: its name.
        metrics: the differences, by metric.
        won: tasks that only the second solved.
        lost: tasks that only the first solved.
        only_first: tasks that the second has not finished.
        only_second: tasks that the first has not finished.
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
        metrics = {
            name: {**one._asdict(), "difference": one.mean} for name, one in self.metrics.items()
        }
        tasks = {
            name: [task._asdict() for task in found]
            for name, found in vars(self).items()
            if isinstance(found, list)
        }
        return {"first": self.first, "second": self.second, "metrics": metrics, **tasks}


def compare(
    first: tuple[str, Iterable[StoredRun]],
    second: tuple[str, Iterable[StoredRun]],
    only: Sequence[str] = (),
) -> Comparison:
    """Compare two evaluations, each a name and its runs; `only` these metrics, if any are given."""
    left, right = by_task(first[1]), by_task(second[1])
    found = Comparison(first[0], second[0])
    found.only_first = [task for task in left if task not in right]
    found.only_second = [task for task in right if task not in left]
    values: dict[str, list[tuple[float, float]]] = {}
    for task in (task for task in left if task in right):
        before, after = _metrics(left[task]), _metrics(right[task])
        for name in before.keys() & after.keys():
            values.setdefault(name, []).append((before[name], after[name]))
        flip = before.get(SUCCESS), after.get(SUCCESS)
        if flip == (0.0, 1.0):
            found.won.append(task)
        elif flip == (1.0, 0.0):
            found.lost.append(task)
    wanted = only or sorted((name for name in values if not name.startswith(SERIES)), key=_place)
    found.metrics = {name: difference(values[name]) for name in wanted if name in values}
    return found


def by_task(runs: Iterable[StoredRun]) -> dict[Task, Attempt]:
    """The attempts that are over, by what they worked on.

    Of those that name no trial, the n-th one of a task is its n-th trial.
    """
    found: dict[Task, Attempt] = {}
    numbers: dict[tuple[str, ...], count[int]] = defaultdict(count)
    for attempt in attempts(runs):
        tags = attempt.tags
        if not attempt.over or not tags.get(TASK_TAG):
            continue
        about = (tags.get("qitos.benchmark", ""), tags.get("qitos.split", ""), tags[TASK_TAG])
        trials = [tags[TRIAL_TAG]] if TRIAL_TAG in tags else map(str, numbers[about])
        found[next(one for trial in trials if (one := Task(*about, trial)) not in found)] = attempt
    return dict(sorted(found.items()))


def _metrics(attempt: Attempt) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in attempt.runs:
        found |= run.metrics
    found |= {name: attempt.sum(name) or 0.0 for name in SUMS.values() if name in found}
    for name in (SUCCESS, VERDICT + SUCCESS):
        found.pop(name, None)
    if attempt.success is not None:
        found[SUCCESS] = float(attempt.success)
    return {name: value for name, value in found.items() if abs(value) < MOST}


def _place(name: str) -> tuple[bool, bool, str]:
    return name != SUCCESS, not name.startswith(VERDICT), name
