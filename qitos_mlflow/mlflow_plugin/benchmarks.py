"""Makes calls of the host's own runners of benchmarks and experiments evaluations.

Wraps the runners that this QitOS has: `run_benchmark_tasks` (also behind ``qit bench run``), the
jobs of recipes, `ExperimentRunner`. A wrapper calls the original once, with what it was given, and
passes on what that returns or raises. Inside the user's own evaluation, it begins none.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow.mlflow_plugin.evaluation_task import Task
from qitos_mlflow.mlflow_plugin.evaluations import current, evaluation, has_begun

CATEGORIES = ("category", "level", "Level", "difficulty", "domain", "env_name")
"""Where a task's metadata says what kind of task it is."""

SCORES = ("reward", "score", "exact_match", "accuracy", "correct", "partial_score")
"""What a result's metadata may have beside its success."""

TRIALS = ("trial", "trial_id", "trial_index")
"""Where a recipe's job says which trial it is."""

_experiments: dict[int, dict[str, evaluation]] = {}
"""The evaluations of each experiment that is going on, by what is swept."""
_lock = threading.Lock()

Wrapper = Callable[[Callable[[], Any], dict[str, Any]], Any]
"""Gets what calls the original, and the arguments by their names, which it may change."""


def wrap_runners(module: ModuleType) -> None:
    """Put our wrappers around what this module of the host has of them. Idempotent."""
    for path, wrapper in WRAPPERS[module.__name__].items():
        owner_name, _, name = path.rpartition(".")
        owner = getattr(module, owner_name, None) if owner_name else module
        original = getattr(owner, name, None)
        # Not one of another module, where it is wrapped.
        if getattr(original, "__module__", None) == module.__name__ and not hasattr(original, OURS):
            _replace(owner, name, original, wrapper)


def _replace(owner: Any, name: str, original: Any, wrapper: Wrapper) -> None:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # Raises the same.
        return wrapper(lambda: original(*bound.args, **bound.kwargs), bound.arguments)

    setattr(wrapped, OURS, True)
    setattr(owner, name, wrapped)
    for module in list(sys.modules.values()):  # Those that have imported it by its name.
        if getattr(module, "__name__", "").startswith("qitos"):
            with shield("benchmarks.replace"):
                if vars(module).get(name) is original:
                    setattr(module, name, wrapped)


# -- what the host calls ---------------------------------------------------------------------


def _run_tasks(call: Callable[[], Any], given: dict[str, Any]) -> Any:
    runner = given.get("runner")
    if runner is None:  # Nothing is run.
        return call()

    @functools.wraps(runner)
    def judged(*args: Any, **kwargs: Any) -> Any:
        with _task({"task": kwargs.get("task")}) as one:
            produced = runner(*args, **kwargs)
            _judge(one, produced)
            return produced

    given["runner"] = judged
    with _evaluation(given, "tasks"):
        return call()


def _run_jobs(call: Callable[[], Any], given: dict[str, Any]) -> Any:
    given["jobs"] = list(given["jobs"])  # As the host does.
    with _evaluation(given, "jobs"):
        return call()


def _run_job(call: Callable[[], Any], given: dict[str, Any]) -> Any:
    with _task(given.get("item")) as one:
        produced = call()
        _judge(one, produced)
        return produced


def _run_experiment(call: Callable[[], Any], given: dict[str, Any]) -> Any:
    if has_begun():
        return call()
    runner = id(given.get("self"))
    with _lock:
        _experiments.setdefault(runner, {})
    error: BaseException | None = None
    try:
        return call()
    except BaseException as raised:
        error = raised
        raise
    finally:
        with _lock:
            ended = _experiments.pop(runner, {})
        for one in ended.values():
            one.end(error)


def _run_single(call: Callable[[], Any], given: dict[str, Any]) -> Any:
    with _task(given, of=_of_combination(given.get("self"), given.get("combo"))) as one:
        produced = call()
        _judge(one, produced, of_experiment=True)
        return produced


OURS = "_qitos_mlflow"
"""Attribute of our wrappers."""

WRAPPERS: dict[str, dict[str, Wrapper]] = {
    "qitos.benchmark.runner": {"run_benchmark_tasks": _run_tasks},
    "qitos.benchmark.common": {"run_benchmark_tasks": _run_tasks},
    "qitos.recipes.benchmarks._shared": {
        "execute_example_jobs": _run_jobs,
        "_run_example_job": _run_job,
    },
    "qitos.experiment.runner": {
        "ExperimentRunner.run": _run_experiment,
        "ExperimentRunner._run_single": _run_single,
    },
}


# -- parts -----------------------------------------------------------------------------------


def _of_combination(runner: Any, combo: Any) -> evaluation | None:
    """The evaluation of what is swept, begun by the first task that needs it."""
    with shield("benchmarks.combination"), _lock:
        found = _experiments.get(id(runner))
        if found is None:
            return None
        key = json.dumps(combo, sort_keys=True, default=str)
        if key not in found:
            spec = getattr(runner, "experiment_spec", None)
            swept = ", ".join(f"{name}={value}" for name, value in combo.items())
            name = f"{getattr(spec, 'name', None) or 'experiment'} {swept}".strip()
            output = f"{Path(getattr(runner, 'output_dir', '')).absolute()} {key}"
            made = _made({"experiment_spec": spec}, name, params=combo)
            made.place = {"output": output, "resumes": bool(getattr(runner, "resume", False))}
            made.begin()
            found[key] = made
        return found[key]
    return None


def _evaluation(given: Mapping[str, Any], tasks: str) -> AbstractContextManager[Any]:
    """The evaluation of a call of the host's, unless it is part of one already."""
    with shield("benchmarks.evaluation"):
        if not has_begun():
            listed = given.get(tasks)
            made = _made(given, tasks=listed if isinstance(listed, (list, tuple)) else None)
            if output := given.get("output_path"):
                place = str(Path(output).expanduser().absolute())
                made.place = {"output": place, "resumes": bool(given.get("resume"))}
            return made
    return nullcontext()


def _made(
    given: Mapping[str, Any], name: str = "", *, tasks: Any = None, params: Mapping[str, Any] = {}
) -> evaluation:
    spec = given.get("experiment_spec")
    benchmark = given.get("benchmark") or getattr(spec, "benchmark_name", None)
    return evaluation(
        name or getattr(spec, "name", None) or benchmark or "benchmark",
        benchmark=benchmark,
        split=given.get("split") or getattr(spec, "benchmark_split", None),
        tasks=tasks,
        params={**params, **_specs(run_spec=given.get("run_spec"), experiment_spec=spec)},
    )


def _task(given: Any, of: evaluation | None = None) -> AbstractContextManager[Task | None]:
    """A task of the evaluation that is going on; None if there is none.

    Args:
        given: what the host says of it: the task, ids, number of the trial.
        of: the evaluation, if it is not that of this thread.
    """
    with shield("benchmarks.task"):
        around, task = of or current(), given.get("task")
        metadata = getattr(task, "metadata", None)
        known = {**(metadata if isinstance(metadata, Mapping) else {}), **given}
        ids = given.get("task_id"), getattr(task, "id", None), given.get("job_key")
        task_id = next((one for one in ids if one is not None), None)
        trial = next((given[key] for key in TRIALS if key in given), 0)
        if isinstance(around, evaluation) and task_id is not None:
            category = next(
                (known[key] for key in CATEGORIES if known.get(key) not in (None, "")), None
            )
            number = int(trial) if str(trial).isdecimal() else 0
            return around.task(task_id, trial=number, category=category)
    return nullcontext()


def _judge(task: Task | None, produced: Any, *, of_experiment: bool = False) -> None:
    """Take what a runner has returned as the verdict.

    The `success` of an experiment is never true: the host looks for a stop reason that does not
    exist. So false says nothing, unless the task ended in an error.
    """
    if task is None:
        return
    with shield("benchmarks.judge"):
        row = produced if isinstance(produced, Mapping) else vars(produced)
        metadata = row.get("metadata") or {}
        success = row.get("success")
        if of_experiment and not success:
            success = False if row.get("stop_reason") == "error" else None
        task.result(
            None if success is None else bool(success),
            prediction=row.get("prediction"),
            stop_reason=row.get("stop_reason"),
            steps=_number(row.get("steps")),
            tokens=_number(row.get("token_usage")),
            cost=_number(row.get("cost")) or None,  # The host writes 0 if it does not know.
            seconds=_number(row.get("latency_seconds")),
            **{key: _number(metadata.get(key)) for key in SCORES},
        )


def _specs(**specs: Any) -> dict[str, Any]:
    """The host's specifications as params, each with its fingerprint."""
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        with shield("benchmarks.specs"):
            if hasattr(spec, "to_dict"):
                found[name] = spec.to_dict()
                if hasattr(spec, "fingerprint"):
                    found[f"{name}_fingerprint"] = spec.fingerprint()
    return found


def _number(value: Any) -> float | None:
    """`value` if it is a number: anything may be in what a runner returns."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
