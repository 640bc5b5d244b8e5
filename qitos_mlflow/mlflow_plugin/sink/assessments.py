"""Writes what is said of a trace afterwards: MLflow's assessments, each of them once.

How MLflow takes them (3.12 to 3.17, http and local stores):

- ``POST traces/{id}/assessments`` creates one. Database stores keep an id that is given, and fail
  on a second one with the same id (``INTERNAL_ERROR``). Others give ids of their own. So ours is in
  the metadata, too, and what is there is looked at first.
- ``PATCH traces/{id}/assessments/{id}`` changes value, rationale and metadata. It keeps the source,
  the time of creation, and whether a person has overridden it (``valid``). Metadata is merged.
- ``GET traces/{id}`` has all assessments of the trace in its info. There is no search by name.
- A trace that is not there is ``RESOURCE_DOES_NOT_EXIST``.

A trace that is open here gets them with its next info instead: servers merge those by their ids.

What was said later stays, even if it is delivered earlier: by another process, or before `sync`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from qitos_mlflow.delivery import OutOfTime
from qitos_mlflow.mlflow_plugin.mapping.assessments import (
    OWN_ID,
    SAID_AT,
    assessment_of,
    metric_of,
)
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.mapping.limits import mapping
from qitos_mlflow.mlflow_plugin.server.transport import PutOff, Refused, Transport
from qitos_mlflow.mlflow_plugin.sink.children import left_s
from qitos_mlflow.mlflow_plugin.sink.operations import Operations
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState

WAIT_S = 5.0
"""How long after it was given a score waits for its trace, which another process may be delivering
(seconds). Nothing that this process records later is delivered meanwhile."""
LOOK_EVERY_S = 0.25
"""Between two looks for it (seconds). It is no outage: the server answers."""
PAUSE_S = 60.0
"""After a score that has waited in vain, none waits for so long (seconds): a client that makes up
ids must not delay the runs of agents."""


class Assessments:
    """The assessments of one server. Used by one thread."""

    def __init__(self, transport: Transport, operations: Operations) -> None:
        self._transport = transport
        self._operations = operations
        self._waits_from = 0.0  # By the monotonic clock.

    def find_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        """Find the run of a trace of which nothing but its id is known."""
        if run_id := trace.waiting.assessments[0].get("run_id"):
            found = self._transport.stored_run(run_id, timeout_s)
            if found is None:
                raise Refused("NO_RUN", f"{self._transport.address} has no run {run_id}")
            trace.facts.settings = {"experiment_id": found.ref.experiment_id}
            trace.run = found.ref
            return
        self._operations.store(trace, self._find_run, trace, timeout_s)
        if trace.run is None:
            raise Refused("NO_TRACE", "the server has no traces, so the run is not known")

    def _find_run(self, trace: TraceState, timeout_s: float) -> None:
        facts, [record, *_] = trace.facts, trace.waiting.assessments
        info = self._info(trace, assessment_of(record)["trace_id"], timeout_s)
        location = mapping(mapping(info.get("trace_location")).get("mlflow_experiment"))
        experiment_id = str(location.get("experiment_id") or "")
        qitos_id = mapping(info.get("tags")).get("qitos.trace_id")
        run_id = mapping(info.get("trace_metadata")).get("mlflow.sourceRun")
        facts.settings = {"experiment_id": experiment_id}
        # Of an agent inside an evaluation of MLflow's, the trace names the evaluation's run.
        runs = self._transport.find_runs(experiment_id, str(qitos_id or ""), timeout_s)
        if not runs and not run_id:  # Spans may come before the info that says it.
            self._wait(trace, timeout_s)
            raise Refused("NO_RUN", "the trace belongs to no run on this server")
        trace.run = runs[0] if runs else RunRef(str(run_id), experiment_id, "", "", 0)

    def write(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Create the assessments of records, or change those that are there."""
        deadline, logs = time.monotonic() + timeout_s, trace.facts.log_traces
        # The spans may be in a trace of MLflow's own tracer. Of a run, the metric is all.
        traced = [
            record
            for record in items
            if (logs or "mlflow_trace_id" in record) and not record.get("run_id")
        ]
        if traced and not trace.tells:
            wanted = [assessment_of(record) for record in traced]
            self._operations.store(trace, self._write, trace, wanted, deadline)
        lost = not (traced and self._operations.stores_traces)
        if lost and any(metric_of(record) is None for record in items):
            raise Refused("NO_TRACE", "only numbers can be logged of a run without a trace")

    def _write(self, trace: TraceState, wanted: Sequence[dict[str, Any]], deadline: float) -> None:
        info = self._info(trace, wanted[0]["trace_id"], left_s(deadline))
        there = {_metadata(one).get(OWN_ID): one for one in info.get("assessments") or ()}
        for one in wanted:
            known = there.get(one["assessment_id"])
            if known is None:
                self._transport.create_assessment(one, left_s(deadline))
            elif _said_at(known) < _said_at(one):
                changed = {**one, "assessment_id": known["assessment_id"]}
                self._transport.update_assessment(changed, left_s(deadline))
            there[one["assessment_id"]] = one

    def _info(self, trace: TraceState, trace_id: str, timeout_s: float) -> Mapping[str, Any]:
        info = self._transport.trace_info(trace_id, timeout_s)
        if info is None:
            self._wait(trace, timeout_s)
            reason = f"{self._transport.address} has no trace {trace_id}"
            raise PutOff("NO_TRACE", f"{reason}; `qitos-mlflow sync` tries it again")
        return info

    def _wait(self, trace: TraceState, timeout_s: float) -> None:
        """Have the call made again in a moment, if it is worth waiting."""
        young = time.time_ns() - trace.facts.last_ns < WAIT_S * 1e9
        if young and time.monotonic() >= self._waits_from:
            time.sleep(min(LOOK_EVERY_S, timeout_s))
            raise OutOfTime
        self._waits_from = time.monotonic() + PAUSE_S


def _metadata(assessment: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(assessment.get("metadata"))


def _said_at(assessment: Mapping[str, Any]) -> int:
    at = str(_metadata(assessment).get(SAID_AT))
    return int(at) if at.isdecimal() else 0
