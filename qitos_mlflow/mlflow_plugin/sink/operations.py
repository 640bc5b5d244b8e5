"""What the sink's calls do on a `Transport`: find or create runs, log, write spans and infos.

Receives `TraceState`s and what is to be written of them; raises what the transport raises. Making
a call twice has the same effect as making it once. A trace's run is created first. If the server
refuses the run, no other call of the trace is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qitos_mlflow._guard import warn
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunData, RunRef
from qitos_mlflow.mlflow_plugin.mapping.span_tree import locate
from qitos_mlflow.mlflow_plugin.server.http import REQUEST_TIMEOUT_S
from qitos_mlflow.mlflow_plugin.server.transport import (
    NotThere,
    Poisoned,
    PutOff,
    Refused,
    TooLarge,
    Transport,
    Unanswered,
)
from qitos_mlflow.mlflow_plugin.sink.attachments import Attachments
from qitos_mlflow.mlflow_plugin.sink.costs import Costs
from qitos_mlflow.mlflow_plugin.sink.experiments import Experiments
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState

Announce = Callable[[str, RunRef], None]

FRESH_S = 5.0
"""How long the server is believed to have an experiment or a run without being asked (seconds). A
failure ends this: it may come back with another database, where ids mean something else."""

LATE_S = 10.0
"""How long after its timeout a creation is waited for before another one is made (seconds)."""

SIGHTINGS = 4
"""A server has no traces, or takes no files, if that has failed so often in a row, ..."""
SIGHTINGS_S = 15.0
"""... over at least this time (seconds). A router that is being changed says the same."""
LOOK_AGAIN_S = 300.0
"""Traces are tried again after this time (seconds), ..."""
FILES_PAUSE = 10.0
"""... files after so many times as long as the last one took to fail: all else goes on."""

LATE_LOSSES = ("too_large", "artifact_put_off", "artifact_refused")
"""Reasons for which `CallList` counts losses, after a trace's end has listed those before."""


@dataclass
class Part:
    """What a server may lack although it is well otherwise: traces, or a place for files."""

    failures: int = 0  # In a row, ...
    since: float = 0.0  # ... the first one at this time (monotonic clock).
    missing_until: float = 0.0  # Not tried before this time (monotonic clock), ...
    reason: str = ""  # ... for this reason.


class Operations:
    """The calls of one sink. Used by one thread.

    Args:
        transport: carries them.
        announce: called with each trace's id and run as the run is created.
        header: the segment's, for files that are put off.
    """

    def __init__(self, transport: Transport, announce: Announce, header: bytes = b"") -> None:
        self._transport = transport
        self._announce = announce
        self.header = header
        self._experiments = Experiments(transport)
        self._attachments = Attachments(transport)
        self._costs = Costs(transport)
        self._failed_at = 0.0
        self._traces, self._files = Part(), Part()

    @property
    def request_timeout_s(self) -> float:
        """Longest wait for one answer (seconds)."""
        return REQUEST_TIMEOUT_S * self._transport.patience

    @property
    def stores_traces(self) -> bool:
        """Whether the server can store traces, as far as is known."""
        return time.monotonic() >= self._traces.missing_until

    def failed(self) -> None:
        """A call failed: the server may have another database once it succeeds."""
        self._failed_at = time.monotonic()

    @property
    def _fresh_at(self) -> float:
        return max(self._failed_at, time.monotonic() - FRESH_S)

    def create_run(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Find the trace's run, or create it if there is none; with tags, unless without items."""
        try:
            self._find_or_create(trace, timeout_s, bare=not items)
        except Refused as refusal:
            # The experiment may have been deleted, and another one made by its name.
            if refusal.code == "NO_RUN" or not self._experiments.forget(trace.facts):
                raise
            self._find_or_create(trace, timeout_s, bare=not items)
        trace.confirmed_at = time.monotonic()
        self._announce(trace.facts.trace_id, _run_of(trace))

    def _find_or_create(self, trace: TraceState, timeout_s: float, *, bare: bool) -> None:
        facts = trace.facts
        experiment_id = self._experiments.of(facts, timeout_s, self._fresh_at)
        if trace.run is None and trace.attempts:
            found = self._transport.find_runs(experiment_id, facts.trace_id, timeout_s)
            trace.run = found[0] if found else None
        if trace.run is None:
            if not (facts.started or facts.ended):
                raise Refused("NO_RUN", "the trace it belongs to has no run on this server")
            if time.monotonic() < trace.look_until:
                raise RetryLater("the server has not said yet whether it created the run")
            trace.attempts += 1
            tags = trace.creation_tags()[: limits.BATCH_TAGS]
            if bare:
                tags = [tag for tag in tags if tag[0] == "qitos.trace_id"]
            new = NewRun(experiment_id, facts.run_name, limits.clean_ms(facts.start_ns), tags)
            try:
                trace.run = self._transport.create_run(new, timeout_s)
            except Unanswered:
                trace.look_until = time.monotonic() + LATE_S
                raise
        trace.settle()

    def server_is_well(self, trace: TraceState, timeout_s: float) -> bool:
        """Whether the server finds the experiment in its database, or creates it there."""
        try:
            with suppress(Refused):  # It has looked the experiment up.
                self._experiments.ask(trace.facts, timeout_s)
        except (Poisoned, RetryLater):
            self.failed()
            return False
        return True

    def check_run(self, trace: TraceState, timeout_s: float) -> None:
        """Raise `Refused` if the run takes nothing: it was deleted."""
        self._log(trace, RunData(tags=[("qitos.trace_id", trace.facts.trace_id)]), timeout_s)

    def confirm_run(self, trace: TraceState, timeout_s: float) -> None:
        """Call `check_run`, unless the server was seen to have the run within `FRESH_S`."""
        if trace.confirmed_at <= self._fresh_at:
            self.check_run(trace, timeout_s)

    def _log(self, trace: TraceState, data: RunData, timeout_s: float) -> None:
        self._transport.log_batch(_run_of(trace).run_id, data, timeout_s)
        trace.confirmed_at = time.monotonic()

    def log(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Log metrics, params and tags of the run."""
        kinds = ("metric", "param", "tag")
        data = RunData(*([item for kind, item in items if kind == wanted] for wanted in kinds))
        self._log(trace, data, timeout_s)

    def may_cost(self, trace: TraceState) -> bool:
        """Whether `write_info` may ask what the trace has cost."""
        tree = trace.tree
        return trace.facts.ended and tree is not None and tree.changed and bool(tree.priced)

    def write_spans(self, trace: TraceState, spans: Sequence[Any], timeout_s: float) -> None:
        """Write spans of the trace, if the server still has its run.

        A span alone would be taken by whatever experiment has the id now.
        """
        self.confirm_run(trace, timeout_s)
        experiment_id = _run_of(trace).experiment_id
        spans = self._attachments.fit(trace, spans, timeout_s)
        self.store(trace, self._transport.write_spans, experiment_id, spans, timeout_s)

    def write_info(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Write what is known of the trace as a whole, with its cost once it has ended."""
        facts, tree, run = trace.facts, trace.tree, _run_of(trace)
        if not self.stores_traces or tree is None or not (facts.started or trace.attempts > 1):
            return
        info = locate(items[0], run.experiment_id, run.run_id)
        # The server finds the spans that cost something by a tag of their trace's info.
        first = not trace.has_info
        self.confirm_run(trace, timeout_s)
        if first or not facts.ended:
            try:
                self.store(trace, self._transport.write_trace, info, timeout_s)
            except (Refused, Poisoned):
                # Servers before 3.12 refuse an info that lacks what they know, such as tokens of
                # MLflow's own spans. Another info follows if the trace goes on, with all but
                # feedback that the tree does not keep.
                if facts.ended or info.get("assessments", []) != tree.assessments:
                    raise
                tree.news = True
                return
            trace.has_info = True
        if facts.ended and self.stores_traces:
            cost = self._costs.of(tree, run.experiment_id, timeout_s)
            if cost or not first:
                info["trace_metadata"] |= cost
                self.store(trace, self._transport.write_trace, info, timeout_s)

    def store(self, trace: TraceState, write: Callable[..., None], *what: Any) -> None:
        """Write spans or an info; go on with runs alone if a server or a store has no traces."""
        if self.stores_traces:
            try:
                write(*what)
            except Refused as refusal:
                if refusal.code != "NOT_IMPLEMENTED":  # The server's own word.
                    raise
                self._go_without_traces(refusal)
            except NotThere as missing:
                if not self._lacks(self._traces, missing, trace, what[-1]):
                    raise
                self._go_without_traces(missing)
            else:
                self._traces.failures = 0
                return
        trace.untraced = True

    def _lacks(self, part: Part, failure: Exception, trace: TraceState, timeout_s: float) -> bool:
        """Count a failure; True if there were enough of them while the server is well otherwise."""
        now = time.monotonic()
        part.reason = str(failure)
        part.failures += 1
        if part.failures == 1:
            part.since = now
        enough = part.failures >= SIGHTINGS and now - part.since >= SIGHTINGS_S
        return enough and self.server_is_well(trace, timeout_s)

    def _go_without_traces(self, failure: Exception) -> None:
        self._traces.missing_until = time.monotonic() + LOOK_AGAIN_S
        server = self._transport.address
        warn(
            f"sink.no_traces {server}",
            "%s cannot store traces (%.200s): only runs are logged, without span trees",
            server,
            failure,
        )

    def write_artifact(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Write a file of the run; put it off if files fail while the server is well otherwise."""
        [file] = items
        files = self._files
        began = time.monotonic()
        if began >= files.missing_until:
            try:
                self._attachments.write(trace, _run_of(trace), file, timeout_s)
                files.failures = 0
                return
            except TooLarge as large:  # For a proxy, whose limit may be another one tomorrow.
                raise PutOff("NO_ARTIFACTS", str(large)) from large
            except (RetryLater, Poisoned) as failure:
                took_s = time.monotonic() - began
                if not self._lacks(files, failure, trace, timeout_s):
                    raise
                files.missing_until = time.monotonic() + FILES_PAUSE * took_s
        raise PutOff("NO_ARTIFACTS", files.reason)

    def end_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        """Complete the run's ledger and end it."""
        facts, run = trace.facts, _run_of(trace)
        if facts.log_traces and trace.untraced:
            trace.lost_spans.pop("no_traces", None)
            trace.lost_spans["no_traces"] = trace.totals.spans - sum(trace.lost_spans.values())
        if trace.lost_spans or any(facts.lost[reason] for reason in LATE_LOSSES):
            ledger = RunData(tags=trace.totals.ledger(trace.lost_spans))
            self._transport.log_batch(run.run_id, ledger, timeout_s)
        # Attempts to create the run that went unanswered may have taken effect later: all are
        # empty. Not if its start was lost: the process that has it may be creating it right now.
        if trace.attempts > 1 and facts.started:
            for other in self._transport.find_runs(run.experiment_id, facts.trace_id, timeout_s):
                if other.run_id != run.run_id:
                    self._transport.delete_run(other.run_id, timeout_s)
        # Otherwise its user ends it, even if the agent failed or was interrupted.
        if facts.auto_end_run or facts.cut_off:
            end_ms = limits.clean_ms(facts.ended_ns)
            self._transport.end_run(run.run_id, facts.status, end_ms, timeout_s)


def _run_of(trace: TraceState) -> RunRef:
    assert trace.run is not None
    return trace.run
