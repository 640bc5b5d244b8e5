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
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.assessments import OWN_ID, assessment_of, metric_of
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.mapping.limits import mapping
from qitos_mlflow.mlflow_plugin.server.transport import PutOff, Refused, Transport
from qitos_mlflow.mlflow_plugin.sink.operations import Operations
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState

WAIT_S = 5.0
"""How long after it was given a score waits for its trace, which another process may be delivering
(seconds). Nothing that this process records later is delivered meanwhile."""


class Assessments:
    """The assessments of one server. Used by one thread."""

    def __init__(self, transport: Transport, operations: Operations) -> None:
        self._transport = transport
        self._operations = operations

    def find_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        """Find the run of a trace of which nothing but its id is known."""
        if run_id := trace.waiting.assessments[0].get("run_id"):
            found = self._transport.find_run(run_id, timeout_s)
            if found is None:
                raise Refused("NO_RUN", f"{self._transport.address} has no run {run_id}")
            trace.facts.settings = {"experiment_id": found.experiment_id}
            trace.run = RunRef(run_id, found.experiment_id, "", "", 0)
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
        if not runs and not run_id:
            raise Refused("NO_RUN", "the trace belongs to no run on this server")
        trace.run = runs[0] if runs else RunRef(str(run_id), experiment_id, "", "", 0)

    def write(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Create the assessment of a record, or change the one that is there."""
        [record] = items
        if record.get("run_id"):
            return  # The run's metric is all of it.
        # The spans may be in a trace of MLflow's own tracer.
        traced = trace.facts.log_traces or "mlflow_trace_id" in record
        if traced:
            self._operations.store(trace, self._write, trace, assessment_of(record), timeout_s)
        if metric_of(record) is None and not (traced and self._operations.stores_traces):
            raise Refused("NO_TRACE", "only numbers can be logged of a run without a trace")

    def _write(self, trace: TraceState, wanted: dict[str, Any], timeout_s: float) -> None:
        own = wanted["assessment_id"]
        for there in self._info(trace, wanted["trace_id"], timeout_s).get("assessments") or ():
            if own in (there.get("assessment_id"), mapping(there.get("metadata")).get(OWN_ID)):
                if not _says_the_same(there, wanted):
                    changed = {**wanted, "assessment_id": there["assessment_id"]}
                    self._transport.update_assessment(changed, timeout_s)
                return
        self._transport.create_assessment(wanted, timeout_s)

    def _info(self, trace: TraceState, trace_id: str, timeout_s: float) -> Mapping[str, Any]:
        info = self._transport.trace_info(trace_id, timeout_s)
        if info is None:
            reason = f"{self._transport.address} has no trace {trace_id}"
            if time.time_ns() - trace.facts.last_ns < WAIT_S * 1e9:
                raise RetryLater(reason)
            raise PutOff("NO_TRACE", f"{reason}; `qitos-mlflow sync` tries it again")
        return info


def _says_the_same(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    parts = ("feedback", "expectation", "rationale")
    same = all((there.get(part) or None) == (wanted.get(part) or None) for part in parts)
    return same and wanted["metadata"].items() <= mapping(there.get("metadata")).items()
