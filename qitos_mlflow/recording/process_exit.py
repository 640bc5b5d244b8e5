"""The end of the process: all plugins deliver what they can, within one deadline together.

Then one line says what is left, and the command that delivers it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from qitos_mlflow._guard import report
from qitos_mlflow.delivery import waiting_records
from qitos_mlflow.mlflow_plugin.fluent.active_run import let_go

if TYPE_CHECKING:
    from qitos_mlflow.recording.pipelines import Pipelines

COUNT_S = 0.25
"""Longest time that the end of the process is held up by counting what is left (seconds)."""

MAX_FILES = 8
"""More files than this are told by their directories."""


class _Process:
    """What this process has to end."""

    def __init__(self) -> None:
        # Weakly: what nobody holds, not even a thread, has delivered everything, or is kept.
        self._used: weakref.WeakSet[Pipelines] = weakref.WeakSet()
        self._kept: set[Pipelines] = set()
        self._told: weakref.WeakSet[Pipelines] = weakref.WeakSet()
        self._lock = threading.RLock()  # Reentrant: a signal handler may begin a trace.
        self._watching = False
        self._before_mlflow = False
        self._began: float | None = None

    def watch(self, pipelines: Pipelines) -> None:
        with self._lock:
            self._used.add(pipelines)
            if not self._watching:
                self._watching = True
                _register()

    def keep(self, pipelines: Pipelines) -> None:
        with self._lock:
            self._kept.add(pipelines)

    def end_before_mlflow(self) -> None:
        if not self._before_mlflow:
            self._before_mlflow = True
            atexit.unregister(_end)
            atexit.register(_end)

    def end(self) -> None:
        with self._lock:
            used = {*self._used, *self._kept} - {*self._told}
            self._told.update(used)
        ending = sorted(used, key=lambda one: one.settings.exit_timeout_s)
        if not ending:
            return
        if self._began is None:  # Not the last exit handler to come here: one deadline for all.
            self._began = time.monotonic()
        for pipelines in ending:
            _guarded(pipelines.begin_end)
        left = []
        for pipelines in ending:
            deadline = self._began + pipelines.settings.exit_timeout_s
            if not _guarded(pipelines.close, deadline - time.monotonic()):
                left.append(pipelines)
        _guarded(_say_what_is_left, left)  # Which fails where stderr is a closed pipe.
        let_go()


_process = _Process()


def watch(pipelines: Pipelines) -> None:
    """Have `pipelines` ended before this process ends. Any thread, any number of times."""
    _process.watch(pipelines)


def keep(pipelines: Pipelines) -> None:
    """When this process ends, tell that `pipelines` left something in the spool."""
    _process.keep(pipelines)


def end_before_mlflow() -> None:
    """From now on deliver before MLflow's own exit handler, which ends its active run.

    Exit handlers come last in, first out, and MLflow may have been imported since ours was
    registered.
    """
    _process.end_before_mlflow()


def _register() -> None:
    atexit.unregister(_end)  # Inherited by a forked child: once is enough.
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        # Children that multiprocessing has forked leave by `os._exit`, past `atexit`, but run its
        # own finalizers. Those that it has spawned come here both ways.
        Finalize(None, _end, exitpriority=100)
    atexit.register(_end)


def _end() -> None:
    _guarded(_process.end)
    _keep_exit_status()


def _end_late() -> None:
    _end()


# For a first trace in somebody's exit handler, when it is too late to register another.
atexit.register(_end_late)


def _begin() -> None:
    global _process
    _process = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)


def _guarded(act: Callable[..., object], *args: object) -> bool:
    try:
        return bool(act(*args))
    except Exception as error:  # noqa: BLE001 - the process ends as it would have
        report("plugin.at_exit", error)
        return False


def _say_what_is_left(left: Iterable[Pipelines]) -> None:
    """On stderr: what is lost; how much was not delivered, and the command that delivers it."""
    until = time.monotonic() + COUNT_S
    records, traces, complete = 0, set(), True
    files: list[Path] = []
    directories: set[Path] = set()
    pipelines = [pipeline for one in left for pipeline in one.all()]
    # Each once: one pipeline may have left its own to another.
    for paths in dict.fromkeys(paths for pipeline in pipelines for paths in pipeline.segments):
        directories.add(paths.directory)
        complete = complete and time.monotonic() < until
        if not complete:
            continue
        before = records
        for record in waiting_records(paths):
            records += 1
            traces.add(orjson.loads(record).get("trace_id"))
            complete = time.monotonic() < until
            if not complete:
                break
        if records > before:  # One file stands for all of its segment.
            files += [path for _, path in paths.parts()[:1]]
    if unsaved := sum(pipeline.unsaved for pipeline in pipelines):
        spools = ", ".join(sorted({str(one.settings.spool_dir) for one in left}))
        _say(
            f"{_count(unsaved, 'record')} lost: neither the server nor the spool {spools} has "
            f"taken them in time"
        )
    if files or not complete:  # Neither: a sidecar has delivered them meanwhile.
        where = files if complete and len(files) <= MAX_FILES else sorted(directories)
        _say(
            f"{'' if complete else 'more than '}{_count(records, 'record')} of "
            f"{_count(len(traces), 'trace')} {'is' if records == 1 else 'are'} kept but not "
            "delivered yet; deliver with: "
            f"qitos-mlflow sync {' '.join(shlex.quote(str(path)) for path in where)}"
        )


def _keep_exit_status() -> None:
    """Have a script that Ctrl-C ended tell its parent so, as it would have without us.

    Python forgets it when a text is compiled meanwhile, as it is for every dataclass of a module
    that is imported in the last moments (3.10 to 3.13: `unhandled_keyboard_interrupt`).
    """
    interactive = sys.flags.interactive or hasattr(sys, "ps1")
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not interactive:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102 - the one way to have it remember


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _say(line: str) -> None:
    # The last lines of the process: loggers may be gone.
    print(f"qitos-mlflow: {line}", file=sys.stderr)  # noqa: T201
