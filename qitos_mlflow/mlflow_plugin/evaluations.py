"""Evaluations: tasks that are done together, as one run with a run for each task below it.

On the agent's thread these are records like those of a trace: how an evaluation starts and ends,
and how each task was judged. A run of an agent names its evaluation by the evaluation's id, because
the run of the evaluation may not exist yet; the sink finds or creates it (`sink.parents`).

An evaluation holds for its thread and for what is started there (`fluent.carried`). If it is the
only one, it holds for the whole process. Processes that are started meanwhile get it by the
variable ``QITOS_MLFLOW_EVALUATION``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sized
from functools import lru_cache
from importlib import import_module
from typing import Any
from uuid import uuid4

from qitos_mlflow import tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.mlflow_plugin.evaluation_logger import Logger, dataset_of
from qitos_mlflow.mlflow_plugin.evaluation_task import Task
from qitos_mlflow.mlflow_plugin.fluent.carried import current as current_context
from qitos_mlflow.mlflow_plugin.fluent.carried import here
from qitos_mlflow.mlflow_plugin.fluent.origins import watch
from qitos_mlflow.recording.record import InEvaluation, RunSettings
from qitos_mlflow.settings import EVALUATION_VARIABLE

REFERENCE = frozenset(InEvaluation.__annotations__)

_open: list[evaluation] = []
"""The evaluations that this process has begun, the innermost one last."""
_outside = ""
"""The value of the variable outside of all of them."""


def current() -> Task | evaluation | None:
    """What a trace that starts on this thread is part of. Never raises; costs a microsecond."""
    at = here.get()
    if at is not None and at.open:
        return at  # type: ignore[no-any-return]
    if _open:
        return _open[-1] if len(_open) == 1 else None
    text = os.environ.get(EVALUATION_VARIABLE, "").strip()
    return _of_variable(text) if text else None


def has_begun() -> bool:
    """Whether an evaluation has begun here, so that a runner of the host must not begin one.

    A key in the variable alone begins none.
    """
    text = os.environ.get(EVALUATION_VARIABLE, "")
    return current() is not None and bool(_open or _in_json(text))


class evaluation:  # noqa: N801 - reads as a statement
    """One MLflow run for a whole evaluation, with the runs of agents below it.

    A context manager: ``with evaluation("gaia") as run: …``. Nothing here waits for the server.

    Args:
        name: of the run.
        benchmark: what is evaluated on, such as ``"gaia"``.
        split: part of the benchmark.
        dataset: its name, a mapping with ``name``, ``digest`` and ``source``, or an object with
            these attributes, such as MLflow's datasets.
        params: params of the run.
        tasks: the tasks, or the number of attempts (tasks times trials); for ``eval/not_run``.
        key: continues the evaluation that has this key, and begins it if there is none. Without
            a key this is a new evaluation, unless this process is part of one already.

    Attributes:
        id: names it on the server, in every process.
        open: agents that start now are part of it.
        owner: this process begins and ends it; else another process does.
        place: what another process, or a runner of the host, says of where its run is.
        parent_run_id: the run that `qitos_mlflow.context` names around it.
        loggers: the evaluation as each plugin logs it.

    Raises:
        TypeError, ValueError: an argument cannot be used; the text names it.
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
        key: str | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"name={name!r} cannot be used: give a text such as 'gaia'")
        if params is not None and not isinstance(params, Mapping):
            raise TypeError(f"params={params!r:.100} cannot be used: give a mapping or None")
        if key is not None and (not isinstance(key, str) or not key.strip()):
            raise ValueError(f"key={key!r} cannot be used: give a text or None")
        if tasks is not None and not isinstance(tasks, (int, Sized)):
            raise TypeError(f"tasks={tasks!r:.100} cannot be used: give a list or a number")
        self.name, self.benchmark, self.split = name, benchmark, split
        self.id = _id(key or uuid4().hex)
        self.open, self.owner = False, True
        self.place: dict[str, Any] = {}
        self.parent_run_id: str | None = None
        self.loggers: dict[Any, Logger] = {}
        self._params = dict(params or {})
        self._expected = len(tasks) if isinstance(tasks, Sized) else tasks
        self._dataset = dataset_of(dataset, benchmark, split, tasks)
        self._has_key = key is not None
        self._text = ""
        self._before: Task | evaluation | None = None
        self._pid = 0

    def task(self, task_id: object, *, trial: int = 0, category: object = None) -> Task:
        """One task: ``with run.task("t1") as task: agent.run(…); task.result(success=True)``.

        Args:
            task_id: names the task in the benchmark.
            trial: which of several trials it is, from 0.
            category: such as the task's level; the numbers are split by it.

        Raises:
            RuntimeError: the evaluation was not begun.
        """
        if not self._pid and not self.open:
            raise RuntimeError(f"begin it first: with evaluation({self.name!r}) as run: …")
        return Task(self, str(task_id), int(trial), None if category is None else str(category))

    def __enter__(self) -> evaluation:
        global _outside
        self.begin()
        self._before = here.get()
        here.set(self)
        with shield("evaluations.variable"):
            if not any(one._text for one in _open):
                _outside = os.environ.get(EVALUATION_VARIABLE, "")
            said: dict[str, Any] = {"id": self.id, "name": self.name}
            said |= {"benchmark": self.benchmark, "split": self.split}
            for logger in self.ready()[:1]:
                said |= logger.settings["evaluation"]
            self._text = json.dumps(said)
            _tell_processes()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        here.set(self._before)
        self.end(error)
        with shield("evaluations.variable"):
            _tell_processes()

    def begin(self) -> None:
        """Record the start. Never raises, never waits."""
        with shield("evaluations.begin"):
            watch()
            self._pid, self.open = os.getpid(), True
            inside = any(one._pid == self._pid for one in _open)  # Not in a fork's parent process.
            if not self._has_key and not inside and (text := os.environ.get(EVALUATION_VARIABLE)):
                self._join(text)
            self.parent_run_id = getattr(current_context.get(), "parent_run_id", None)
            self.loggers = {}
            _open.append(self)
            import_module("qitos")  # Registers what is installed, which logs the evaluation, too.
            self.ready()

    def ready(self) -> list[Logger]:
        """The evaluation as each plugin logs it: all that take traces now, and those before."""
        mode = tracing.get_tracing_provider().mode
        if self.open and mode != tracing.TracingMode.DISABLED:
            for processor in tracing.processors():
                plugins = getattr(processor, "plugins", {})
                for plugin in plugins.values() if isinstance(plugins, dict) else ():
                    if hasattr(plugin, "recorder") and plugin.qitos_wants_trace():
                        self.logger(plugin)
        return list(self.loggers.values())

    def __reduce__(self) -> Any:
        """Pickled, it is the variable's text, from which another process makes it again."""
        return _of_variable, (self._text,)

    def _join(self, text: str) -> None:
        """Be the evaluation that the variable names, unless the two have different names."""
        found = _in_json(text)
        if found.get("name", self.name) == self.name:
            self.id = _id(str(found.get("id") or text))
            self.owner = not found
            self.place = {name: found[name] for name in REFERENCE & found.keys()}

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
            made.start(tags, metadata=self._params, dataset=self._dataset)
        return made

    def takes(self, plugin: Any, uri: str | None, parent_run_id: str | None) -> bool:
        """Whether an agent that is logged at `uri` is part of it.

        It is not if the evaluation is logged at another place: ids mean something else there. Nor
        if a `qitos_mlflow.context` inside the evaluation names another parent. A context around the
        evaluation names the evaluation's run.
        """
        with shield("evaluations.takes"):
            logger = self.logger(plugin)
            own = logger.settings["evaluation"].get("run_id")
            return uri == logger.uri and parent_run_id in (None, own)
        return False

    def began(
        self, plugin: Any, trace: Any, logged_as: RunSettings, tags: Mapping[str, str] = {}
    ) -> None:
        """Have the run of a trace that is about to start be part of it."""
        with shield("evaluations.began"):
            reference = self.logger(plugin).settings["evaluation"]
            places = plugin.settings.experiment_name is None
            logged_as["evaluation"] = {**reference, "places": places}
            logged_as["tags"] = {**logged_as.get("tags", {}), **self._tags, **tags}

    @property
    def _tags(self) -> dict[str, str]:
        found = {"qitos.benchmark": self.benchmark, "qitos.split": self.split}
        return {key: str(value) for key, value in found.items() if value}


@lru_cache(maxsize=8)
def _of_variable(text: str) -> evaluation:
    """The evaluation of another process. A plain text is the key of one that is not begun."""
    found = _in_json(text)
    key = str(found.get("id") or "").strip() or text
    name = str(found.get("name") or "").strip() or key
    made = evaluation(name, benchmark=found.get("benchmark"), split=found.get("split"), key=key)
    made.place = {name: found[name] for name in REFERENCE & found.keys()}
    made.owner, made.open = False, True
    return made


def _tell_processes() -> None:
    """Have processes that are started from now on know the innermost evaluation."""
    texts = [one._text for one in _open if one._text]
    text = texts[-1] if texts else _outside
    if text:
        os.environ[EVALUATION_VARIABLE] = text
    else:
        os.environ.pop(EVALUATION_VARIABLE, None)


def _id(text: str) -> str:
    """`text` as an evaluation's id: MLflow's filters cannot hold both kinds of quotes."""
    return text.replace('"', "'")


def _in_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
