"""The end of the process: all pipelines deliver what they can, within one deadline together.

Then one line on stderr says what is left, and the command that delivers it.
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
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import orjson

from qitos_mlflow._guard import report
from qitos_mlflow.delivery import Pipeline, waiting_records

KILLED_BY_EXIT = "the process ended before the trace did"
"""Why traces that are open when the process ends are KILLED."""

COUNT_S = 0.25
"""Longest time that counting what is left delays the end of the process (seconds)."""

MAX_FILES = 8
"""If more files than this are left, the command names their directories."""


class Ending(Protocol):
    """What the end of the process asks of a pipeline."""

    delivery: Pipeline
    exit_timeout_s: float
    """How long it may delay the end of the process (seconds)."""

    def refuse(self, why: str) -> None:
        """Record the end of open traces, then take no more. Waits for nothing."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Deliver what can be delivered in time; True if nothing is left."""
        ...


class _Process:
    """What this process has to end."""

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[Ending] = weakref.WeakSet()
        self._kept: set[Ending] = set()
        self._reported: weakref.WeakSet[Ending] = weakref.WeakSet()
        self._lock = threading.RLock()  # Reentrant: a signal handler may begin a trace.
        self._registered = False
        self._before_mlflow = False
        self._began_s: float | None = None

    def watch(self, pipeline: Ending) -> None:
        with self._lock:
            self._watched.add(pipeline)
            if not self._registered:
                self._registered = True
                _register()

    def keep(self, pipeline: Ending) -> None:
        with self._lock:
            self._kept.add(pipeline)

    def end_first(self) -> None:
        if not self._before_mlflow:
            self._before_mlflow = True
            atexit.unregister(_end)
            atexit.register(_end)

    def end(self) -> None:
        with self._lock:
            found = {*self._watched, *self._kept} - {*self._reported}
            self._reported.update(found)
        pipelines = sorted(found, key=lambda pipeline: pipeline.exit_timeout_s)
        if not pipelines:
            return
        if self._began_s is None:  # Not the last exit handler to come here: one deadline for all.
            self._began_s = time.monotonic()
        for pipeline in pipelines:
            _guarded(pipeline.refuse, KILLED_BY_EXIT)
        left = []
        for pipeline in pipelines:
            deadline = self._began_s + pipeline.exit_timeout_s
            if not _guarded(pipeline.close, deadline - time.monotonic()):
                left.append(pipeline.delivery)
        _guarded(_say_what_is_left, left)  # This fails if stderr is a closed pipe.
        for act in _at_last:
            _guarded(act)


_process = _Process()
_at_last: list[Callable[[], object]] = []


def watch(pipeline: Ending) -> None:
    """End `pipeline` before this process ends. Held weakly. Any thread, any number of times."""
    _process.watch(pipeline)


def keep(pipeline: Ending) -> None:
    """When this process ends, report what `pipeline`, which is closed, left in the spool."""
    _process.keep(pipeline)


def end_first() -> None:
    """From now on deliver before the exit handlers that are registered so far.

    Exit handlers run last in, first out. A library that was imported after ours was registered
    may end in its own handler what the delivery still needs.
    """
    _process.end_first()


def at_last(act: Callable[[], object]) -> None:
    """Call `act` once everything is delivered or reported, in each process. Register it once."""
    _at_last.append(act)


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


# For a first trace in an exit handler of the program, when it is too late to register another.
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
        report("process_exit", error)
        return False


def _say_what_is_left(left: Collection[Pipeline]) -> None:
    """On stderr: what is lost, how much is not delivered, and the command that delivers it."""
    until = time.monotonic() + COUNT_S
    records, traces, complete = 0, set(), True
    files: list[Path] = []
    directories: set[Path] = set()
    for paths in [pipeline.paths for pipeline in left]:
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
    if unsaved := sum(pipeline.unsaved for pipeline in left):
        spools = ", ".join(sorted({str(p.paths.directory) for p in left}))
        _say(
            f"{_count(unsaved, 'record')} lost: neither the server nor the spool {spools} took "
            f"them in time"
        )
    if files or not complete:  # Neither: another process has delivered them meanwhile.
        where = files if complete and len(files) <= MAX_FILES else sorted(directories)
        _say(
            f"{'' if complete else 'more than '}{_count(records, 'record')} of "
            f"{_count(len(traces), 'trace')} {'is' if records == 1 else 'are'} kept but not "
            "delivered yet; deliver with: "
            f"qitos-mlflow sync {' '.join(shlex.quote(str(path)) for path in where)}"
        )


def _keep_exit_status() -> None:
    """Let a script that Ctrl-C ended report this to its parent, as it does without us.

    Python forgets it if a text is compiled meanwhile, as it is for every dataclass of a module
    that is imported in the last moments (3.10 to 3.13: `unhandled_keyboard_interrupt`).
    """
    interactive = sys.flags.interactive or hasattr(sys, "ps1")
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not interactive:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102 - the one way to make Python remember


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _say(line: str) -> None:
    # The last lines of the process: loggers may be gone.
    print(f"qitos-mlflow: {line}", file=sys.stderr)  # noqa: T201
