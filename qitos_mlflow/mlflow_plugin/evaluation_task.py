"""One task of an evaluation, and what is going on at this place in the program."""

from __future__ import annotations

import time
import uuid
from contextvars import ContextVar
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.mlflow_plugin.destination import run_settings
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

PREDICTION_CHARS = 500
"""Longest answer in the table of results (characters)."""

here: ContextVar[Any] = ContextVar("qitos_mlflow_evaluation", default=None)
"""The innermost task or evaluation."""


class Task:
    """One task of an evaluation. Agents that run inside are one attempt at it."""

    def __init__(self, of: Any, task_id: str, trial: int, category: str | None) -> None:
        self._of = of
        self._task_id = task_id
        self._tags = {TASK_TAG: task_id, TRIAL_TAG: str(trial), ATTEMPT_TAG: uuid.uuid4().hex}
        if category is not None:
            self._tags[CATEGORY_TAG] = category
        self._traces: dict[Any, tuple[Any, RunSettings]] = {}
        self._metrics: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}
        self._said: dict[str, str] = {}
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
        """How the benchmark judges the task; counts more than what the agent says itself.

        Args:
            success: whether it was solved.
            prediction: the answer.
            stop_reason: why the agent stopped; this and the next four are only used if no agent
                was logged.
            steps: the agent's.
            tokens: the agent's.
            cost: the agent's (USD).
            seconds: how long it took.
            **scores: other numbers, such as ``reward=0.5``.
        """
        judged = {"success": success, **scores}
        self._metrics |= {f"{VERDICT}{k}": float(v) for k, v in judged.items() if v is not None}
        sums = {"steps": steps, "tokens": tokens, "cost": cost, "seconds": seconds}
        self._sums |= {SUMS[k]: float(v) for k, v in sums.items() if v is not None}
        if stop_reason is not None:
            self._said[STOP_TAG] = str(getattr(stop_reason, "value", stop_reason))
        if prediction is not None:
            self._prediction = str(prediction)[:PREDICTION_CHARS]

    def skip(self, reason: str = "skipped") -> None:
        """Say that the task is not done: it counts neither as solved nor as failed."""
        self._said[SKIPPED_TAG] = reason

    def __enter__(self) -> Task:
        self._before, self._start_ns, self.open = here.get(), time.time_ns(), True
        here.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.open = False
        here.set(self._before)
        with shield("evaluations.result"):
            self._record(error)

    def mark(self, plugin: Any, logged_as: RunSettings) -> None:
        """As `Evaluation.mark`."""
        self._of.mark(plugin, logged_as, self._tags)

    def began(self, plugin: Any, trace: Any, logged_as: RunSettings) -> None:
        """As `Evaluation.began`."""
        self.mark(plugin, logged_as)
        self._traces[plugin] = trace, logged_as

    def _record(self, error: BaseException | None) -> None:
        if isinstance(error, Exception) and not self._metrics:
            self._metrics[f"{VERDICT}success"] = 0.0  # It failed beside the agent, or with it.
        mode = tracing.get_tracing_provider().mode
        for plugin in list(self._of.loggers):
            content = {}
            shown = mode == tracing.TracingMode.ENABLED and plugin.settings.capture_content
            if self._prediction and shown:
                content[PREDICTION_TAG] = self._prediction
            if plugin in self._traces:
                trace, settings = self._traces[plugin]
                said = {key: text for key, text in self._said.items() if key != STOP_TAG}
                added = {"metrics": dict(self._metrics), "tags": {**said, **content}}
                if added["metrics"] or added["tags"]:
                    fields = {"trace_id": trace.id, "added": added, "settings": settings}
                    self._of.logger(plugin).record(kind="evaluation_result", **fields)
            elif error is None or isinstance(error, Exception):
                self._record_whole(plugin, content, error)

    def _record_whole(self, plugin: Any, content: dict[str, str], error: object) -> None:
        logger = self._of.logger(plugin)
        settings = run_settings(plugin.settings)
        settings["log_traces"] = False
        self.mark(plugin, settings)
        logger.record(
            kind="evaluation_result",
            trace_id=f"task {self._tags[ATTEMPT_TAG]}",
            name=self._task_id,
            whole=True,
            start_ns=self._start_ns,
            status="FINISHED" if error is None else "FAILED",
            added={"metrics": {**self._metrics, **self._sums}, "tags": {**self._said, **content}},
            settings=settings,
        )
