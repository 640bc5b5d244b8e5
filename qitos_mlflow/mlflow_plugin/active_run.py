"""Makes a trace's run MLflow's *active run* on the thread that runs the trace.

A small, isolated step (CONTRACT: lifecycle) that may fail without consequence. MLflow keeps a
stack of active runs per thread; its public way to push one costs three requests and the agent's
time, so the run is put on the stack directly (`mlflow.tracking.fluent._active_run_stack`, the
same in every supported version; tested on the oldest and the newest). mlflow is never imported
here: where the process has not imported it, nobody can be relying on an active run.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Any

import wrapt

from qitos_mlflow._guard import report
from qitos_mlflow.mlflow_plugin.transport import RunRef


class PendingRun:
    """The run of one trace: unknown until the server has created it. Any thread."""

    def __init__(self) -> None:
        self._created = threading.Event()
        self.ref: RunRef | None = None

    def created(self, ref: RunRef) -> None:
        """Say that the run exists."""
        self.ref = ref
        self._created.set()

    def wait(self, timeout_s: float) -> RunRef | None:
        """The run, waiting for it at most `timeout_s`; None when it was not created in time."""
        self._created.wait(timeout_s)
        return self.ref


def mlflow_in_use() -> bool:
    """True when mlflow is imported, and completely so (another thread may be importing it)."""
    return _fluent() is not None


def _fluent() -> Any:
    module = sys.modules.get("mlflow")
    spec = getattr(module, "__spec__", None)
    if spec is None or (getattr(spec, "_initializing", False) and not _import_done):
        return None
    return sys.modules.get("mlflow.tracking.fluent")


_import_done = False
_hooked = False
_waiting: weakref.WeakSet[ActiveRun] = weakref.WeakSet()


def _watch_import() -> None:
    """Push waiting runs the moment a tool imports mlflow, before its first `log_metric`."""
    global _hooked
    if not _hooked:
        _hooked = True
        wrapt.register_post_import_hook(_on_import, "mlflow")


def _on_import(_module: Any) -> None:
    global _import_done
    _import_done = True  # Its body has run; the import system only has to unmark it.
    for run in list(_waiting):
        run.follow()


def _same_place(uri: str | None) -> bool:
    """Whether calls without an explicit URI go where this trace goes."""
    module: Any = sys.modules["mlflow"]
    if uri is None:
        return not module.is_tracking_uri_set()
    return bool(str(module.get_tracking_uri()).rstrip("/") == uri.rstrip("/"))


def parent_run_id(uri: str | None) -> str | None:
    """Id of the caller's own active run on this thread, None when there is none.

    A run that an ended trace left open (`auto_end_run=False`) is a sibling, not a parent.
    """
    try:
        fluent = _fluent()
        if fluent is None or not _same_place(uri):
            return None
        for run in reversed(fluent._active_run_stack.get()):
            if not getattr(run, "qitos_left_open", False):
                return str(run.info.run_id)
    except Exception as error:  # noqa: BLE001
        report("active_run.parent_run_id", error)
    return None


class ActiveRun:
    """The run of one trace on MLflow's stack of its thread; every method is total.

    Args:
        run: the run, perhaps not created yet.
        uri: where the trace goes; None for MLflow's default.
        adopt_uri: set MLflow's tracking URI to `uri` if none is set. The one documented change
            of MLflow's global state: with ``auto_end_run=False`` the calls that continue the
            run must find it.
    """

    def __init__(self, run: PendingRun, uri: str | None, *, adopt_uri: bool = False) -> None:
        self._pending = run
        self._uri = uri
        self._adopt_uri = adopt_uri and uri is not None
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._settled = False
        self._pushed: Any = None
        if not mlflow_in_use():
            _waiting.add(self)
            _watch_import()

    def follow(self) -> None:
        """Push the run once it exists, if this is its thread and mlflow is in use. No waiting."""
        if self._settled or self._pending.ref is None or not self._is_here():
            return
        try:
            fluent = _fluent()
            if fluent is None:
                return
            self._settled = True
            self._push(fluent, self._pending.ref)
        except Exception as error:  # noqa: BLE001
            report("active_run.follow", error)

    def leave(self, *, open: bool) -> None:
        """Take the run off the stack, or with `open` leave it there for the caller to go on in."""
        if not self._is_here():
            return
        try:
            self.follow()
            self._settled = True
            if self._pushed is None:
                return
            if open:
                self._pushed.qitos_left_open = True
                return
            stack = _fluent()._active_run_stack.get()
            # By identity: the caller may have ended it, or pushed others above.
            stack[:] = [run for run in stack if run is not self._pushed]
        except Exception as error:  # noqa: BLE001
            report("active_run.leave", error)

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread and os.getpid() == self._pid

    def _push(self, fluent: Any, ref: RunRef) -> None:
        module: Any = sys.modules["mlflow"]
        if self._adopt_uri and not module.is_tracking_uri_set():
            module.set_tracking_uri(self._uri)
        if not _same_place(self._uri):
            return
        entities: Any = sys.modules["mlflow.entities"]
        info = entities.RunInfo(
            run_id=ref.run_id,
            experiment_id=ref.experiment_id,
            user_id="",
            status="RUNNING",
            start_time=ref.start_ms,
            end_time=None,
            lifecycle_stage="active",
            artifact_uri=ref.artifact_uri,
            run_name=ref.run_name,
        )
        self._pushed = fluent.ActiveRun(entities.Run(info, entities.RunData()))
        fluent._active_run_stack.get().append(self._pushed)
