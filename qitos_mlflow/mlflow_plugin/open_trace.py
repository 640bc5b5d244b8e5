"""One trace on the agent's thread: what is recorded of it, and its run in MLflow's fluent API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._stop_reasons import ERROR_STOPS
from qitos_mlflow.mlflow_plugin.fluent.active_run import ActiveRun
from qitos_mlflow.mlflow_plugin.fluent.autolog_spans import AutologSpans
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings


class OpenTrace(TraceRecorder):
    """A trace that is recorded for MLflow.

    Attributes:
        run: its run, once there is one.
        active: that run as MLflow's active run.
        autolog: makes MLflow's own spans children of its spans; None if that is another's task.
    """

    def __init__(
        self,
        trace: Any,
        pipeline: RecordPipeline,
        settings: Settings,
        run_settings: RunSettings,
        uri: str | None,
    ) -> None:
        super().__init__(
            trace,
            pipeline,
            settings,
            content=settings.capture_content and tracing.content_allowed(trace),
            run_settings=run_settings,
        )
        self.run = PendingRun(lambda: settings.offline or pipeline.online is False)
        self.active = ActiveRun(
            self.run,
            uri,
            adopt_uri=not settings.auto_end_run,
            on_push=process_exit.end_first,
        )
        host_id = str(trace.trace_id)
        # Of two processors that log one trace to one server, the first has MLflow's own spans.
        nests = settings.log_traces and self.id == host_id
        self.autolog = AutologSpans(host_id, self.run, uri) if nests else None

    @staticmethod
    def status(metadata: Mapping[str, Any], failure: BaseException | None) -> str:
        """MLflow's run status for how the trace ended: FINISHED, FAILED or KILLED. Pure."""
        # Any code writes the metadata: what is no text may not even be comparable.
        status, reason = (
            value if isinstance(value, str) else None
            for value in (metadata.get("status"), metadata.get("stop_reason"))
        )
        if status == "interrupted":
            return "KILLED"
        if failure is not None:
            return "FAILED" if isinstance(failure, Exception) else "KILLED"
        if status == "error" or reason in ERROR_STOPS:
            return "FAILED"
        return "FINISHED"

    def tags(self) -> Mapping[str, str]:
        """The tags that were set on the trace through MLflow."""
        return {} if self.autolog is None else self.autolog.end()
