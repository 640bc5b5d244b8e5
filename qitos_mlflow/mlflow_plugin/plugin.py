"""The hook implementations: each trace becomes records, in the pipeline of its destination.

Receives the host's Trace and Span objects on the agent's thread. Nothing here waits, except
`qitos_trace_start`: it waits at most `start_timeout_s` for the run, if that can become MLflow's
active run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from enum import IntEnum
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import log
from qitos_mlflow._selection import Selection
from qitos_mlflow.errors import MissingMlflowError
from qitos_mlflow.mlflow_plugin.destination import pipeline_of, placed, run_settings
from qitos_mlflow.mlflow_plugin.evaluations import current as current_task
from qitos_mlflow.mlflow_plugin.fluent.active_run import let_go, same_place
from qitos_mlflow.mlflow_plugin.fluent.carried import current
from qitos_mlflow.mlflow_plugin.fluent.context import context
from qitos_mlflow.mlflow_plugin.fluent.origins import mlflow_in_use
from qitos_mlflow.mlflow_plugin.fluent.pending_run import before_alarm_s
from qitos_mlflow.mlflow_plugin.fluent.surroundings import (
    Surroundings,
    is_sampled,
    is_trial,
    surroundings,
)
from qitos_mlflow.mlflow_plugin.fluent.versions import (
    active_model,
    current_trace,
    watch_prompts,
)
from qitos_mlflow.mlflow_plugin.open_trace import OpenTrace as OpenTrace
from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
from qitos_mlflow.mlflow_plugin.watches import watch
from qitos_mlflow.plugins.hookspecs import hookimpl
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.settings import TRACKING_VARIABLE, Settings

process_exit.at_last.append(let_go)


class Origin(IntEnum):
    """How a plugin was registered. A plugin logs nothing if there is one of a higher value."""

    INSTALLED = 0
    AUTOLOG = 1
    BY_HAND = 2


class MlflowPlugin:
    """MLflow support as a trace plugin. Construction starts nothing and touches nothing.

    Args:
        settings: what was configured.
        origin: how it was registered.
    """

    def __init__(self, settings: Settings, origin: Origin = Origin.BY_HAND) -> None:
        self.settings = settings
        self.origin = origin
        self.recorder: Recorder[OpenTrace] = Recorder(settings)
        self._when_idle: Callable[[], object] | None = None
        self._said: set[tuple[int, str]] = set()
        watch()
        watch_prompts()

    # -- hooks -------------------------------------------------------------------------------

    @hookimpl
    def qitos_wants_trace(self, trace: Any = None) -> bool:
        """False while a new trace would be ignored: no destination, or another plugin logs it."""
        if not self.takes:
            return False
        reason = self._reason_to_stand_down(trace)
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            log(*reason)
        return reason is None

    @hookimpl
    def qitos_trace_start(self, trace: Any) -> None:
        """Record the start; wait for the run, bounded, if it can become the active run."""
        try:
            self._begin(trace)
        except BaseException as error:
            self.recorder.lose_start(str(trace.trace_id), error)
            raise

    def _begin(self, trace: Any) -> None:
        if not self.qitos_wants_trace(trace):
            return
        key = str(trace.trace_id)
        known = self.recorder.get(key)
        if known is not None and not known.ended:
            return
        settings = self.settings
        to, pipeline = pipeline_of(self.recorder)
        uri = to.uri
        if pipeline.closed:  # The process is ending.
            return
        given: context | None = current.get()
        asked = None if given is None else given.parent_run_id
        same = same_place(uri)
        task = current_task()
        if task is None or not task.takes(self, uri, asked):
            task, around = None, surroundings(uri, asked or settings.parent_run_id, same=same)
        else:
            around = Surroundings()  # The run of an evaluation is the parent of all in it.
        logged_as = placed(self._run_settings, settings, around)
        if same and (model_id := active_model()):
            logged_as["model_id"] = model_id
        if given is not None:
            logged_as |= given.run_settings()
        logged_as["log_traces"] = settings.log_traces and is_sampled(key)
        parent = around.parent_run_id
        open_trace = OpenTrace(trace, pipeline, settings, logged_as, uri, parent, same=same)
        self.recorder.add(key, open_trace)
        current_trace.set(key)
        if task is not None:
            task.began(self, open_trace, logged_as)
        # A server may be slow or gone, a local store is neither.
        waits = is_http(uri) and mlflow_in_use() and not open_trace.run.out_of_reach()
        more: dict[str, Any] = {"parent_run_id": parent}
        if given is not None:
            more |= given.start_fields()
            given.begin(open_trace.begun(to.uri, to.workspace))
        open_trace.start(trace, **more)
        if waits:
            open_trace.run.wait(min(settings.start_timeout_s, before_alarm_s()))
        open_trace.active.follow()

    @hookimpl
    def qitos_span_start(self, span: Any) -> None:
        """Note which of the agent's steps the span belongs to: the x axis of its metrics."""
        open_trace = self.recorder.get(span.trace_id)
        if open_trace is None:
            self.recorder.lose_span(span.trace_id)
            return
        open_trace.start_span(span)
        current_trace.set(span.trace_id)
        open_trace.active.follow()
        if open_trace.autolog is not None:
            open_trace.autolog.enter(span)

    @hookimpl
    def qitos_span_end(self, span: Any) -> None:
        """Record the span."""
        open_trace = self.recorder.get(span.trace_id)
        if open_trace is None:
            return
        try:
            open_trace.end_span(span)
        finally:
            if open_trace.autolog is not None:
                open_trace.autolog.leave(span)
        open_trace.active.follow()

    @hookimpl
    def qitos_trace_end(self, trace: Any) -> None:
        """Record the end with its status, and give MLflow's active run back."""
        open_trace = self.recorder.get(str(trace.trace_id))
        if open_trace is None or open_trace.run.left_open:
            return
        # One that has ended was closed early, from any thread.
        stays_open = not (open_trace.ended or self.settings.auto_end_run)
        try:
            open_trace.end(trace)
        except MemoryError:  # Its run must not stay open: unless it has ended, it ends here.
            status = open_trace.status({}, getattr(trace, "error", None))
            open_trace.end_early(status, "too little memory")
            raise
        finally:  # Also after Ctrl-C.
            open_trace.active.leave(open=stays_open)
            current_trace.set(open_trace.around)
            if open_trace.tree is not None:  # Last: it waits.
                open_trace.tree.end()
        self._call_if_idle()

    @hookimpl
    def qitos_force_flush(self, timeout_s: float | None) -> bool:
        """True when everything recorded before the call is on the server; bounded."""
        return self.recorder.flush(timeout_s)

    @hookimpl
    def qitos_shutdown(self) -> None:
        """End open runs early, deliver what can be delivered in time, then take no more."""
        self.recorder.close()

    # -- life --------------------------------------------------------------------------------

    def retire(self, when_idle: Callable[[], object]) -> None:
        """Take no new trace; call `when_idle` once the open ones have ended."""
        self._when_idle = when_idle
        self._call_if_idle()

    @cached_property
    def _run_settings(self) -> RunSettings:
        return run_settings(self.settings)

    def _reason_to_stand_down(self, trace: Any) -> tuple[int, str] | None:
        """Why this must not log a run that starts now, None if it logs it. Costs microseconds.

        A later equal plugin logs it, or one with a higher `Origin`, or the host's own processor
        does. A plugin that is only installed also needs a destination. The reason is what to log,
        once: level and message. `trace` is None if it is not made yet.
        """
        if is_trial():
            return logging.DEBUG, "mlflow.genai.evaluate tries its predict_fn: this is not logged"
        if equal := self._equal_later_ones(trace):
            # Of several, as where a notebook's cell ran again and again, the last but one says it.
            return logging.WARNING if equal == 1 else logging.DEBUG, (
                "another MlflowTraceProcessor with the same settings was added and replaces the "
                "earlier one: each run is logged once"
            )
        if self.origin is Origin.BY_HAND:
            return None
        for processor in tracing.processors():
            plugin = getattr(processor, "mlflow_plugin", None)
            if plugin is not None:
                if plugin.takes and plugin.origin > self.origin:
                    return logging.DEBUG, "another processor that logs to MLflow takes precedence"
                continue
            for base in type(processor).__mro__:
                if base.__name__ == "MlflowTraceProcessor":
                    return logging.WARNING, (
                        "this package logs nothing, because the host's own "
                        f"{base.__module__}.MlflowTraceProcessor is registered. To use this "
                        "package, remove that processor, or register "
                        "qitos_mlflow.MlflowTraceProcessor in its place."
                    )
        given = self.settings.tracking_uri or os.environ.get(TRACKING_VARIABLE)
        if self.origin is Origin.AUTOLOG or given or Selection.from_environ().asks_for("mlflow"):
            return None
        return logging.INFO, (
            "QitOS runs are not logged to MLflow: no destination is set. Set MLFLOW_TRACKING_URI, "
            "or QITOS_TRACE_PLUGINS=mlflow for MLflow's local store."
        )

    def _equal_later_ones(self, trace: Any) -> int:
        """How many equal plugins get the events of `trace` from processors added after its own."""
        equal: list[type] = []
        for processor in reversed(tracing.processors(trace)):
            plugin = getattr(processor, "mlflow_plugin", None)
            if plugin is self:
                return equal.count(type(processor))
            if isinstance(plugin, MlflowPlugin) and plugin.takes and plugin.origin == self.origin:
                equal += [type(processor)] * (plugin.settings == self.settings)
        return 0  # Its own is not among them: nothing can be said.

    @property
    def takes(self) -> bool:
        """Whether it still takes new traces."""
        return not (self.recorder.closed or self._when_idle)

    def _call_if_idle(self) -> None:
        if self._when_idle is not None and all(one.ended for one in self.recorder.traces):
            self._when_idle()


def require_mlflow() -> None:
    """Raise `MissingMlflowError` if mlflow is not installed."""
    if find_spec("mlflow") is None:  # Not imported: what that costs: docs/transport.md.
        raise MissingMlflowError("mlflow is not installed; install it with: pip install mlflow")


def entry_point() -> MlflowPlugin:
    """What the entry point names: the plugin as the loader builds it, from the environment."""
    require_mlflow()
    return MlflowPlugin(Settings.resolve(), Origin.INSTALLED)
