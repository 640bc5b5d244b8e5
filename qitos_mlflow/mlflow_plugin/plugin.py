"""The hook implementations: each trace becomes records, offered to the pipeline of its destination.

Receives the host's Trace and Span objects on the agent's thread, hands bytes on. Nothing here
waits, except `qitos_trace_start`, which waits at most `start_timeout_s` for the run where it can
become MLflow's active run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import report, warn
from qitos_mlflow.mlflow_plugin.destination import tracking_uri
from qitos_mlflow.mlflow_plugin.fluent.active_run import ActiveRun, mlflow_in_use, parent_run_id
from qitos_mlflow.mlflow_plugin.fluent.autolog_spans import AutologSpans
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun, before_alarm_s
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.open_trace import OpenTrace, free_id, going
from qitos_mlflow.mlflow_plugin.precedence import Origin, stands_down
from qitos_mlflow.mlflow_plugin.run_status import run_status
from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
from qitos_mlflow.plugins.hookspecs import hookimpl
from qitos_mlflow.recording import process_exit, run_files, snapshot
from qitos_mlflow.recording.pipelines import Pipelines
from qitos_mlflow.settings import Settings
from qitos_mlflow.tracing.redaction import redacted_metadata

ENDED_TRACES = 256
"""Ended traces remembered, for spans of theirs that begin late on other threads."""

OPEN_TRACES = 4096
"""Traces remembered in all; beyond, ended ones whose spans are unfinished are forgotten too."""

LATE_S = 60.0
"""So long after its trace's end an unfinished span keeps the pipeline awake (seconds)."""


class MlflowPlugin:
    """MLflow support as a trace plugin. Construction starts nothing and touches nothing.

    Args:
        settings: what was configured.
        origin: how it came in.
    """

    def __init__(self, settings: Settings, origin: Origin = Origin.BY_HAND) -> None:
        self.settings = settings
        self.origin = origin
        self._traces: OrderedDict[str, OpenTrace] = OrderedDict()
        kill = partial(self._end_all, "KILLED", "the process ended before the trace did")
        self._pipelines = Pipelines(settings, self._announce, kill, self._is_over)
        # Reentrant: the garbage collector may end a trace while this thread holds it.
        self._lock = threading.RLock()
        self._closed = False
        self._when_idle: Callable[[], object] | None = None
        self._said: set[str] = set()
        _plugins.add(self)

    # -- hooks -------------------------------------------------------------------------------

    @hookimpl
    def qitos_wants_trace(self) -> bool:
        """False while a new trace would be ignored: no destination, or somebody else logs it."""
        return not (
            self._closed or self._when_idle or stands_down(self.origin, self.settings, self._said)
        )

    @hookimpl
    def qitos_trace_start(self, trace: Any) -> None:
        """Record the start; wait for the run, bounded, where it can become the active run."""
        if not self.qitos_wants_trace():
            return
        known = self._traces.get(str(trace.trace_id))
        if known is not None and not known.ended:
            return  # The same processor was added twice.
        settings = self.settings
        content = settings.capture_content and tracing.content_allowed(trace)
        uri = tracking_uri(settings)
        pipeline = self._pipelines.to(uri)
        run = PendingRun(lambda: settings.offline or pipeline.online is False)
        key = str(trace.trace_id)
        trace_id = free_id(uri, key)
        nests = settings.log_traces and trace_id == key  # MLflow's own spans are there once.
        state = going[uri, trace_id] = OpenTrace(
            id=trace_id,
            pipeline=pipeline,
            content=content,
            active=ActiveRun(
                run,
                uri,
                adopt_uri=not settings.auto_end_run,
                on_push=process_exit.end_before_mlflow,
            ),
            run=run,
            nesting=AutologSpans(key, run, uri) if nests else None,
            handling=sys.exc_info()[1],
            # The bridge's traces are one agent's run, whose span is the root of the tree.
            awaits_root="agent_name" in (trace.metadata or {}),
        )
        with self._lock:
            self._traces[key] = state
            self._forget_oldest()
        record = {
            "kind": "trace_start",
            "trace_id": trace_id,
            "name": trace.name,
            "group_id": trace.group_id,
            "metadata": self._metadata(trace, content),
            "time_ns": time.time_ns(),
            "parent_run_id": parent_run_id(uri),
            "content": content,
        }
        # A server may be slow or gone, a local store is neither.
        waits = is_http(uri) and mlflow_in_use() and not run.out_of_reach()
        pipeline.offer(snapshot.encode(record), keep=True, urgent=True)
        if waits:
            run.wait(min(settings.start_timeout_s, before_alarm_s()))
        state.active.follow()

    @hookimpl
    def qitos_span_start(self, span: Any) -> None:
        """Remember which of the agent's steps the span belongs to: the x axis of its metrics."""
        state = self._traces.get(span.trace_id)
        if state is None:
            self._pipelines.lose_if_inherited(span.trace_id)
            return
        if not state.begin_span(span):
            return
        if state.awaits_root:
            state.awaits_root = False
            record = snapshot.root_record(state.id, span)
            state.pipeline.offer(snapshot.encode(record), keep=True)
        state.active.follow()
        if state.nesting is not None:
            state.nesting.enter(span)

    @hookimpl
    def qitos_span_end(self, span: Any) -> None:
        """Freeze the span and offer it to the pipeline."""
        state = self._traces.get(span.trace_id)
        if state is None or state.has_just_ended(span):
            return
        if state.nesting is not None:
            state.nesting.leave(span)
        step = state.end_span(span)
        state.late += state.ended
        try:
            # As characters: each is a byte at least, and `refine` cuts to the byte.
            payload = snapshot.span_record(
                state.id, span, step, state.content, self.settings.field_bytes, state.late
            )
        except Exception:
            state.dropped["capture_failed"] += 1  # Data of somebody's own; told by who called us.
            state.pipeline.count_lost("capture_failed")
            raise
        if state.pipeline.offer(payload):
            state.recorded += 1
        else:
            state.dropped["closed" if self._closed else "queue_full"] += 1
        state.active.follow()

    @hookimpl
    def qitos_trace_end(self, trace: Any) -> None:
        """Record the end with its status, and give MLflow's active run back."""
        state = self._traces.get(str(trace.trace_id))
        if state is None or state.end_told:
            return
        state.end_told = True
        if state.ended:  # By `close`, from whichever thread.
            state.active.leave(open=False)
            return
        failure = getattr(trace, "error", None)
        if failure is None and not hasattr(trace, "error"):
            failure = snapshot.failure_in_flight(state.handling)
        metadata: dict[str, Any] = {}
        try:
            metadata = self._metadata(trace, state.content)
            if self.settings.log_artifacts and state.content:
                for record in run_files.of_trace(state.id, metadata):
                    if not state.pipeline.offer(snapshot.encode(record)):
                        state.lost["artifact_queue_full"] += 1
        except Exception as error:  # noqa: BLE001 - the end itself must not be lost
            report("plugin.trace_end", error)
        self._end(state, metadata, failure)
        state.active.leave(open=not self.settings.auto_end_run)
        self._tell_if_idle()

    @hookimpl
    def qitos_force_flush(self, timeout_s: float | None) -> bool:
        """True when everything recorded before the call is on the server; bounded."""
        return self._pipelines.flush(
            self.settings.flush_timeout_s if timeout_s is None else timeout_s
        )

    @hookimpl
    def qitos_shutdown(self) -> None:
        """End open runs early, deliver what can be delivered in time, then refuse."""
        self.close(self.settings.flush_timeout_s, "FINISHED", "shut down before the trace ended")

    # -- delivery ----------------------------------------------------------------------------

    def retire(self, when_idle: Callable[[], object]) -> None:
        """Take no new trace; call `when_idle` once those that are going have ended."""
        self._when_idle = when_idle
        self._tell_if_idle()

    def close(self, timeout_s: float, status: str, why: str) -> bool:
        """Flush and refuse from now on; open traces end with `status`. Blocks at most `timeout_s`.

        Idempotent, any thread. Returns True when nothing is left to deliver.
        """
        self._end_all(status, why)
        return self._pipelines.close(timeout_s)

    def _end_all(self, status: str, why: str) -> None:
        with self._lock:
            self._closed = True
            states = [state for state in self._traces.values() if not state.ended]
        if self.settings.auto_end_run or status == "KILLED":
            for state in states:
                self._end(state, {"qitos.closed": why}, None, status)

    # -- parts -------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """Whether no trace is going, and no late span of one is to be expected."""
        late_s = time.monotonic() - LATE_S
        with self._lock:
            return all(
                state.over_s is not None and (state.over_s < late_s or not state.steps)
                for state in self._traces.values()
            )

    def _tell_if_idle(self) -> None:
        if self._when_idle is not None:
            with self._lock:
                idle = all(state.ended for state in self._traces.values())
            if idle:
                self._when_idle()

    def _announce(self, trace_id: str, ref: RunRef) -> None:
        """The run of a trace exists. SendingThread's thread."""
        with self._lock:
            states = [state for state in self._traces.values() if state.id == trace_id]
        for state in states:
            state.run.created(ref)

    def _end(
        self,
        state: OpenTrace,
        metadata: dict[str, Any],
        failure: BaseException | None,
        status: str | None = None,
    ) -> None:
        with self._lock:
            if state.ended:  # `close` on one thread, the trace's own end on another.
                return
            state.ended = True
        state.handling = None  # Its traceback keeps the agent's local variables alive.
        record = {
            "kind": "trace_end",
            "trace_id": state.id,
            "time_ns": time.time_ns(),
            "metadata": metadata,
            "status": status or ("FINISHED" if failure is None else "FAILED"),
            "error": None,
            "recorded": state.recorded + sum(state.dropped.values()),
            "dropped": dict(state.dropped),
            "lost": dict(state.lost),
        }
        try:
            record["status"] = status or run_status(metadata, failure)
            if failure is not None:
                error = snapshot.describe(failure)
                if not state.content:
                    error = {"type": error["type"], "message": snapshot.WITHHELD}
                record["error"] = error
            if state.nesting is not None and (tags := state.nesting.end()):
                record["added"] = {"tags": tags}
        except Exception as error:  # noqa: BLE001 - a run whose end is lost stays RUNNING
            report("plugin.end", error)
        finally:  # Also after Ctrl-C: nobody ends it once more.
            # At once: whoever has waited for the agent looks at its trace next.
            state.pipeline.offer(snapshot.encode(record), keep=True, urgent=True)
            state.over_s = time.monotonic()

    def _metadata(self, trace: Any, content: bool) -> dict[str, Any]:
        metadata = dict(trace.metadata or {})
        return metadata if content else snapshot.structure_only(redacted_metadata(metadata))

    def _forget_oldest(self) -> None:
        """Keep the last ended traces only; those still going stay however many they are."""
        excess = len(self._traces) - OPEN_TRACES
        for trace_id, state in list(self._traces.items())[:-ENDED_TRACES]:
            excess -= 1
            if state.ended and (not state.steps or excess >= 0):
                self._traces.pop(trace_id, None)
                if state.steps:
                    state.pipeline.count_lost("forgotten", len(state.steps))
                    warn(
                        "plugin.forgotten",
                        "%s spans of a trace that ended long ago have not ended; they are lost",
                        len(state.steps),
                    )

    def _after_fork(self) -> None:
        """In a forked child: the parent's traces are the parent's."""
        self._lock = threading.RLock()
        self._pipelines.after_fork({key: state.pipeline for key, state in self._traces.items()})
        self._traces = OrderedDict()


# Weakly: a plugin nobody holds any more must not live until the process ends.
_plugins: weakref.WeakSet[MlflowPlugin] = weakref.WeakSet()


def _after_fork() -> None:
    for plugin in list(_plugins):
        plugin._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def entry_point() -> MlflowPlugin:
    """What the entry point names: the plugin as the loader builds it, from the environment."""
    from qitos_mlflow.errors import MissingMlflowError

    if find_spec("mlflow") is None:
        raise MissingMlflowError("mlflow is not installed; install it with: pip install mlflow")
    return MlflowPlugin(Settings.resolve(), Origin.INSTALLED)
