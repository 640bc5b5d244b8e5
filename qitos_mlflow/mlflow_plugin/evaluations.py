"""Evaluations: tasks that are done together, as one run with a run for each task below it.

On the agent's thread these are records like those of a trace: how an evaluation starts and ends,
and how each task was judged. A run of an agent names its evaluation by the evaluation's id, because
the run of the evaluation may not exist yet; the sink finds or creates it (`sink.parents`).

An evaluation holds for its thread, for threads that are started there, and if it is the only one
for the whole process. Processes that are started meanwhile get it by the variable
``QITOS_MLFLOW_EVALUATION``.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping, Sized
from functools import lru_cache
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.mlflow_plugin.evaluation_logger import REFERENCE, Logger, dataset_of
from qitos_mlflow.mlflow_plugin.evaluation_task import Task, here
from qitos_mlflow.mlflow_plugin.fluent.surroundings import STARTER
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.settings import EVALUATION_VARIABLE

_open: list[Evaluation] = []
"""The evaluations that this process has begun, the innermost one last."""
_said: dict[Evaluation | None, str] = {}
"""What the variable was before, and for each evaluation since; several may overlap."""


def evaluation(
    name: str,
    *,
    benchmark: str | None = None,
    split: str | None = None,
    dataset: Any = None,
    params: Mapping[str, Any] | None = None,
    tasks: Sized | int | None = None,
    trials: int = 1,
    key: str | None = None,
) -> Evaluation:
    """Have one MLflow run for a whole evaluation, with the runs of agents below it.

    A context manager: ``with evaluation("gaia") as run: …``. Nothing here waits for the server.

    Args:
        name: of the run.
        benchmark: what is evaluated on, such as ``"gaia"``.
        split: part of the benchmark.
        dataset: its name, a mapping with ``name``, ``digest`` and ``source``, or an object with
            these attributes, such as MLflow's datasets.
        params: params of the run.
        tasks: the tasks that are to be done, or their number: says how many were not.
        trials: how often each of them is to be done.
        key: continues the evaluation that has this key, and begins it if there is none. Without
            one it is a new evaluation, unless this process is part of one already.

    Raises:
        TypeError, ValueError: an argument cannot be used; the text names it.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name={name!r} cannot be used: give a text such as 'gaia'")
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(f"params={params!r:.100} cannot be used: give a mapping or None")
    if not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials={trials!r} cannot be used: give a number, at least 1")
    if key is not None and (not isinstance(key, str) or not key.strip()):
        raise ValueError(f"key={key!r} cannot be used: give a text or None")
    if tasks is not None and not isinstance(tasks, (int, Sized)):
        raise TypeError(f"tasks={tasks!r:.100} cannot be used: give a list, or how many they are")
    return Evaluation(
        name,
        benchmark=benchmark,
        split=split,
        dataset=dataset,
        params=params,
        tasks=tasks,
        trials=trials,
        key=key,
    )


def current() -> Task | Evaluation | None:
    """What a trace that starts on this thread is part of. Never raises; costs a microsecond."""
    at = here.get()
    if at is not None and at.open:
        return at  # type: ignore[no-any-return]
    if _open:
        thread: Any = threading.current_thread()
        while thread is not None:
            for one in reversed(_open):
                if one.thread is thread:
                    return one
            starter = getattr(thread, STARTER, None)
            thread = starter and starter()
        return _open[-1] if len(_open) == 1 else None
    text = os.environ.get(EVALUATION_VARIABLE)
    return _of_variable(text) if text else None


def has_begun() -> bool:
    """Whether there is an evaluation here that is begun and ended elsewhere in the program.

    A key in the variable alone begins none.
    """
    text = os.environ.get(EVALUATION_VARIABLE, "")
    return current() is not None and bool(_open or _in_json(text))


@lru_cache(maxsize=8)
def _of_variable(text: str) -> Evaluation:
    """The evaluation of another process. A plain text is a key."""
    found = _in_json(text)
    key = str(found.get("id") or text)
    made = Evaluation(
        str(found.get("name") or key),
        benchmark=found.get("benchmark"),
        split=found.get("split"),
        key=key,
        place={name: found[name] for name in REFERENCE & found.keys()},
    )
    made.owner, made.open = False, True
    return made


def _id(text: str) -> str:
    """`text` as an evaluation's id: MLflow's filters cannot hold both kinds of quotes."""
    return text.replace('"', "'")


def _in_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class Evaluation:
    """What `evaluation` returns. Any thread.

    Attributes:
        id: names it on the server, in every process.
        open: agents that start now are part of it.
        owner: this process begins and ends it; else it is another process's.
        place: what another process says of where its run is.
        thread: on which it was begun.
    """

    def __init__(
        self,
        name: str,
        *,
        benchmark: str | None = None,
        split: str | None = None,
        dataset: Any = None,
        params: Mapping[str, Any] | None = None,
        tasks: Sized | int | None = None,
        trials: int = 1,
        key: str | None = None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.benchmark, self.split = name, benchmark, split
        self.id = _id(key or uuid.uuid4().hex)
        self.open, self.owner = False, True
        self.place: dict[str, Any] = dict(place or {})
        self.thread: Any = None
        self._params = dict(params or {})
        number = len(tasks) if isinstance(tasks, Sized) else tasks
        self._expected = None if number is None else number * trials
        self._dataset = dataset_of(dataset, benchmark, split, tasks)
        self._given_key = key is not None
        self.loggers: dict[Any, Logger] = {}
        self._before: Task | Evaluation | None = None
        self._pid = 0

    def task(self, task_id: object, *, trial: int = 0, category: object = None) -> Task:
        """One task: ``with run.task("t1") as task: agent.run(…); task.result(success=True)``.

        Args:
            task_id: names the task in the benchmark.
            trial: which of several trials it is.
            category: such as the task's level; the numbers are split by it.

        Raises:
            RuntimeError: the evaluation was not begun.
        """
        if self.thread is None and not self.open:
            raise RuntimeError(f"begin it first: with evaluation({self.name!r}) as run: …")
        return Task(self, str(task_id), int(trial), None if category is None else str(category))

    def __enter__(self) -> Evaluation:
        self.begin()
        self._before = here.get()
        here.set(self)
        with shield("evaluations.variable"):
            for logger in list(self.loggers.values())[:1]:
                said: dict[str, Any] = {"benchmark": self.benchmark, "split": self.split}
                said |= logger.settings["evaluation"]
                _said.setdefault(None, os.environ.get(EVALUATION_VARIABLE, ""))
                os.environ[EVALUATION_VARIABLE] = _said[self] = json.dumps(said)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        here.set(self._before)
        with shield("evaluations.variable"):
            if _said.pop(self, None) is not None:
                *_, os.environ[EVALUATION_VARIABLE] = _said.values()
                if len(_said) == 1 and not _said.pop(None):
                    del os.environ[EVALUATION_VARIABLE]
        self.end(error)

    def begin(self) -> None:
        """Record the start. Never raises, never waits."""
        with shield("evaluations.begin"):
            if not self._given_key and (text := os.environ.get(EVALUATION_VARIABLE)) and not _open:
                found = _in_json(text)
                if found.get("name", self.name) == self.name:
                    self.id = _id(str(found.get("id") or text))
                    self.owner = not found
                    self.place = {name: found[name] for name in REFERENCE & found.keys()}
            self.thread, self._pid, self.open = threading.current_thread(), os.getpid(), True
            self.loggers = {}
            _open.append(self)
            if tracing.get_tracing_provider().mode == tracing.TracingMode.DISABLED:
                return
            for processor in tracing.processors():
                plugins = getattr(processor, "plugins", {})
                for plugin in plugins.values() if isinstance(plugins, dict) else ():
                    if hasattr(plugin, "recorder") and plugin.qitos_wants_trace():
                        self.logger(plugin)

    def end(self, error: BaseException | None = None) -> None:
        """Record the end. Never raises, never waits."""
        self.open = False
        with shield("evaluations.end"):
            if self in _open:
                _open.remove(self)
            if os.getpid() != self._pid or not self.owner:
                return
            status = "FINISHED"
            if error is not None:
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
            for logger in self.loggers.values():
                logger.end(status)

    def logger(self, plugin: Any) -> Logger:
        """The evaluation as this plugin logs it; its start is recorded the first time."""
        known = self.loggers.get(plugin)
        if known is not None:
            return known
        made = self.loggers[plugin] = Logger(plugin, self)
        if self.owner:
            tags = {"mlflow.runType": "genai_evaluate", **self._tags}
            if self._expected is not None:
                tags["qitos.evaluation.expected"] = str(self._expected)
            made.settings["tags"] = {**made.settings.get("tags", {}), **tags}
            made.settings["run_name"] = self.name
            made.record(
                kind="evaluation_start",
                trace_id=made.trace_id,
                name=self.name,
                metadata=self._params,
                dataset=self._dataset,
                settings=made.settings,
            )
        return made

    @property
    def _tags(self) -> dict[str, str]:
        found = {"qitos.benchmark": self.benchmark, "qitos.split": self.split}
        return {key: str(value) for key, value in found.items() if value}

    def mark(self, plugin: Any, logged_as: RunSettings, tags: Mapping[str, str] = {}) -> None:
        """Have a run be part of it: change how it is logged."""
        with shield("evaluations.mark"):
            reference = self.logger(plugin).settings["evaluation"]
            places = plugin.settings.experiment_name is None
            logged_as["evaluation"] = {**reference, "places": places}
            logged_as["tags"] = {**logged_as.get("tags", {}), **self._tags, **tags}

    def began(self, plugin: Any, trace: Any, logged_as: RunSettings) -> None:
        """Have the run of a trace that is about to start be part of it."""
        self.mark(plugin, logged_as)
