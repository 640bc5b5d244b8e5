"""An evaluation's numbers and its table of results, from its runs as the server has them. Pure.

An attempt is all that was done for one task in one trial, mostly one run. If a task was begun
again, as in a sweep that was resumed, the newest attempt that is over counts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping.entities import StoredRun
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_key

PREFIX = "eval/"
"""Begins the names of all metrics: a user's own run may have an ``n`` or a ``success_rate``."""

STOP = "stop/"
"""Follows in those that count attempts by stop reason."""

VERDICT = "verdict/"
"""Begins the names of the metrics with which a benchmark judges a run."""

TASK_TAG, TRIAL_TAG, ATTEMPT_TAG = "qitos.task_id", "qitos.trial", "qitos.attempt"
PLACE_TAGS = ("qitos.benchmark", "qitos.split", TASK_TAG, TRIAL_TAG)
CATEGORY_TAG, SKIPPED_TAG, STOP_TAG = "qitos.category", "qitos.skipped", "stop_reason"
PREDICTION_TAG = "qitos.prediction"
LINK_TAGS = ("qitos.trace_id", "qitos.linked_trace_id")
READ_TAGS = (
    *(*PLACE_TAGS, ATTEMPT_TAG, CATEGORY_TAG, SKIPPED_TAG, STOP_TAG, PREDICTION_TAG),
    *LINK_TAGS,
)

AGAIN = re.compile(r"~\d+$")
"""Ends the id of a trace that two processors log to one server."""

MOST_GROUPS = 50
"""Stop reasons, and categories, with numbers of their own."""
MOST_TRIALS = 10
"""Largest k of pass^k."""

Z = 1.959963984540054
"""Quantile of the normal distribution for an interval of 95 %."""

SUMS = {
    "steps": "total_steps",
    "tokens": "total_tokens",
    "cost": "total_cost",
    "seconds": "duration_s",
}
"""What is added up over an attempt, and the metric of a run that has it."""

MOST = 1e100
"""No larger number is added up: MLflow's stores keep an infinity as the largest number there is."""


class Attempt:
    """One attempt at a task; `runs` are in order, the oldest first."""

    def __init__(self, runs: Sequence[StoredRun]) -> None:
        self.runs = runs
        self.tags: dict[str, str] = {}
        for run in runs:
            self.tags.update(run.tags)
        self.verdict = {
            key.removeprefix(VERDICT): value
            for run in runs
            for key, value in run.metrics.items()
            if key.startswith(VERDICT)
        }
        self.failed = any(run.status == "FAILED" for run in runs)
        self.skipped = SKIPPED_TAG in self.tags
        ended = all(run.status in ("FINISHED", "FAILED") for run in runs)
        self.over = not self.skipped and (bool(self.verdict) or ended)

    @property
    def place(self) -> tuple[str, ...]:
        """The same for another attempt at the same task in the same trial."""
        if TRIAL_TAG in self.tags:
            return tuple(self.tags.get(tag, "") for tag in PLACE_TAGS)
        return (self.runs[0].ref.run_id,)

    @property
    def task(self) -> str:
        """The task's id; that of a run without one is the run's."""
        return self.tags.get(TASK_TAG) or self.runs[0].ref.run_id

    @property
    def success(self) -> bool | None:
        """As the benchmark says, else as the last agent says; an attempt that failed has none."""
        if "success" in self.verdict:
            return self.verdict["success"] > 0
        own = self.runs[-1].metrics.get("success")
        if own is not None and not math.isnan(own):
            return own > 0
        return False if self.failed else None

    def sum(self, name: str) -> float | None:
        """The sum of a metric over its runs; None if no run has it as a number that adds up."""
        found = [run.metrics[name] for run in self.runs if name in run.metrics]
        found = [one for one in found if abs(one) < MOST]
        return math.fsum(found) if found else None


def lean(run: StoredRun) -> StoredRun:
    """The run with what is read of it here. Of thousands, the rest would not fit into memory."""
    metrics = {
        key: value
        for key, value in run.metrics.items()
        if key == "success" or key in SUMS.values() or key.startswith(VERDICT)
    }
    tags = {key: run.tags[key] for key in READ_TAGS if key in run.tags}
    return replace(run, metrics=metrics, tags=tags, metric_times={}, params={})


def attempts(runs: Iterable[StoredRun]) -> list[Attempt]:
    """The attempts that count, the oldest first. Outside of tasks, only if there are none."""
    ordered = sorted(runs, key=lambda run: (run.ref.start_ms, run.ref.run_id))
    any_task = any(ATTEMPT_TAG in run.tags for run in ordered)
    together: dict[str, list[StoredRun]] = {}
    traces = {""}
    for run in ordered:
        own, trace = run.tags.get(ATTEMPT_TAG), run.tags.get(LINK_TAGS[0], "")
        if not trace and run.tags.get(TASK_TAG):
            trace = run.ref.run_id  # A run of the user's own counts if it names a task.
        beside = own is None and (any_task or LINK_TAGS[1] in run.tags)
        if not beside and (trace := AGAIN.sub("", trace)) not in traces:
            traces.add(trace)
            together.setdefault(own or run.ref.run_id, []).append(run)
    counting: dict[tuple[str, ...], Attempt] = {}
    for attempt in map(Attempt, together.values()):
        before = counting.get(attempt.place)
        if before is None or attempt.over or not before.over:
            counting[attempt.place] = attempt
    return list(counting.values())


def totals(found: Sequence[Attempt], expected: int | None = None) -> dict[str, float]:
    """The metrics of the parent.

    Args:
        found: its attempts.
        expected: how many there are to be, if that is known.
    """
    over = [attempt for attempt in found if attempt.over]
    skipped = sum(attempt.skipped for attempt in found)
    numbers: dict[str, float] = {
        "n": len(over),
        "failed": sum(attempt.failed for attempt in over),
        "skipped": skipped,
        "unfinished": len(found) - len(over) - skipped,
    }
    if expected is not None:
        numbers["not_run"] = max(0, expected - len(found))
    numbers |= _success(over, "")
    numbers |= _pass_hats(over)
    for name, metric in SUMS.items():
        values = sorted(one for attempt in over if (one := attempt.sum(metric)) is not None)
        if values:
            numbers[f"{name}_mean"] = math.fsum(values) / len(values)
            numbers[f"{name}_p95"] = values[math.ceil(0.95 * len(values)) - 1]
            numbers[f"{name}_total"] = math.fsum(values)
    stops = Counter(attempt.tags[STOP_TAG] for attempt in over if STOP_TAG in attempt.tags)
    numbers |= {f"{STOP}{reason}": count for reason, count in stops.most_common(MOST_GROUPS)}
    categories = _grouped(over, lambda attempt: attempt.tags.get(CATEGORY_TAG, ""))
    for category, members in list(categories.items())[:MOST_GROUPS]:
        if category:
            numbers[f"category/{category}/n"] = len(members)
            numbers |= _success(members, f"category/{category}/")
    return {clean_key(f"{PREFIX}{key}"): float(number) for key, number in numbers.items()}


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The bounds of Wilson's interval of 95 % for a rate; n is at least 1."""
    rate, z2 = successes / n, Z * Z
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _success(over: Sequence[Attempt], prefix: str) -> dict[str, float]:
    judged = [attempt.success for attempt in over if attempt.success is not None]
    if not judged:
        return {}
    successes = sum(judged)
    low, high = wilson(successes, len(judged))
    return {
        f"{prefix}success": successes,
        f"{prefix}success_rate": successes / len(judged),
        f"{prefix}success_rate_low": low,
        f"{prefix}success_rate_high": high,
    }


def _pass_hats(over: Sequence[Attempt]) -> dict[str, float]:
    """pass^k: how likely k trials of a task all succeed, over the tasks with k trials or more."""
    tasks = _grouped([a for a in over if a.success is not None], lambda attempt: attempt.task)
    counts = [(len(trials), sum(bool(one.success) for one in trials)) for trials in tasks.values()]
    found = {}
    for k in range(2, min(MOST_TRIALS, max((n for n, _ in counts), default=0)) + 1):
        shares = [math.comb(good, k) / math.comb(n, k) for n, good in counts if n >= k]
        found[f"pass_hat_{k}"] = math.fsum(shares) / len(shares)
    return found


def _grouped(found: Sequence[Attempt], by: Callable[[Attempt], str]) -> dict[str, list[Attempt]]:
    groups: dict[str, list[Attempt]] = {}
    for attempt in found:
        groups.setdefault(by(attempt), []).append(attempt)
    return dict(sorted(groups.items()))


def table(found: Sequence[Attempt]) -> Mapping[str, Any]:
    """One row an attempt, in the form of MLflow's tables (`mlflow.log_table`)."""
    rows = [_row(attempt) for attempt in sorted(found, key=lambda a: (a.task, a.place))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}


def _row(attempt: Attempt) -> dict[str, Any]:
    last = attempt.runs[-1]
    own = last.metrics.get("success")
    return {
        "task": attempt.task,
        "trial": attempt.tags.get(TRIAL_TAG),
        "category": attempt.tags.get(CATEGORY_TAG),
        "status": "SKIPPED" if attempt.skipped else last.status,
        "success": attempt.success,
        "agent_success": None if own is None or math.isnan(own) else own > 0,
        "stop_reason": attempt.tags.get(STOP_TAG),
        **{name: attempt.sum(metric) for name, metric in SUMS.items()},
        "prediction": attempt.tags.get(PREDICTION_TAG),
        "run_id": last.ref.run_id,
        **{f"{VERDICT}{key}": value for key, value in attempt.verdict.items() if key != "success"},
    }
