"""What a trace cost, asked of the server: it has the prices, and prices each span as it comes.

A server stops adding up a trace's cost once it has the trace's info, which a trace needs from
its start to be seen and linked: what stays is the cost of the first batch (mlflow 3.12 to 3.17), or
one that counts replays (3.10, 3.11). So the sum is asked for when the trace ends, and sent with its
last info. Servers before 3.10 have no prices.
"""

from __future__ import annotations

from collections.abc import Sequence

from qitos_mlflow import _guard
from qitos_mlflow.mlflow_plugin.transport import Poisoned, Refused, Transport

MARGIN_MS = 60_000
"""Spans may begin before their trace where somebody set the clock."""

KINDS = ("input_cost", "output_cost")
"""MLflow's metrics of one span's cost (USD)."""


def trace_cost(
    transport: Transport,
    experiment_id: str,
    qitos_trace_id: str,
    names: Sequence[str],
    times_ms: tuple[int, int],
    timeout_s: float,
) -> dict[str, float] | None:
    """The cost of a trace's spans in USD, as MLflow's ``mlflow.trace.cost``; None if unknown.

    Args:
        transport: where its spans are.
        experiment_id: its experiment.
        qitos_trace_id: the trace, by its tag ``qitos.trace_id``.
        names: of the spans to count; empty for all. Provider spans that MLflow's autologging put
            below ours have a price too, of the same tokens.
        times_ms: its start and end, milliseconds since the epoch.
        timeout_s: of each request.

    Raises:
        RetryLater: the server cannot be reached now.
    """
    of_trace = _equals("trace.tag.`qitos.trace_id`", qitos_trace_id)
    of_spans = [_equals("span.name", name) for name in names] or [""]
    if not of_trace or None in of_spans:
        return None
    window = (max(0, times_ms[0] - MARGIN_MS), times_ms[1] + MARGIN_MS)
    costs = dict.fromkeys(KINDS, 0.0)
    priced = False
    try:
        for of_span in of_spans:
            filters = [of_trace, of_span] if of_span else [of_trace]
            for kind in KINDS:
                amount = transport.sum_spans(experiment_id, kind, filters, window, timeout_s)
                if amount is None:
                    break  # It knows no price for this model.
                costs[kind] += amount
                priced = True
    except (Refused, Poisoned) as refusal:
        _guard.warn(
            "cost.refused", "traces have no cost: the server does not tell (%s)", str(refusal)[:200]
        )
        return None
    return {**costs, "total_cost": sum(costs.values())} if priced else None


def _equals(field: str, text: str) -> str | None:
    """A filter, None for a text that MLflow's filters cannot hold."""
    for quote in ("'", '"'):
        if quote not in text:
            return f"{field} = {quote}{text}{quote}"
    return None
