"""A run that may not exist yet, and what MLflow's callers see of it meanwhile.

It may be on MLflow's stack before the server has created it. A call that asks for its id, such as
the caller's own `mlflow.log_metric`, waits until then.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from qitos_mlflow._guard import warn
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef

CREATION_WAIT_S = 10.0
"""Longest wait of a caller's own MLflow call for the run to be created (seconds; a new local store
takes three). After it the call continues as it does without this package."""

POLL_S = 0.05
"""How soon a wait notices that the server is out of reach (seconds)."""


def before_alarm_s() -> float:
    """How long a wait may last so that it ends before the process's alarm (seconds).

    Programs limit the time of a task with an alarm whose handler raises. This package lets such
    an exception through, but a wait may be in a hook that QitOS calls, and QitOS drops what its
    hooks raise: the task would continue.
    """
    if not hasattr(signal, "getitimer"):  # Windows.
        return math.inf
    left_s, every_s = signal.getitimer(signal.ITIMER_REAL)
    # One that comes again and again is a profiler's.
    return math.inf if every_s or not left_s else max(0.0, left_s - POLL_S)


class PendingRun:
    """The run of one trace: unknown until the server has created it. Any thread.

    Attributes:
        out_of_reach: whether the server is known not to answer.
        ref: the run, once it is created.
        left_open: its trace has ended, and the caller continues in it.
    """

    def __init__(self, out_of_reach: Callable[[], bool] = lambda: False) -> None:
        # Held until the run exists. An event takes ten times as long to make.
        self._creating = threading.Lock()
        self._creating.acquire()
        self.out_of_reach = out_of_reach
        self.ref: RunRef | None = None
        self.left_open = False

    def created(self, ref: RunRef) -> None:
        """Say that the run exists. The sending thread."""
        known, self.ref = self.ref, ref
        if known is None:
            self._creating.release()

    def wait(self, timeout_s: float) -> RunRef | None:
        """The run; None if it is not created in `timeout_s` or the server is out of reach."""
        deadline = time.monotonic() + timeout_s
        while not self.out_of_reach() and self.ref is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            if self._creating.acquire(timeout=min(left_s, POLL_S)):
                self._creating.release()  # Another thread may wait, too.
        return self.ref


def is_ours(run: Any) -> bool:
    """Whether a run on MLflow's stack is one of a QitOS trace's."""
    return isinstance(getattr(run, "pending", None), PendingRun)


@lru_cache(maxsize=1)
def run_class(fluent: Any) -> Any:
    """A kind of MLflow's own ActiveRun, whose `info` waits; `fluent` is MLflow's module."""
    entities: Any = sys.modules["mlflow.entities"]
    unknown = entities.RunInfo("", "", "", "RUNNING", 0, None, "active")

    class QitosActiveRun(fluent.ActiveRun):  # type: ignore[misc]
        """What `mlflow.active_run()` returns during a trace."""

        _info: Any

        def __init__(self, pending: PendingRun) -> None:
            self.pending = pending
            # Reentrant: a signal handler may log too, while this thread waits.
            self._lock = threading.RLock()
            super().__init__(entities.Run(unknown, entities.RunData()))

        @property
        def info(self) -> Any:
            """The run's info; waits for the run to be created, at most `CREATION_WAIT_S`."""
            with self._lock:
                if self._info is unknown:
                    info = self._find()
                    if self._info is unknown:  # Else a signal handler has asked meanwhile.
                        self._info = info
                return self._info

        def _find(self) -> Any:
            ref = self.pending.wait(CREATION_WAIT_S)
            if ref is None:
                # What MLflow does if no run is active.
                warn(
                    "pending_run.late",
                    "the run of a QitOS trace was not created in %s s. MLflow calls inside the "
                    "trace go to a run of their own",
                    CREATION_WAIT_S,
                )
                return fluent.MlflowClient().create_run(fluent._get_experiment_id()).info
            return entities.RunInfo(
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

    return QitosActiveRun
