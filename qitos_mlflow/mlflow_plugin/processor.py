"""`MlflowTraceProcessor`: the MLflow plugin as a processor to register by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow.bridge import ensure_bridge
from qitos_mlflow.mlflow_plugin.plugin import MlflowPlugin, require_mlflow
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.settings import Settings

require_mlflow()


class _Default(str):
    """A default that differs from the same text given by the caller."""

    __slots__ = ()


class MlflowTraceProcessor(PluginTraceProcessor):
    """Logs every QitOS trace as one MLflow run, live, with the span tree as an MLflow trace.

    Register it with `add_trace_processor`. One processor serves any number of traces, one after
    another and at once, from any threads. Constructing it starts nothing, connects to nothing and
    does not import mlflow; the first trace starts the threads. Processors with the same destination
    share them.

    No callback waits for the server, with one exception. If mlflow is in use in the process and
    its own calls go to the same server, `on_trace_start` waits up to `start_timeout_s` for the
    run, so that the run can be MLflow's active run on this thread. No callback raises.

    `force_flush` returns True when everything recorded so far is on the server. It returns False
    if something is still waiting, or was lost or refused since the last call.

    Args:
        experiment_name: MLflow experiment, created when missing. When not given:
            ``QITOS_MLFLOW_EXPERIMENT_NAME``, else that of the parent run, else the one that MLflow
            itself uses (`mlflow.set_experiment`, ``MLFLOW_EXPERIMENT_ID``,
            ``MLFLOW_EXPERIMENT_NAME``), else ``"qitos"``.
        run_name: name of the runs; None: the trace's name, by default the agent's.
        tracking_uri: tracking server; None: MLflow's own default for the installed version
            (``MLFLOW_TRACKING_URI``, else its local store), asked for when a trace starts.
        tags: tags of every run.
        auto_end_run: end the run when the trace ends. False leaves it open, however the trace
            ended, as MLflow's active run on the thread that ran it.
        **options: any other field of `Settings`, such as ``capture_content=False``; they are
            listed in docs/settings.md.

    Raises:
        SettingsError: a value cannot be used; the text names it.
        TypeError: there is no such option.
    """

    def __init__(
        self,
        experiment_name: str | None = _Default("qitos"),
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        auto_end_run: bool = True,
        **options: Any,
    ) -> None:
        settings = Settings.resolve(
            experiment_name=None if isinstance(experiment_name, _Default) else experiment_name,
            run_name=run_name,
            tracking_uri=tracking_uri,
            tags=tags,
            auto_end_run=auto_end_run,
            **options,
        )
        self.mlflow_plugin = MlflowPlugin(settings)
        super().__init__({"mlflow": self.mlflow_plugin})
        ensure_bridge()
