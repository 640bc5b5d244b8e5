"""Makes a trace's run MLflow's *active run* on the thread that runs the trace.

MLflow keeps a stack of active runs per thread. Its public way to push one costs three requests on
the agent's thread, so the run is put on the stack directly
(`mlflow.tracking.fluent._active_run_stack`, the same in every supported version; tested on the
oldest and the newest). If that fails, the trace is recorded all the same. mlflow is never imported
here: as long as the process has not imported it, nothing can rely on an active run.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

from qitos_mlflow._after_import import after_import, imported
from qitos_mlflow._guard import report, warn
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun, is_ours, run_class
from qitos_mlflow.mlflow_plugin.server.tracking_uri import absolute, is_http, working_directory
from qitos_mlflow.redaction.redact import without_credentials


def mlflow_in_use() -> bool:
    """True when mlflow is imported, and completely so (another thread may be importing it)."""
    return _fluent() is not None


def _fluent() -> Any:
    return imported("mlflow") and imported("mlflow.tracking.fluent")


def same_place(uri: str | None) -> bool:
    """Whether calls without an explicit URI go where this trace goes."""
    module: Any = sys.modules["mlflow"]
    if uri is None:
        return not module.is_tracking_uri_set()
    here = absolute(str(module.get_tracking_uri()), working_directory())
    return here.rstrip("/") == uri.rstrip("/")


def parent_run_id(uri: str | None) -> str | None:
    """Id of the caller's own active run on this thread, None if there is none.

    The runs of other traces are siblings, not the caller's own: those of other tasks of this
    thread that are open, and those left open (`auto_end_run=False`).
    """
    try:
        fluent = _fluent()
        if fluent is None or not same_place(uri):
            return None
        for run in reversed(fluent._active_run_stack.get()):
            if not is_ours(run):
                return str(run.info.run_id)
    except Exception as error:  # noqa: BLE001
        report("active_run.parent_run_id", error)
    return None


def let_go() -> None:
    """Take runs off this thread's stack that cannot be ended now. Never raises.

    When the process ends, MLflow ends the runs on it. It would wait four minutes for a server that
    is gone.
    """
    try:
        fluent = _fluent()
        if fluent is not None:
            stack = fluent._active_run_stack.get()
            stack[:] = [run for run in stack if not (is_ours(run) and run.pending.lost())]
    except Exception as error:  # noqa: BLE001
        report("active_run.let_go", error)


class ActiveRun:
    """The run of one trace on MLflow's stack of the thread that made this. No method raises.

    Args:
        run: the run, perhaps not created yet.
        uri: where the trace goes; None for MLflow's default.
        adopt_uri: set MLflow's tracking URI to `uri` if none is set. The one documented change
            of MLflow's global state: with ``auto_end_run=False`` the calls that continue the
            run must find it. If another URI is set, they do not find it, and a warning says so.
        on_push: called when the run is put on the stack.
    """

    def __init__(
        self,
        run: PendingRun,
        uri: str | None,
        *,
        adopt_uri: bool = False,
        on_push: Callable[[], None] = lambda: None,
    ) -> None:
        self._pending = run
        self._uri = uri
        self._adopt_uri = adopt_uri
        self._on_push = on_push
        # Of a local store it is known that the run will come, and soon.
        self._patient = not is_http(uri)
        self._open = False
        self._thread = threading.current_thread()
        self._pid = os.getpid()
        self._number = next(_numbers)
        self._settled = False
        self._stack: list[Any] = []
        self._pushed: Any = None
        if not mlflow_in_use():
            _waiting.add(self)
            # By the time mlflow is imported, by whichever thread, this run is to become active.
            after_import("mlflow.tracking.fluent", _on_import)

    def follow(self) -> None:
        """Push the run if this is its thread, mlflow is in use, and the run can be active now.

        If several traces take turns on a thread (tasks), it comes to the top of the stack. Waits
        for nothing.
        """
        if self._settled:
            if self._stack and self._stack[-1] is not self._pushed:
                self._come_up()
            return
        if not self._wanted() or not self._is_here():
            return
        try:
            fluent = _fluent()
            if fluent is not None:
                stack = fluent._active_run_stack.get()
                if not self._settled:  # `get` itself may have pushed it: `_first_stack`.
                    self._push(fluent, stack)
        except Exception as error:  # noqa: BLE001
            report("active_run.follow", error)

    def leave(self, *, open: bool) -> None:
        """Take the run off the stack, or with `open` leave it there: the caller continues in it.

        Any thread. With `open`, a run that is not pushed yet is pushed on the trace's thread only.
        """
        try:
            self._open = open
            self.follow()
            if open:
                if self._pushed is not None:
                    self._pushed.left_open = True
                return
            self._settled = True
            # By identity: the caller may have ended it, or pushed others above.
            self._stack[:] = [run for run in self._stack if run is not self._pushed]
        except Exception as error:  # noqa: BLE001
            report("active_run.leave", error)

    def _wanted(self) -> bool:
        if self._pending.ref is not None:
            return True
        return (self._patient or self._open) and not self._pending.out_of_reach()

    def _come_up(self) -> None:
        """Move above the runs of other open traces. The caller's own runs stay above it."""
        stack, top = self._stack, self._stack[-1]
        if is_ours(top) and not top.left_open and self._is_here():
            below = [run for run in stack if run is not self._pushed]
            if len(below) < len(stack):  # The caller has not ended it.
                stack[:] = [*below, self._pushed]

    def _is_here(self) -> bool:
        return threading.current_thread() is self._thread and os.getpid() == self._pid

    def _push(self, fluent: Any, stack: list[Any]) -> None:
        self._settled = True
        module: Any = sys.modules["mlflow"]
        if self._adopt_uri and self._uri is not None and not module.is_tracking_uri_set():
            module.set_tracking_uri(self._uri)
        if not same_place(self._uri):
            if self._adopt_uri:
                self._say_elsewhere(str(module.get_tracking_uri()))
            return
        self._pushed = run_class(fluent)(self._pending)
        self._pushed.left_open = self._open
        self._stack = stack
        stack.append(self._pushed)
        self._on_push()

    def _say_elsewhere(self, mlflows: str) -> None:
        ours = "MLflow's local store" if self._uri is None else without_credentials(self._uri)
        theirs = without_credentials(mlflows)
        warn(
            f"active_run.elsewhere {ours} {theirs}",
            "the run stays open at %s, but MLflow's own calls go to %s. To continue in that run, "
            "give mlflow.set_tracking_uri or MLFLOW_TRACKING_URI the first address before the "
            "agent runs",
            ours,
            theirs,
        )


_numbers = count()
_waiting: weakref.WeakSet[ActiveRun] = weakref.WeakSet()
"""Runs of traces that began before mlflow was imported."""


def _on_import(fluent: Any) -> None:
    # A stack belongs to its thread, and this may be another one (ours, for a local store). So the
    # run is put on the stack when its thread uses MLflow for the first time.
    variable = getattr(fluent, "_active_run_stack", None)
    if variable is not None:
        variable.default_factory = _first_stack


def _first_stack() -> list[Any]:
    stack: list[Any] = []
    try:
        fluent = sys.modules["mlflow.tracking.fluent"]
        for run in sorted(_waiting, key=lambda run: run._number):
            if not run._settled and run._is_here() and run._wanted():
                run._push(fluent, stack)
    except Exception as error:  # noqa: BLE001
        report("active_run.import", error)
    return stack
