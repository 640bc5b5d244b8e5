"""The runs of evaluations: found or created, begun and ended.

An evaluation's run is known by its tag `EVALUATION_TAG`. Several processes may create it at once,
and one that could not reach the server may create it late: the oldest one stays, and the children
of the others become its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from qitos_mlflow._guard import warn
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunData, RunRef, StoredRun
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import EVALUATION_TAG, PARENT_TAG, TraceFacts
from qitos_mlflow.mlflow_plugin.server.answers import with_tag
from qitos_mlflow.mlflow_plugin.server.transport import Refused, Transport, equals
from qitos_mlflow.mlflow_plugin.sink.children import Children, Due, Reading, below, left_s
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState

STARTED_TAG = "qitos.evaluation.started"
"""When the evaluation was last begun or resumed (milliseconds since the epoch)."""
OUTPUT_TAG = "qitos.evaluation.output"
"""Where a runner of the host keeps its results: the same if it resumes."""
FIXED_TAGS = (("mlflow.runType", "genai_evaluate"), ("mlflow.source.type", "LOCAL"))
PLACES = ("experiment_name", "experiment_id")
"""What an evaluation's reference says of its experiment."""


class Parents(Children):
    """`Children` that finds and creates the runs of evaluations. Used by one thread."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._evaluations: dict[str, tuple[RunRef, float]] = {}

    # -- the place of a run ------------------------------------------------------------------

    def of(self, facts: TraceFacts, timeout_s: float, fresh_at: float) -> str:
        """As in the base class; a run that is part of an evaluation is its child."""
        if not facts.evaluation or facts.of_evaluation:
            return super().of(facts, timeout_s, fresh_at)
        parent = self.evaluation(facts, timeout_s, fresh_at)
        facts.parent = parent.run_id
        if facts.evaluation.get("places"):
            return parent.experiment_id
        return super().of(facts, timeout_s, fresh_at)

    def evaluation(self, facts: TraceFacts, timeout_s: float, fresh_at: float) -> RunRef:
        """The run of the evaluation that `facts` name, created if there is none."""
        key = str(facts.evaluation.get("id"))
        run, known_at = self._evaluations.get(key, (None, 0.0))
        if run is None or known_at <= fresh_at:
            run = self._given(facts.evaluation, timeout_s)
            run = run or self._find_or_create(facts, timeout_s, fresh_at)
            fresh = {one: known for one, known in self._evaluations.items() if known[1] > fresh_at}
            self._evaluations = {**fresh, key: (run, time.monotonic())}
        return run

    def _given(self, reference: Mapping[str, Any], timeout_s: float) -> RunRef | None:
        """The user's own run in which the evaluation was begun; None if there is none."""
        run_id = str(reference.get("run_id") or "")
        if not run_id:
            return None
        found = self._transport.stored_run(run_id, timeout_s)
        if found is not None:
            return found.ref
        warn(
            "parents.given",
            "%s has no run %r, so the evaluation gets a run of its own; check MLFLOW_RUN_ID and "
            "QITOS_MLFLOW_PARENT_RUN_ID",
            self._transport.address,
            run_id,
        )
        return None

    def _find_or_create(self, facts: TraceFacts, timeout_s: float, fresh_at: float) -> RunRef:
        reference = facts.evaluation
        key, output = str(reference.get("id")), reference.get("output")
        place = {name: reference[name] for name in PLACES if name in reference}
        experiment_id = super().of(TraceFacts(key, place), timeout_s, fresh_at)
        if output and reference.get("resumes"):
            last = self._tagged(OUTPUT_TAG, str(output), experiment_id, timeout_s, order="DESC")
            if last:
                return last[0].ref
        found = self._tagged(EVALUATION_TAG, key, experiment_id, timeout_s)
        if not found:
            tags = [(EVALUATION_TAG, key), *FIXED_TAGS]
            if output:
                tags.append((OUTPUT_TAG, str(output)))
            name = limits.clean_text(reference.get("name") or key, limits.RUN_NAME_CHARS)
            new = NewRun(experiment_id, name, limits.clean_ms(facts.start_ns), tags)
            self._transport.create_run(new, timeout_s)
            # Again, because another process may have created one, too.
            found = self._tagged(EVALUATION_TAG, key, experiment_id, timeout_s)
            if not found:
                raise RetryLater("the server does not show the evaluation's run yet")
        return self._merged([run.ref for run in found], timeout_s)

    def _tagged(
        self, tag: str, text: str, experiment_id: str, timeout_s: float, order: str = "ASC"
    ) -> list[StoredRun]:
        """The runs that we have created with this tag, by start time."""
        wanted = equals(f"tags.`{tag}`", text)
        if wanted is None:
            raise Refused("INVALID_PARAMETER_VALUE", f"no filter can find the evaluation {text!r}")
        found, _ = self._transport.search_runs([experiment_id], wanted, timeout_s, order=order)
        found = with_tag(found, tag, text)
        found.sort(key=lambda run: (run.ref.start_ms, run.ref.run_id), reverse=order == "DESC")
        return found

    def _merged(self, found: Sequence[RunRef], timeout_s: float) -> RunRef:
        """The first of an evaluation's runs; the children of the others become its own."""
        first, *others = found
        for other in others:
            try:
                self._adopt(first, other.run_id, timeout_s)
                self._transport.delete_run(other.run_id, timeout_s)
            except Refused as refusal:  # To delete takes more rights than to edit.
                text = "run %s is another one of evaluation %s and stays: %s"
                warn(f"parents.merge {other.run_id}", text, other.run_id, first.run_id, refusal)
        return first

    def _adopt(self, parent: RunRef, other_id: str, timeout_s: float) -> None:
        reading, tag = Reading(), RunData(tags=[(PARENT_TAG, parent.run_id)])
        while reading.token is not None:
            self.read(reading, below(other_id), [parent.experiment_id], timeout_s)
        for child_id in reading.runs:
            self._transport.log_batch(child_id, tag, timeout_s)

    def settled(
        self, own: StoredRun | None, run_id: str, due: Due, timeout_s: float
    ) -> StoredRun | None:
        """The run that stays, now that others that were created for it are merged into it."""
        experiment_id = own.ref.experiment_id if own else due.experiments[0]
        found = self._tagged(EVALUATION_TAG, due.evaluation, experiment_id, timeout_s)
        if not found:  # It has another id: it was resumed.
            return own
        first = self._merged([run.ref for run in found], timeout_s)
        if own is None:  # Another process has deleted it, before the last child came.
            self._adopt(first, run_id, timeout_s)
        self._evaluations[due.evaluation] = first, time.monotonic()
        return self._transport.stored_run(first.run_id, timeout_s)

    # -- an evaluation begins and ends -------------------------------------------------------

    def begin(self, trace: TraceState, timeout_s: float) -> None:
        """Note the start, and have a resumed run be RUNNING. A run of the user's is left alone."""
        facts, run = trace.facts, _run_of(trace)
        if facts.evaluation.get("run_id") == run.run_id:
            return  # No tag: runs with `EVALUATION_TAG` may be merged, which deletes all but one.
        at_ms = limits.clean_ms(facts.start_ns)
        stored = self._transport.stored_run(run.run_id, timeout_s)
        if stored is not None and stored.end_ms is not None and stored.end_ms <= at_ms:
            self._transport.end_run(run.run_id, "RUNNING", stored.end_ms, timeout_s)
        tags = [(STARTED_TAG, str(max(at_ms, _started_ms(stored))))]
        self._transport.log_batch(run.run_id, RunData(tags=tags), timeout_s)

    def finish(self, trace: TraceState, timeout_s: float) -> None:
        """Write the last numbers and end the run, unless it goes on in another process."""
        facts, run = trace.facts, _run_of(trace)
        deadline = time.monotonic() + timeout_s
        due = self.due.setdefault(run.run_id, Due())
        due.evaluation = str(facts.evaluation.get("id"))
        if run.experiment_id not in due.experiments:
            due.experiments.append(run.experiment_id)
        self.bring(run.run_id, deadline, final=True)
        if facts.evaluation.get("run_id") == run.run_id:
            return  # Its user ends it.
        run, _ = self._evaluations.get(due.evaluation, (run, 0.0))  # They may have been merged.
        stored = self._transport.stored_run(run.run_id, left_s(deadline))
        at_ms = limits.clean_ms(facts.ended_ns)
        if stored is not None and at_ms >= max(stored.end_ms or 0, _started_ms(stored)):
            self._transport.end_run(run.run_id, facts.status, at_ms, left_s(deadline))


def _started_ms(run: StoredRun | None) -> int:
    text = run.tags.get(STARTED_TAG, "") if run else ""
    return int(text) if text.isdecimal() else 0


def _run_of(trace: TraceState) -> RunRef:
    assert trace.run is not None
    return trace.run
