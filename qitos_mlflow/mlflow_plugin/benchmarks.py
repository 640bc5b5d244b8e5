"""Evaluations by themselves, for the host's own runners of benchmarks and experiments.

Wraps what this QitOS has of: `run_benchmark_tasks` (also behind ``qit bench run``), the jobs of
recipes, `ExperimentRunner`. Each is called once, with what it was given, and what it returns or
raises is passed on. Inside of an evaluation of the user's there is no second one.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from qitos_mlflow._after_import import after_import
from qitos_mlflow._guard import report, shield
from qitos_mlflow.mlflow_plugin.evaluation_task import Task
from qitos_mlflow.mlflow_plugin.evaluations import current, evaluation, has_begun

CATEGORIES = ("category", "level", "Level", "difficulty", "domain", "env_name")
"""Where a task's metadata says what kind of task it is."""

SCORES = ("reward", "score", "exact_match", "accuracy", "correct", "partial_score")
"""What a result's metadata may have beside its success."""

_experiments: dict[int, dict[str, evaluation]] = {}
"""The evaluations of each experiment that is going on, by what is swept."""
_lock = threading.Lock()


def watch_benchmarks() -> None:
    """Log the host's benchmarks and experiments as evaluations. Idempotent; any thread."""
    after_import("qitos.benchmark.runner", _wrap_tasks)
    after_import("qitos.benchmark.common", _wrap_tasks)
    after_import("qitos.recipes.benchmarks._shared", _wrap_jobs)
    after_import("qitos.experiment.runner", _wrap_experiments)


def _replace(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have `wrapper` called with the original and its arguments, wherever the host has it."""
    original = getattr(owner, name, None)
    if not callable(original) or hasattr(original, "_qitos_mlflow"):
        return
    if isinstance(owner, ModuleType) and original.__module__ != owner.__name__:
        return  # Of another module, where it is wrapped.

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._qitos_mlflow = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
    for module in list(sys.modules.values()):  # Those that have imported it by its name.
        if getattr(module, "__name__", "").startswith("qitos"):
            with shield("benchmarks.replace"):
                if vars(module).get(name) is original:
                    setattr(module, name, wrapped)


def _wrap_tasks(module: ModuleType) -> None:
    _replace(module, "run_benchmark_tasks", _run_tasks)


def _wrap_jobs(module: ModuleType) -> None:
    _replace(module, "execute_example_jobs", _run_jobs)
    _replace(module, "_run_example_job", _run_job)


def _wrap_experiments(module: ModuleType) -> None:
    runner = getattr(module, "ExperimentRunner", None)
    if hasattr(runner, "run") and hasattr(runner, "_run_single"):
        _replace(runner, "run", _run_experiment)
        _replace(runner, "_run_single", _run_single)


# -- what the host calls ---------------------------------------------------------------------


def _run_tasks(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    runner = kwargs.get("runner")
    if runner is None:  # Nothing is run.
        return original(*args, **kwargs)

    @functools.wraps(runner)
    def judged(*args: Any, **given: Any) -> Any:
        task = given.get("task")
        with _task(getattr(task, "id", None), _metadata(task)) as one:
            produced = runner(*args, **given)
            _judge(one, produced)
            return produced

    with _evaluation(kwargs, tasks=kwargs.get("tasks")):
        return original(*args, **{**kwargs, "runner": judged})


def _run_jobs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if "jobs" in kwargs:
        kwargs["jobs"] = list(kwargs["jobs"])  # As the host does.
    output = os.path.abspath(os.path.expanduser(os.fspath(kwargs.get("output_path") or "")))  # noqa: PTH100, PTH111 - never raises
    with _evaluation(kwargs, tasks=kwargs.get("jobs"), output=output, resumes=kwargs.get("resume")):
        return original(*args, **kwargs)


def _run_job(original: Callable[..., Any], runner: Any, item: Any, *specs: Any) -> Any:
    task = item.get("task")
    task_id = item.get("task_id") or getattr(task, "id", None) or item.get("job_key")
    trial = next((item[key] for key in ("trial", "trial_id", "trial_index") if key in item), 0)
    with _task(task_id, {**_metadata(task), **item}, trial) as one:
        produced = original(runner, item, *specs)
        _judge(one, produced)
        return produced


def _run_experiment(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    if has_begun():
        return original(runner, *args, **kwargs)
    with _lock:
        _experiments[id(runner)] = {}
    error: BaseException | None = None
    try:
        return original(runner, *args, **kwargs)
    except BaseException as raised:
        error = raised
        raise
    finally:
        with _lock:
            ended = _experiments.pop(id(runner))
        for one in ended.values():
            one.end(error)


def _run_single(
    original: Callable[..., Any], runner: Any, combo: Any, task_id: Any, *rest: Any
) -> Any:
    with _task(task_id, {}, of=_of_combination(runner, combo)) as one:
        produced = original(runner, combo, task_id, *rest)
        _judge(one, produced, of_experiment=True)
        return produced


def _of_combination(runner: Any, combo: Any) -> evaluation | None:
    """The evaluation of what is swept, begun by the first task that needs it."""
    with shield("benchmarks.combination"), _lock:
        found = _experiments.get(id(runner))
        if found is None:
            return None
        key = json.dumps(combo, sort_keys=True, default=str)
        if key not in found:
            swept = ", ".join(f"{name}={value}" for name, value in combo.items())
            output = f"{os.path.abspath(getattr(runner, 'output_dir', ''))} {key}"  # noqa: PTH100
            spec = getattr(runner, "experiment_spec", None)
            made = _made(
                {"experiment_spec": spec},
                f"{getattr(spec, 'name', None) or 'experiment'} {swept}".strip(),
                params=combo,
                output=output,
                resumes=getattr(runner, "resume", False),
            )
            made.begin()
            found[key] = made
        return found[key]
    return None


# -- parts -----------------------------------------------------------------------------------


def _evaluation(
    given: Mapping[str, Any], *, tasks: Any, output: str = "", resumes: object = False
) -> AbstractContextManager[Any]:
    """The evaluation of a call of the host's, unless it is part of one already."""
    with shield("benchmarks.evaluation"):
        if not has_begun():
            return _made(given, tasks=tasks, output=output, resumes=resumes)
    return nullcontext()


def _made(
    given: Mapping[str, Any],
    name: str = "",
    *,
    tasks: Any = None,
    params: Mapping[str, Any] = {},
    output: str,
    resumes: object,
) -> evaluation:
    spec = given.get("experiment_spec")
    benchmark = given.get("benchmark") or getattr(spec, "benchmark_name", None)
    made = evaluation(
        name or getattr(spec, "name", None) or benchmark or "benchmark",
        benchmark=benchmark,
        split=given.get("split") or getattr(spec, "benchmark_split", None),
        tasks=tasks if isinstance(tasks, (list, tuple)) else None,
        params={**params, **_specs(run_spec=given.get("run_spec"), experiment_spec=spec)},
    )
    if output:
        made.place = {"output": output, "resumes": bool(resumes)}
    return made


def _task(
    task_id: Any, metadata: Mapping[str, Any], trial: Any = 0, of: evaluation | None = None
) -> AbstractContextManager[Task | None]:
    """A task of the evaluation that is going on; None if there is none."""
    with shield("benchmarks.task"):
        around = of or current()
        if isinstance(around, evaluation) and task_id is not None:
            category = next((metadata[key] for key in CATEGORIES if metadata.get(key)), None)
            number = int(trial) if str(trial).isdecimal() else 0
            return around.task(task_id, trial=number, category=category)
    return nullcontext()


def _judge(task: Task | None, produced: Any, *, of_experiment: bool = False) -> None:
    """Take what a runner has returned as the verdict.

    The `success` of an experiment is never true: the host looks for a stop reason that there is
    not. Only its errors say something.
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
        try:
            if hasattr(spec, "to_dict"):
                found[name] = spec.to_dict()
                if hasattr(spec, "fingerprint"):
                    found[f"{name}_fingerprint"] = spec.fingerprint()
        except Exception as error:  # noqa: BLE001 - of the host's; the evaluation goes on without
            report("benchmarks.specs", error)
    return found


def _metadata(task: Any) -> Mapping[str, Any]:
    found = getattr(task, "metadata", None)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float | None:
    """`value` if it is a number: anything may be in what a runner returns."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
