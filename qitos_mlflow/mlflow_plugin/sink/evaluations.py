"""`Operations` for runs that are part of an evaluation, or of a run of the user's.

An evaluation is kept like a trace without spans, whose run is the parent of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric
from qitos_mlflow.mlflow_plugin.sink.children import Due
from qitos_mlflow.mlflow_plugin.sink.operations import Operations
from qitos_mlflow.mlflow_plugin.sink.parents import Parents
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState

Listed = tuple[TraceState, Any, list[Any]]
"""What a `Call` is made of."""


class EvaluationOperations(Operations):
    """The calls of one sink, those about evaluations and parents included. Used by one thread."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parents = self._experiments = Parents(self._transport)

    def restore(self, due: Any) -> None:
        """Go back to the parents whose numbers were not written yet."""
        self.parents.due = {run_id: Due(**one) for run_id, one in limits.mapping(due).items()}

    def listed(self, traces: Iterable[TraceState]) -> list[Listed]:
        """The calls for what traces add to evaluations and parents. The last ones are made."""
        self._costs.totals.clear()  # Of runs whose end was refused.
        traces = list(traces)
        sets = [(trace, one) for trace in traces for one in trace.waiting.datasets]
        calls: list[Listed] = [(trace, self.log_dataset, [one]) for trace, one in sets]
        noted = [trace for trace in traces if trace.waiting.counts]
        return calls + [(trace, self.note, ["numbers"]) for trace in noted]

    def log(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """As in the base class; with the run's cost, once that is known."""
        if (cost := self._costs.totals.get(trace.facts.trace_id)) is not None:
            at_ms = limits.clean_ms(trace.facts.ended_ns)
            items = [*items, ("metric", Metric("total_cost", cost, at_ms, trace.totals.last_step))]
        super().log(trace, items, timeout_s)

    def note(self, trace: TraceState, _items: Any, _timeout_s: float) -> None:
        """See `Parents.note`."""
        self.parents.note(trace)

    def log_dataset(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        """Say what an evaluation's run evaluates on."""
        assert trace.run is not None
        self._transport.log_dataset(trace.run.run_id, items[0], timeout_s)

    def _find_or_create(self, trace: TraceState, timeout_s: float, *, bare: bool) -> None:
        if not trace.facts.of_evaluation:
            super()._find_or_create(trace, timeout_s, bare=bare)
            return
        trace.run = self.parents.evaluation(trace.facts, timeout_s, self._fresh_at)
        if trace.facts.started:
            self.parents.begin(trace, timeout_s)
        trace.settle()

    def end_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        """As in the base class; of an evaluation with the last numbers."""
        if trace.facts.of_evaluation:
            self.parents.finish(trace, timeout_s)
        else:
            super().end_run(trace, _items, timeout_s)
