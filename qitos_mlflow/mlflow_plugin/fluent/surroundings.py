"""What MLflow has around a trace that begins: the run it is part of, and MLflow's own experiment.

Looked up once for each trace, on the agent's thread, in this process only: nothing here connects to
a server or imports mlflow. The sink later asks the server what only that knows: whether a run
exists, in which experiment it is, and whether it was still open.

MLflow keeps its stack of active runs per thread, and empties it in a forked child. So a thread
remembers where it comes from, and a process which run was open where it was started. For that,
`watch` wraps what starts threads, tasks of thread pools and multiprocessing's processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from typing import Any, NamedTuple

from qitos_mlflow._after_import import after_import
from qitos_mlflow._guard import shield, warn
from qitos_mlflow.mlflow_plugin.fluent.active_run import mlflow_in_use, same_place
from qitos_mlflow.mlflow_plugin.fluent.carried import (
    WRAPPED,
    into_pools,
    into_thread,
    threads_around,
)
from qitos_mlflow.mlflow_plugin.fluent.pending_run import is_ours
from qitos_mlflow.mlflow_plugin.mapping.ids import otel_trace_id

RATIO_VARIABLE = "MLFLOW_TRACE_SAMPLING_RATIO"

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


class Surroundings(NamedTuple):
    """What is known of a trace's place in MLflow as it begins.

    All fields but `parent_run_id` are fields of `RunSettings`, too.

    Attributes:
        parent_run_id: the run that its own run is a child of.
        inherited_run_id: a run of another process, which is the parent if it is still open.
        experiment_of: the run whose experiment the server is asked for: the parent or the inherited
            run.
        experiment_id: MLflow's id of an experiment: that of a parent which is open here, or of the
            one that MLflow itself uses.
        experiment_name: the name of the one that MLflow itself uses.
    """

    parent_run_id: str | None = None
    inherited_run_id: str | None = None
    experiment_of: str | None = None
    experiment_id: str | None = None
    experiment_name: str | None = None


def surroundings(uri: str | None, parent_run_id: str | None = None) -> Surroundings:
    """What is around a trace that begins on this thread and goes to `uri`. Never raises.

    Args:
        uri: None is MLflow's default.
        parent_run_id: the parent that is configured; it comes before all others.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or None
    parent, inherited, experiment_id = parent_run_id, None, None
    with shield("surroundings"):
        if same_place(uri):  # Elsewhere, ids mean something else.
            run = None if parent else _open_run()
            if run is not None:
                return Surroundings(run.run_id, None, None, run.experiment_id, name)
            # `mlflow run` sets it for the process that it starts.
            parent = parent or os.environ.get("MLFLOW_RUN_ID") or None
            inherited = None if parent else _inherited_run_id()
            own = getattr(mlflow_in_use(), "_active_experiment_id", None)
            experiment_id = own or os.environ.get("MLFLOW_EXPERIMENT_ID") or None
    return Surroundings(parent, inherited, parent or inherited, experiment_id, name)


def is_sampled(qitos_trace_id: str) -> bool:
    """Whether the tree of this trace is logged, by ``MLFLOW_TRACE_SAMPLING_RATIO``.

    The answer is the same for all that log the trace: the last 56 bits of its id decide, which are
    random in a UUID, too (W3C Trace Context, level 2). Inside a span that MLflow's own sampler has
    left out, the tree is not logged.
    """
    if _is_left_out():
        return False
    text = os.environ.get(RATIO_VARIABLE)
    if not text:
        return True
    with contextlib.suppress(ValueError):
        ratio = float(text)
        if 0.0 <= ratio <= 1.0:
            return int.from_bytes(otel_trace_id(qitos_trace_id)[9:], "big") < ratio * 2**56
    warn(
        "surroundings.ratio",
        "%s=%r is not a number from 0 to 1, so all traces are logged",
        RATIO_VARIABLE,
        text,
    )
    return True


def _is_left_out() -> bool:
    with shield("surroundings.sampled"):
        provider: Any = sys.modules.get("mlflow.tracing.provider")
        # Without a context of MLflow's own it may be a span of the program's own tracer.
        if mlflow_in_use() and provider and provider.get_current_context() is not None:
            around = provider.get_current_otel_span().get_span_context()
            # One that MLflow has made while its tracing is off has none.
            return bool(around and around.is_valid and not around.trace_flags.sampled)
    return False


def is_trial() -> bool:
    """Whether `mlflow.genai.evaluate` is trying its `predict_fn` on this thread, without a trace.

    Threads that the trial starts count. MLflow counts the spans of the trial. If there are none, it
    puts one around each row. So a trial that begins with an agent is made to count none: otherwise
    each agent of a row would be a trace, and MLflow would delete all but the last.
    """
    counting = _trial()
    if counting is not None:
        with shield("surroundings.trial"):
            [counter] = (cell.cell_contents for cell in counting.__closure__)
            if counter.count == 0:
                counter.count = _Uncounted()
    return counting is not None


class _Uncounted(int):
    """Zero, whatever is added."""

    def __add__(self, other: int) -> _Uncounted:
        return self


def _trial() -> Any:
    """What counts the spans of the trial that this thread is in; None outside of a trial."""
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


def _open_run() -> Any:
    """The info of the user's run that this thread works in; None if there is none.

    That is a run that is open on this thread, or where the thread comes from. Else, unless this is
    the main thread, it is the only one that is open on any thread. Runs of traces never count.
    """
    fluent = mlflow_in_use()
    if fluent is None:
        return None
    stacks = fluent._active_run_stack.get_all_thread_values()
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
        for run in reversed(stack):
            if not is_ours(run):
                return run.info
    return None


def _inherited_run_id() -> str | None:
    """The run that was open where this process was started."""
    processes: Any = sys.modules.get("multiprocessing.process")
    started = getattr(processes and processes.current_process(), "_config", {}).get(INHERITED)
    return _inherited or started


def _run_id_for_child() -> str | None:
    run = _open_run()
    return _inherited_run_id() if run is None else str(run.run_id)


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
        with shield("surroundings.start"):
            note(self)
        return start(self)

    setattr(noting_start, WRAPPED, True)
    owner.start = noting_start


def _into_thread(thread: Any) -> None:
    if (counting := _trial()) is not None:
        vars(thread)[TRIAL] = counting
    into_thread(thread)


def _into_process(process: Any) -> None:
    if (run_id := _run_id_for_child()) is not None:
        process._config[INHERITED] = run_id


def _before_fork() -> None:
    _forking.run = None
    with shield("surroundings.fork"):
        _forking.run = _run_id_for_child()


def _forked() -> None:
    global _inherited, _of_parent, forked_ns
    forked_ns, _inherited = time.time_ns(), getattr(_forking, "run", None)
    with shield("surroundings.fork"):
        if (fluent := mlflow_in_use()) is not None:
            _of_parent = [*fluent._active_run_stack.get_all_thread_values().values()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_forked)
