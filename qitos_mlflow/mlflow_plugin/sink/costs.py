"""Asks the server what a trace cost, once, at the trace's end.

The server prices each span as it comes, and stops adding up a trace's cost once it has the trace's
info, which a trace needs from its start to be seen and linked. What stays is the cost of the first
batch (mlflow 3.12 to 3.17), or one that counts replays (3.10, 3.11; they also refuse an info
without the cost that they know). So the last info carries the sum. Servers before 3.10 have no
prices.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping

from qitos_mlflow import _json
from qitos_mlflow._guard import log
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.span_tree import MAX_PRICED, SpanTree
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused, Transport, equals

METRICS = ("input_cost", "output_cost")
"""MLflow's metrics of one span's cost (USD)."""
TOKENS = ("input_tokens", "output_tokens")
"""What each of them is for."""
EXACT = 1e-9
"""Largest relative difference of sums that are the same but for the order of their terms."""
MAX_PRICES = 100
"""Most prices that are remembered."""
MARGIN_MS = 60_000
"""How much earlier than its trace a span may begin, if the clock was set meanwhile."""
TIMEOUT_S = 3.0
"""Longest wait for a sum (seconds)."""
TRIES = 3
"""Failures in a row after which traces are written without their cost: it must delay nothing."""
PAUSE_S = 60.0
"""How long no cost is asked for then (seconds)."""


class Costs:
    """What the traces of one sink cost. Used by one thread.

    Args:
        transport: asks the server.

    Attributes:
        totals: what was found (USD), by the trace's id, until someone clears it.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.totals: dict[str, float] = {}
        self._failures = 0
        self._asks_at = 0.0
        self._prices: dict[str, list[float]] = {}
        """USD for a token of input and for one of output, by the name of a generation."""

    def of(self, tree: SpanTree, experiment_id: str, timeout_s: float) -> dict[str, str]:
        """The metadata that says what a trace cost; empty if the server does not know.

        Raises:
            RetryLater: the server did not say; not more than `TRIES` times in a row.
        """
        if time.monotonic() < self._asks_at:
            return {}
        try:
            longest_s = min(timeout_s, TIMEOUT_S * self._transport.patience)
            cost = self._sum(tree, experiment_id, longest_s)
        except (RetryLater, Poisoned, Refused) as failure:
            never = isinstance(failure, Refused)
            self._failures = TRIES if never else self._failures + 1
            if self._failures < TRIES:
                # Not its Retry-After: all else waits for this.
                raise RetryLater(f"no cost: {failure}") from failure
            if self._failures == TRIES:
                text = "%s does not say what model calls cost, so traces have no cost: %.200s"
                log(logging.WARNING, text, self._transport.address, failure)
            self._asks_at = math.inf if never else time.monotonic() + PAUSE_S
            return {}
        self._failures = 0
        if not cost:
            return {}
        self.totals[tree.facts.trace_id] = cost["total_cost"]
        return {"mlflow.trace.cost": _json.dumps(cost).decode()}

    def _sum(self, tree: SpanTree, experiment_id: str, timeout_s: float) -> dict[str, float]:
        """The cost in USD of a trace's spans on the server, as MLflow's ``mlflow.trace.cost``.

        Empty if the server has no price, or if there are more names than `MAX_PRICED` to ask for.
        Only our generations are counted, by their names: provider spans that MLflow's autologging
        put below them have a price too, for the same tokens.
        """
        of_trace = equals("trace.tag.`qitos.trace_id`", tree.facts.trace_id)
        of_spans = [equals("span.name", name) for name in tree.priced]
        if of_trace is None or None in of_spans or len(of_spans) > MAX_PRICED:
            return {}
        question = {
            "experiment_ids": [experiment_id],
            "start_time_ms": max(0, tree.start_ns // 1_000_000 - MARGIN_MS),
            "end_time_ms": tree.facts.last_ns // 1_000_000 + MARGIN_MS,
        }

        def ask(metric: str, of_span: str | None) -> float | None:
            asked = {**question, "metric_name": metric, "filters": [of_trace, of_span]}
            return self._transport.sum_spans(asked, timeout_s)

        if expected := self._expected(tree):
            # The same prices as last time? Then one question is enough.
            total, amount = sum(expected), ask("total_cost", of_spans[0])
            if amount is None:
                return {}
            if math.isclose(total, amount, rel_tol=EXACT):
                return {**dict(zip(METRICS, expected, strict=True)), "total_cost": amount}
        costs: dict[str, float] = {}
        for of_span in of_spans:
            for metric in METRICS:
                amount = ask(metric, of_span)
                if amount is None:
                    break  # It has no price for this model.
                costs[metric] = costs.get(metric, 0.0) + amount
        if not costs:
            return {}
        found = {**dict.fromkeys(METRICS, 0.0), **costs}
        self._learn(tree, found)
        return {**found, "total_cost": sum(found.values())}

    def _expected(self, tree: SpanTree) -> list[float] | None:
        """What the trace costs if each token costs as much as it did before; None: not known."""
        prices = self._prices.get(tree.priced[0]) if _is_plain(tree) else None
        return prices and [
            tree.usage[key] * price for key, price in zip(TOKENS, prices, strict=True)
        ]

    def _learn(self, tree: SpanTree, costs: Mapping[str, float]) -> None:
        if _is_plain(tree):
            if len(self._prices) >= MAX_PRICES:
                self._prices.clear()
            pairs = zip(METRICS, TOKENS, strict=True)
            self._prices[tree.priced[0]] = [costs[one] / tree.usage[key] for one, key in pairs]


def _is_plain(tree: SpanTree) -> bool:
    """Whether what a trace costs may say what a token does: one model, and nothing is cached."""
    usage = tree.usage
    plain = usage.keys() == {*TOKENS, "total_tokens"} and all(usage.values())
    return len(tree.priced) == 1 and plain
