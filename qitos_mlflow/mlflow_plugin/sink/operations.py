"""What the sink's calls do on a `Transport`: find or create runs, log, write spans and infos.

Receives `TraceState`s and what is to be written of them; raises what the transport raises. Doing
a call twice comes to the same as doing it once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qitos_mlflow._guard import warn
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.mapping.trace_info import locate
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused, Transport, delete_others
from qitos_mlflow.mlflow_plugin.sink.trace_cost import TraceCosts
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState
from qitos_mlflow.redaction.uris import without_credentials

Announce = Callable[[str, RunRef], None]

NO_TRACES = frozenset({"HTTP 404", "HTTP 405", "HTTP 501", "NOT_IMPLEMENTED"})
"""What a server without MLflow's trace endpoints answers to them."""

NO_RUN = "NO_RUN"
"""Our own code: there is no run on this server that the call could be about."""


class Operations:
    """The calls of one segment. Used by one thread.

    Args:
        transport: carries them.
        settings: the segment's header.
        announce: told each run as it is created.
    """

    def __init__(
        self, transport: Transport, settings: Mapping[str, Any], announce: Announce | None
    ) -> None:
        self._transport = transport
        self._settings = settings
        self._announce = announce
        self._experiment_id: str | None = None
        self._costs = TraceCosts(transport)
        self.log_traces = bool(settings.get("log_traces", True))

    def create_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        """Find the trace's run, or create it where there is none."""
        cached = self._experiment_id is not None
        try:
            self._find_or_create(trace, timeout_s)
        except Refused as refusal:
            if refusal.code == NO_RUN:
                raise
            # The experiment may have been deleted, and another one made by its name.
            self._experiment_id = None
            if not cached:
                raise
            self._find_or_create(trace, timeout_s)
        if self._announce is not None and trace.run is not None:
            self._announce(trace.trace_id, trace.run)

    def _find_or_create(self, trace: TraceState, timeout_s: float) -> None:
        experiment_id = self._experiment(timeout_s)
        if trace.run is None and trace.maybe_created:
            found = self._transport.find_runs(experiment_id, trace.trace_id, timeout_s)
            trace.run = found[0] if found else None
        if trace.run is None:
            if not (trace.started or trace.ended):
                raise Refused(NO_RUN, "the trace it belongs to has no run on this server")
            trace.start_lost = not trace.started
            # An attempt that went unanswered may still come through.
            trace.creations += 2 if trace.maybe_created else 1
            trace.maybe_created = True
            run_name = self._settings.get("run_name") or trace.name
            trace.run = self._transport.create_run(
                experiment_id,
                trace.start_ms,
                limits.clean_text(run_name, limits.RUN_NAME_CHARS),
                [("mlflow.source.type", "LOCAL"), *trace.creation_tags()][: limits.BATCH_TAGS],
                timeout_s,
            )
        trace.settle()

    def _experiment(self, timeout_s: float) -> str:
        if self._experiment_id is None:
            name = limits.clean_text(self._settings["experiment_name"], limits.EXPERIMENT_CHARS)
            self._experiment_id = self._transport.experiment_id(name, timeout_s)
        return self._experiment_id

    def server_is_well(self, timeout_s: float) -> bool:
        """Whether the server answers a simple question from its database."""
        self._experiment_id = None
        try:
            self._experiment(timeout_s)
        except Refused:  # It looked, and does not want to.
            return True
        except (Poisoned, RetryLater):
            return False
        return True

    def check_run(self, trace: TraceState, timeout_s: float) -> None:
        """Raise `Refused` if the run takes nothing: it was deleted."""
        same = [("qitos.trace_id", trace.trace_id)]
        self._transport.log_batch(_run_of(trace).run_id, [], [], same, timeout_s)

    def log(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Log metrics, params and tags of the run."""
        metrics = [item for kind, item in items if kind == "metric"]
        params = [item for kind, item in items if kind == "param"]
        tags = [item for kind, item in items if kind == "tag"]
        self._transport.log_batch(_run_of(trace).run_id, metrics, params, tags, timeout_s)

    def write_spans(
        self, traces: Mapping[bytes, TraceState], spans: Sequence[Any], timeout_s: float
    ) -> None:
        """Write spans of any of these traces, by their OpenTelemetry ids."""
        by_experiment: dict[str, list[Any]] = {}
        for span in spans:
            trace = traces[span.trace_id]
            if trace.refused is None:  # Those of a refused run are dead letters already.
                by_experiment.setdefault(_run_of(trace).experiment_id, []).append(span)
        if not self.log_traces:
            return
        with self._without_traces():
            for experiment_id, some in by_experiment.items():
                self._transport.write_spans(experiment_id, some, timeout_s)

    def write_tree(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Write what is known so far of the trace as a whole; if that fails, another one follows.

        Servers before 3.12 refuse an info that lacks what they know, such as tokens of MLflow's own
        spans.
        """
        try:
            self.write_last_tree(trace, items, timeout_s)
        except (Refused, Poisoned):
            if trace.tree is not None:
                trace.tree.news = True

    def write_last_tree(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Write what is known of the trace as a whole, and will not be written again."""
        if not self.log_traces or trace.tree is None or not (trace.started or trace.start_lost):
            return
        run = _run_of(trace)
        experiment_id = run.experiment_id
        info = locate(items[0], experiment_id, run.run_id)
        if trace.told:
            info["trace_metadata"] |= self._costs.metadata(trace.tree, experiment_id, timeout_s)
        with self._without_traces():
            self._transport.write_trace(info, timeout_s)
            if not trace.told:  # Only now the server can tell which spans are the trace's.
                trace.told = True
                if cost := self._costs.metadata(trace.tree, experiment_id, timeout_s):
                    info["trace_metadata"] |= cost
                    self._transport.write_trace(info, timeout_s)

    @contextlib.contextmanager
    def _without_traces(self) -> Iterator[None]:
        """Go on with runs alone where a server is too old, or a store too simple, for traces."""
        try:
            yield
        except Refused as refusal:
            if refusal.code not in NO_TRACES:
                raise
            self.log_traces = False
            server = without_credentials(self._transport.uri)
            warn(
                f"sink.no_traces {server}",
                "%s cannot store traces (%s): runs are logged, span trees are not",
                server,
                refusal.code,
            )

    def write_artifact(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Write files of the run."""
        for path, content in items:
            self._transport.write_artifact(_run_of(trace), path, content, timeout_s)

    def end_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        """Complete the run's account of its spans and end it."""
        if self._settings.get("log_traces", True) and not self.log_traces:
            trace.lost_spans.pop("no_traces", None)
            trace.lost_spans["no_traces"] = trace.totals.spans - sum(trace.lost_spans.values())
        if ledger := trace.corrected_ledger():
            self._transport.log_batch(_run_of(trace).run_id, [], [], ledger, timeout_s)
        # Not if its start was lost: who has that may just be creating the run it belongs to.
        if trace.creations > 1 and trace.started:
            delete_others(self._transport, _run_of(trace), trace.trace_id, timeout_s)
        if not self._settings.get("auto_end_run", True) and not trace.cut_off:
            return  # Its user ends it, also where the agent failed or was interrupted.
        status = trace.status or "FINISHED"
        self._transport.end_run(_run_of(trace).run_id, status, trace.end_ms, timeout_s)


def _run_of(trace: TraceState) -> RunRef:
    if trace.run is None:
        raise Refused(NO_RUN, trace.refused or "its run was not created")
    return trace.run
