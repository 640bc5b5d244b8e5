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
from typing import Any

from qitos_mlflow._after_import import after_import, imported
from qitos_mlflow._guard import shield, warn
from qitos_mlflow.mlflow_plugin.fluent.origins import mlflow_in_use
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun, is_ours, run_class
from qitos_mlflow.mlflow_plugin.server.tracking_uri import absolute, is_http
from qitos_mlflow.redaction.redact import without_credentials
from qitos_mlflow.settings import TRACKING_VARIABLE


def same_place(uri: str | None) -> bool:
    """Whether MLflow's calls without an explicit URI go, or would go, where this trace goes."""
    module: Any = imported("mlflow")
    if module is None:  # The variable is all there is; `mlflow.set_tracking_uri` sets it, too.
        known = os.environ.get(TRACKING_VARIABLE)
    elif (uri is None or is_http(uri)) and not module.is_tracking_uri_set():
        known = None  # MLflow's default is a local store, which it searches the disk for.
    else:
        known = module.get_tracking_uri()
    if uri is None or not known:
        return uri is None and not known
    return bool(known == uri or absolute(str(known)).rstrip("/") == uri.rstrip("/"))


def let_go() -> None:
    """Take runs off this thread's stack that cannot be ended now. Never raises.

    When the process ends, MLflow ends the runs on it. It would wait four minutes for a server that
    is gone.
    """
    with shield("active_run.let_go"):
        if (fluent := mlflow_in_use()) is not None:
            stack = fluent._active_run_stack.get()
            stack[:] = [
                run
                for run in stack
                if not is_ours(run) or (run.pending.ref and not run.pending.out_of_reach())
            ]


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
        self._soon = not is_http(uri)  # Of a local store it is known that the run will come.
        self._thread = threading.current_thread()
        self._pid = os.getpid()
        self._stack: list[Any] | None = None  # Once it is settled whether the run can be active.
        self._pushed: Any = None
        if mlflow_in_use() is None:
            _waiting[self] = None
            # By the time any thread imports mlflow, this run is to become active.
            after_import("mlflow.tracking.fluent", _on_import)

    def follow(self) -> None:
        """Push the run if this is its thread, mlflow is in use, and the run can be active now.

        If several traces take turns on a thread (tasks), it comes to the top of the stack. Waits
        for nothing.
        """
        if self._stack is not None:
            if self._stack and self._stack[-1] is not self._pushed:
                self._come_up(self._stack)
        elif self._can_be_active() and (fluent := mlflow_in_use()) is not None:
            with shield("active_run.follow"):
                stack = fluent._active_run_stack.get()
                if self._stack is None:  # `get` itself may have pushed it: `_first_stack`.
                    self._push(fluent, stack)

    def leave(self, *, open: bool) -> None:
        """Take the run off the stack, or with `open` leave it there: the caller continues in it.

        Any thread. With `open`, a run that is not pushed yet is pushed on the trace's thread only.
        """
        with shield("active_run.leave"):
            if open:
                self._pending.left_open = True
                self.follow()
            else:
                stack, self._stack = self._stack or [], []
                # By identity: the caller may have ended it, or pushed others above.
                stack[:] = [run for run in stack if run is not self._pushed]

    def _can_be_active(self) -> bool:
        """Whether this is the run's thread, and the run is there or is worth waiting for."""
        run = self._pending
        if run.ref is None and (not (self._soon or run.left_open) or run.out_of_reach()):
            return False
        return self._is_here()

    def _come_up(self, stack: list[Any]) -> None:
        """Move above the runs of other open traces. The caller's own runs stay above it."""
        if is_ours(stack[-1]) and not stack[-1].pending.left_open and self._is_here():
            below = [run for run in stack if run is not self._pushed]
            if len(below) < len(stack):  # The caller has not ended it.
                stack[:] = [*below, self._pushed]

    def _is_here(self) -> bool:
        return threading.current_thread() is self._thread and os.getpid() == self._pid

    def _push(self, fluent: Any, stack: list[Any]) -> None:
        self._stack = []
        module: Any = sys.modules["mlflow"]
        if self._adopt_uri and self._uri is not None and not module.is_tracking_uri_set():
            module.set_tracking_uri(self._uri)
        if same_place(self._uri):
            self._stack, self._pushed = stack, run_class(fluent)(self._pending)
            stack.append(self._pushed)
            self._on_push()
        elif self._adopt_uri:
            ours = "MLflow's local store" if self._uri is None else without_credentials(self._uri)
            theirs = without_credentials(str(module.get_tracking_uri()))
            warn(
                f"active_run.elsewhere {ours} {theirs}",
                "the run stays open at %s, but MLflow's own calls go to %s. To continue in that "
                "run, give mlflow.set_tracking_uri or MLFLOW_TRACKING_URI the first address before "
                "the agent runs",
                ours,
                theirs,
            )


_waiting: weakref.WeakKeyDictionary[ActiveRun, None] = weakref.WeakKeyDictionary()
"""Runs of traces that began before mlflow was imported, in that order."""


def _on_import(fluent: Any) -> None:
    # A stack belongs to its thread, and this may be another one (ours, for a local store). So the
    # run is put on the stack when its thread uses MLflow for the first time.
    variable = getattr(fluent, "_active_run_stack", None)
    if variable is not None:
        variable.default_factory = _first_stack


def _first_stack() -> list[Any]:
    stack: list[Any] = []
    with shield("active_run.import"):
        for run in list(_waiting):
            if run._stack is None and run._can_be_active():
                run._push(sys.modules["mlflow.tracking.fluent"], stack)
    return stack
