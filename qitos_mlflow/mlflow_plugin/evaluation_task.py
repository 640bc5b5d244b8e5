"""One task of an evaluation: which runs are attempts at it, and how it was judged."""

from __future__ import annotations

import math
import time
import uuid
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.mlflow_plugin.destination import run_settings
from qitos_mlflow.mlflow_plugin.feedback import say_of
from qitos_mlflow.mlflow_plugin.fluent.carried import here
from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import (
    ATTEMPT_TAG,
    CATEGORY_TAG,
    PREDICTION_TAG,
    SKIPPED_TAG,
    STOP_TAG,
    SUMS,
    TASK_TAG,
    TRIAL_TAG,
    VERDICT,
)
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.recording.simpler import SlowTexts, text_of

PREDICTION_CHARS = 500
"""Longest answer in the table of results (characters)."""


class Task:
    """One task of an evaluation. The agents that run inside are together one attempt at it.

    Attributes:
        open: agents that start now are part of it.
    """

    def __init__(self, of: Any, task_id: str, trial: int, category: str | None) -> None:
        self._of = of
        self._task_id = task_id
        self._tags = {TASK_TAG: task_id, TRIAL_TAG: str(trial), ATTEMPT_TAG: uuid.uuid4().hex}
        if category is not None:
            self._tags[CATEGORY_TAG] = category
        self._traces: dict[Any, tuple[Any, RunSettings]] = {}
        self._verdict: dict[str, Any] = {}
        self._sums: dict[str, float] = {}
        self._stop_reason: str | None = None
        self._skipped: str | None = None
        self._prediction = ""
        self._before: Any = None
        self._start_ns = 0
        self.open = False

    def result(
        self,
        success: bool | None = None,
        *,
        prediction: Any = None,
        stop_reason: object = None,
        steps: float | None = None,
        tokens: float | None = None,
        cost: float | None = None,
        seconds: float | None = None,
        **scores: float | None,
    ) -> None:
        """Record the benchmark's verdict; it counts more than what the agent says itself.

        Args:
            success: whether it was solved.
            prediction: the answer.
            stop_reason: why the agent stopped; this and the next four are only used if no agent
                was logged.
            steps: how many the agent made.
            tokens: how many the agent used.
            cost: of the agent's tokens (USD).
            seconds: how long the agent ran.
            **scores: other numbers, such as ``reward=0.5``.

        Raises:
            TypeError: one of them is no number; the text names it.
        """
        judged = _numbers({"success": success, **scores})
        if "success" in judged:
            judged["success"] = judged["success"] > 0
        self._verdict |= judged
        sums = {"steps": steps, "tokens": tokens, "cost": cost, "seconds": seconds}
        self._sums |= {SUMS[name]: value for name, value in _numbers(sums).items()}
        if stop_reason is not None:
            self._stop_reason = _text(getattr(stop_reason, "value", stop_reason))
        if prediction is not None:
            self._prediction = _text(prediction)[:PREDICTION_CHARS]

    def skip(self, reason: str = "skipped") -> None:
        """Say that the task is not done: it counts neither as solved nor as failed."""
        self._skipped = _text(reason)

    def __enter__(self) -> Task:
        self._before, self._start_ns, self.open = here.get(), time.time_ns(), True
        here.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.open = False
        here.set(self._before)
        with shield("evaluations.result"):
            self._record(error)

    def takes(self, *of_trace: Any) -> bool:
        """See `evaluation.takes`."""
        return bool(self._of.takes(*of_trace))

    def began(self, plugin: Any, trace: Any, logged_as: RunSettings) -> None:
        """See `evaluation.began`. The trace that begins last is the one that is judged."""
        self._of.began(plugin, trace, logged_as, self._tags)
        self._traces[plugin] = trace, logged_as

    def _record(self, error: BaseException | None) -> None:
        failed = isinstance(error, Exception)
        if failed and not self._verdict:
            self._verdict["success"] = False  # It failed beside the agent, or with it.
        mode = tracing.get_tracing_provider().mode
        for logger in self._of.ready():
            plugin = logger.plugin
            tags = {} if self._skipped is None else {SKIPPED_TAG: self._skipped}
            shown = mode == tracing.TracingMode.ENABLED and plugin.settings.capture_content
            if self._prediction and shown:
                tags[PREDICTION_TAG] = self._prediction
            trace, settings = self._traces.get(plugin, (None, None))
            if trace is not None:
                for name, value in self._verdict.items():
                    say_of(trace, f"{VERDICT}{name}", value, self._of.benchmark or self._of.name)
                if tags:
                    added = {"added": {"tags": tags}, "settings": settings}
                    logger.record(kind="evaluation_result", trace_id=trace.id, **added)
            elif error is None or failed:
                self._record_whole(logger, tags, "FAILED" if failed else "FINISHED")

    def _record_whole(self, logger: Any, tags: dict[str, str], status: str) -> None:
        """Record all that there is of a task without an agent: it gets a run of its own."""
        settings = run_settings(logger.plugin.settings)
        settings["log_traces"] = False
        self._of.began(logger.plugin, None, settings, self._tags)
        if self._stop_reason is not None:
            tags[STOP_TAG] = self._stop_reason
        verdict = {f"{VERDICT}{name}": float(value) for name, value in self._verdict.items()}
        logger.record(
            kind="evaluation_result",
            trace_id=f"task {self._tags[ATTEMPT_TAG]}",
            name=self._task_id,
            whole=True,
            start_ns=self._start_ns,
            status=status,
            added={"metrics": {**verdict, **self._sums}, "tags": tags},
            settings=settings,
        )


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise TypeError(f"{name}={value!r:.100} cannot be used: give a number")
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else text_of(value, SlowTexts())
