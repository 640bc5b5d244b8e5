"""One trace as it is recorded for MLflow, on the agent's thread: its run, its tree, its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow._stop_reasons import ERROR_STOPS
from qitos_mlflow.mlflow_plugin.fluent.active_run import ActiveRun, same_place
from qitos_mlflow.mlflow_plugin.fluent.autolog_spans import AutologSpans
from qitos_mlflow.mlflow_plugin.fluent.context import Begun
from qitos_mlflow.mlflow_plugin.fluent.origins import mlflow_in_use
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.fluent.versions import current_trace, prompts_of
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.lineage import PROMPTS, prompts_tag
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TREE_TAG
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.recording.to_json import Snapshot
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings


class OpenTrace(TraceRecorder):
    """A trace that is recorded for MLflow.

    Attributes:
        around: QitOS's id of the trace in which it began, if there is one.
        run: its run, once there is one.
        active: that run as MLflow's active run.
        tree: has its spans if they are part of a trace of MLflow's own tracer.
        autolog: makes MLflow's own spans children of its spans; None if that is another's task.
    """

    def __init__(
        self,
        trace: Any,
        pipeline: RecordPipeline,
        settings: Settings,
        run_settings: RunSettings,
        uri: str | None,
        parent_run_id: str | None = None,
        *,
        same: bool = False,
    ) -> None:
        super().__init__(trace, pipeline, settings, run_settings)
        self.around = current_trace.get()
        host_id = self.host_id = str(trace.trace_id)
        self._prompts, self._uri = prompts_of(host_id), uri
        self.run = PendingRun(lambda: settings.offline or pipeline.online is False)
        self.active = ActiveRun(
            self.run,
            uri,
            adopt_uri=not settings.auto_end_run,
            on_push=process_exit.end_first,
        )
        self.configured, self.run_settings = settings, run_settings
        # Of two processors that log one trace to one server, the first has MLflow's own spans.
        self.tree: Any = None
        self.autolog = None
        self.no_pictures = not run_settings["log_traces"]
        if not settings.log_traces or self.id != host_id:
            return
        if same and mlflow_in_use() and not self.run.out_of_reach():
            with shield("plugin.tree"):
                from qitos_mlflow.mlflow_plugin.fluent.mlflow_tree import tree_around

                most = settings.field_bytes, parent_run_id, pipeline.max_picture_bytes
                self.tree = tree_around(trace, self.run, *most)
        if self.tree is None:
            sampled = run_settings["log_traces"]
            self.autolog = AutologSpans(host_id, self.run, uri, sampled=sampled)
        else:
            self.autolog, self.shared = self.tree, True
            run_settings["log_traces"] = False
            self.no_pictures = True
            run_settings["tags"] = {**run_settings["tags"], TREE_TAG: self.tree.trace_id}

    @property
    def ids(self) -> set[str | None]:
        """QitOS's and MLflow's, by which it may be named later."""
        return {self.host_id, self.id, trace_id(self.id), self.mlflow_trace_id} - {None}

    @property
    def mlflow_trace_id(self) -> str | None:
        """MLflow's id of the trace that has its spans; None if they are in none."""
        if self.tree is not None:
            return str(self.tree.trace_id)
        return trace_id(self.id) if self.run_settings["log_traces"] else None

    def begun(self, uri: str | None, workspace: str | None) -> Begun:
        """What a `context` knows of it."""
        return Begun(self.id, self.mlflow_trace_id, self.run, uri, workspace)

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

    def end_early(self, status: str, why: str) -> None:
        """As in the base class; then the run can no longer be, or become, MLflow's active run."""
        super().end_early(status, why)
        if not self.run.left_open:
            self.active.leave(open=False)

    def tags(self) -> Mapping[str, str]:
        """The tags that were set on the trace through MLflow, and the prompts that were loaded."""
        tags = {} if self.autolog is None or self.tree is not None else self.autolog.end()
        with shield("open_trace.prompts"):
            if self._prompts and same_place(self._uri):
                tags = {**tags, PROMPTS: prompts_tag([*self._prompts])}
        return tags

    def recorded(self, snapshot: Snapshot) -> None:
        """Show it in MLflow's own trace, if its spans are there."""
        if self.tree is not None:
            self.tree.fold(snapshot)
