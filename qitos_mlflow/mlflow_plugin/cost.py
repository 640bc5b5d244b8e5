"""What a trace cost, asked of the server: it has the prices, and prices each span as it comes.

A server stops adding up a trace's cost once it has the trace's info, which a trace needs from
its start to be seen and linked: what stays is the cost of the first batch (mlflow 3.12 to 3.17), or
one that counts replays (3.10, 3.11; they also refuse an info without the cost they know). So the
sum is asked for before an info is sent, and sent with it. Servers before 3.10 have no prices.
"""

from __future__ import annotations

from qitos_mlflow.mlflow_plugin.spans import MAX_PRICED, TraceFold
from qitos_mlflow.mlflow_plugin.transport import Transport

MARGIN_MS = 60_000
"""Spans may begin before their trace where somebody set the clock."""

KINDS = ("input_cost", "output_cost")
"""MLflow's metrics of one span's cost (USD)."""


def trace_cost(
    transport: Transport, experiment_id: str, tree: TraceFold, timeout_s: float
) -> dict[str, float] | None:
    """The cost in USD of a trace's spans that are there, as MLflow's ``mlflow.trace.cost``.

    None if the server has no price. Only our generations are counted: provider spans that MLflow's
    autologging put below them have a price too, of the same tokens.

    Raises:
        RetryLater: the server cannot be reached now.
        Refused: the server does not tell what spans cost.
    """
    of_trace = _equals("trace.tag.`qitos.trace_id`", tree.id)
    if not tree.priced or of_trace is None:
        return None
    of_spans = [_equals("span.name", name) for name in tree.priced]
    if len(of_spans) > MAX_PRICED or None in of_spans:
        of_spans = [None]
    start_ms = max(0, tree.start_ns // 1_000_000 - MARGIN_MS)
    window_ms = (start_ms, tree.last_ns // 1_000_000 + MARGIN_MS)
    costs = dict.fromkeys(KINDS, 0.0)
    priced = False
    for of_span in of_spans:
        filters = [of_trace, of_span] if of_span else [of_trace]
        for kind in KINDS:
            amount = transport.sum_spans(experiment_id, kind, filters, window_ms, timeout_s)
            if amount is None:
                break  # It has no price for this model.
            costs[kind] += amount
            priced = True
    return {**costs, "total_cost": sum(costs.values())} if priced else None


def _equals(field: str, text: str) -> str | None:
    """A filter, None for a text that MLflow's filters cannot hold."""
    for quote in ("'", '"'):
        if quote not in text:
            return f"{field} = {quote}{text}{quote}"
    return None
