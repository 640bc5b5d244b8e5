"""What a trace cost, asked of the server once, at its end. The server prices each span as it comes.

A server stops adding up a trace's cost once it has the trace's info, which a trace needs from its
start to be seen and linked. What stays is the cost of the first batch (mlflow 3.12 to 3.17), or one
that counts replays (3.10, 3.11; they also refuse an info without the cost that they know). So the
last info carries the sum. Servers before 3.10 have no prices.
"""

from __future__ import annotations

import logging
import time

import orjson

from qitos_mlflow._guard import log
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import SpanSum
from qitos_mlflow.mlflow_plugin.mapping.span_tree import MAX_PRICED, SpanTree
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused, Transport, equals

MARGIN_MS = 60_000
"""How much earlier than its trace a span may begin, if the clock was set meanwhile."""

KINDS = ("input_cost", "output_cost")
"""MLflow's metrics of one span's cost (USD)."""

TIMEOUT_S = 3.0
"""Longest wait for a sum (seconds)."""
TRIES = 3
"""Failures in a row after which traces are written without their cost: it must delay nothing."""
PAUSE_S = 60.0
"""How long no cost is asked for then (seconds)."""


class TraceCosts:
    """Asks one server what traces cost. Used by one thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._answers = True
        self._failures = 0
        self._asks_at = 0.0

    def metadata(self, tree: SpanTree, experiment_id: str, timeout_s: float) -> dict[str, str]:
        """The metadata that says what a trace cost; empty if the server does not know.

        Raises:
            RetryLater: the server did not say; not more than `TRIES` times in a row.
        """
        if not self._answers or time.monotonic() < self._asks_at:
            return {}
        try:
            cost = trace_cost(self._transport, experiment_id, tree, min(timeout_s, TIMEOUT_S))
        except Refused as refusal:
            self._answers = False
            self._warn(refusal)
            return {}
        except (RetryLater, Poisoned) as failure:
            self._failures += 1
            if self._failures < TRIES:
                # Not its Retry-After: all else waits for this.
                raise RetryLater(f"no cost: {failure}") from failure
            if self._failures == TRIES:
                self._warn(failure)
            self._asks_at = time.monotonic() + PAUSE_S
            return {}
        self._failures = 0
        return {"mlflow.trace.cost": orjson.dumps(cost).decode()} if cost else {}

    def _warn(self, reason: Exception) -> None:
        log(
            logging.WARNING,
            "%s does not say what model calls cost, so traces have no cost: %.200s",
            self._transport.address,
            reason,
        )


def trace_cost(
    transport: Transport, experiment_id: str, tree: SpanTree, timeout_s: float
) -> dict[str, float] | None:
    """The cost in USD of a trace's spans on the server, as MLflow's ``mlflow.trace.cost``.

    None if the server has no price, or if there are more names than `MAX_PRICED` to ask for. Only
    our generations are counted, by their names: provider spans that MLflow's autologging put below
    them have a price too, for the same tokens.

    Raises:
        RetryLater, Poisoned: the server does not answer now.
        Refused: the server does not know what spans cost.
    """
    of_trace = equals("trace.tag.`qitos.trace_id`", tree.facts.trace_id)
    of_spans = [equals("span.name", name) for name in tree.priced]
    if of_trace is None or None in of_spans or len(of_spans) > MAX_PRICED:
        return None
    start_ms = max(0, tree.start_ns // 1_000_000 - MARGIN_MS)
    window_ms = (start_ms, tree.facts.last_ns // 1_000_000 + MARGIN_MS)
    costs = dict.fromkeys(KINDS, 0.0)
    priced = False
    for filters in ([of_trace, of_span] for of_span in of_spans if of_span):
        for kind in KINDS:
            question = SpanSum(experiment_id, kind, filters, window_ms)
            amount = transport.sum_spans(question, timeout_s)
            if amount is None:
                break  # It has no price for this model.
            costs[kind] += amount
            priced = True
    return {**costs, "total_cost": sum(costs.values())} if priced else None
