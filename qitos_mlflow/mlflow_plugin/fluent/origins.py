"""Where a thread, a task of a pool and a process come from, in MLflow's terms: which run is open.

MLflow keeps its stack of active runs per thread, and empties it in a forked child. So a thread
remembers where it comes from, and a process which run was open where it was started. For that,
`watch` wraps what starts threads, tasks of thread pools and multiprocessing's processes. That is
done by `import qitos`, because a thread in which an agent runs starts before the agent does; so
this imports as little as `_startup`.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from typing import Any

from qitos_mlflow._after_import import after_import, imported
from qitos_mlflow.mlflow_plugin.fluent.carried import (
    WRAPPED,
    into_pools,
    into_thread,
    threads_around,
)

TRIAL = "_qitos_mlflow_trial"
"""Attribute of a thread: the trial of an evaluation in which it was started."""

INHERITED = "qitos_mlflow_run"
"""Key in the configuration that multiprocessing hands from a process to those it starts."""

forked_ns = 0
"""When this process was forked: MLflow's spans that are older are its parent's."""

_inherited: str | None = None
"""The run that was open where this process was forked."""

_of_parent: list[Any] = []
"""The stacks of runs of the process that forked this one. MLflow empties each at its next use."""

_forking = threading.local()
"""Its `run` is what `_inherited` is to be in a process that this thread is about to fork."""


FLUENT = "mlflow.tracking.fluent"

_fluent: Any = None
"""That module, once it is completely imported."""


def mlflow_in_use() -> Any:
    """MLflow's fluent module if mlflow is imported, and completely so; else None.

    Another thread may be importing it.
    """
    global _fluent
    if _fluent is None or sys.modules.get(FLUENT) is not _fluent:  # Asked ten times a trace.
        _fluent = imported("mlflow") and imported(FLUENT)
    return _fluent


def trial() -> Any:
    """What counts the spans of the trial that this thread is in; None outside of a trial."""
    if mlflow_in_use() is None:
        return None
    tracer = getattr(sys.modules.get("opentelemetry.trace"), "NoOpTracer", None)
    # MLflow counts the spans of that call by a function in this one's place.
    counting = getattr(tracer, "start_span", None)
    if "NoOpTracerPatcher" not in getattr(counting, "__qualname__", ""):
        return None
    if vars(threading.current_thread()).get(TRIAL) is counting:
        return counting
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != counting.__module__:
        frame = frame.f_back
    return None if frame is None else counting


def open_run() -> Any:
    """The info of the user's run that this thread works in; None if there is none.

    That is a run that is open on this thread, or where the thread comes from. Else, unless this is
    the main thread, it is the only one that is open on any thread. Runs of traces never count.
    """
    fluent = mlflow_in_use()
    if fluent is None:
        return None
    stacks = fluent._active_run_stack.get_all_thread_values()
    if not any(stacks.values()):
        return None
    for thread in threads_around():
        if (run := _top(stacks.get(thread.ident))) is not None:
            return run
    if threading.current_thread() is threading.main_thread():
        return None  # What another thread does is not around it.
    tops = (_top(stacks.get(thread.ident)) for thread in threading.enumerate())
    runs = {run.run_id: run for run in tops if run is not None}
    return next(iter(runs.values())) if len(runs) == 1 else None


def _top(stack: Any) -> Any:
    """The info of the innermost run of the user on a stack of MLflow's."""
    if stack and not any(stack is one for one in _of_parent):
        from qitos_mlflow.mlflow_plugin.fluent.pending_run import is_ours

        for run in reversed(stack):
            if not is_ours(run):
                return run.info
    return None


def inherited_run_id() -> str | None:
    """The run that was open where this process was started."""
    processes: Any = sys.modules.get("multiprocessing.process")
    started = getattr(processes and processes.current_process(), "_config", {}).get(INHERITED)
    return _inherited or started


def _run_id_for_child() -> str | None:
    run = open_run()
    return inherited_run_id() if run is None else str(run.run_id)


@functools.cache
def watch() -> None:
    """Have threads, tasks and processes know where they come from. Once; any thread."""
    _wrap_start(threading.Thread, _into_thread)
    after_import("concurrent.futures.thread", into_pools)
    after_import("multiprocessing.process", _wrap_processes)


def _wrap_processes(module: Any) -> None:
    _wrap_start(module.BaseProcess, _into_process)


def _wrap_start(owner: Any, note: Any) -> None:
    start = owner.start
    if hasattr(start, WRAPPED):
        return

    @functools.wraps(start)
    def noting_start(self: Any) -> Any:
        _shielded(note, self)
        return start(self)

    setattr(noting_start, WRAPPED, True)
    owner.start = noting_start


def _into_thread(thread: Any) -> None:
    if (counting := trial()) is not None:
        vars(thread)[TRIAL] = counting
    into_thread(thread)


def _into_process(process: Any) -> None:
    if (run_id := _run_id_for_child()) is not None:
        process._config[INHERITED] = run_id


def _shielded(act: Any, *args: Any) -> Any:
    """What `act` returns; None if it raises, which is reported."""
    try:
        return act(*args)
    except BaseException as error:  # noqa: BLE001 - the program starts a thread, or forks
        from qitos_mlflow import _guard

        _guard.contain("origins", error)


def _before_fork() -> None:
    _forking.run = None
    _forking.run = _shielded(_run_id_for_child)


def _forked() -> None:
    global _inherited, _of_parent, forked_ns
    forked_ns, _inherited = time.time_ns(), getattr(_forking, "run", None)
    _of_parent = _shielded(_stacks) or _of_parent


def _stacks() -> list[Any]:
    fluent = mlflow_in_use()
    return [] if fluent is None else [*fluent._active_run_stack.get_all_thread_values().values()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_forked)
