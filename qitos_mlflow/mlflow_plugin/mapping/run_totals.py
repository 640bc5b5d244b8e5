"""A run's numbers and params: each record of a trace becomes metrics, params and tags. Pure.

Receives decoded, redacted records of one trace, in order; adds to `RunData`. A `RunTotals` keeps
the totals of the trace, as plain values, so that delivery goes on in another process from the same
numbers.

Metrics at a span's end have the agent's step number as their step (the outermost agent's, if agents
are nested) and the span's end as their time. The totals follow when the trace ends, at the last
step. `span_kinds` says which metrics a type of span has, and whether it is a tool call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qitos_mlflow._usage import parse_usage
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric, RunData
from qitos_mlflow.mlflow_plugin.mapping.limits import (
    PARAM_CHARS,
    clean_key,
    clean_metric,
    clean_ms,
    clean_text,
    mapping,
)
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import kind_of, read, read_all
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts, added
from qitos_mlflow.recording.record import Record, SpanEnd

TOTALS = ("total_tokens", "total_prompt_tokens", "total_completion_tokens", "total_generations",
          "total_steps", "total_tool_calls")  # fmt: skip
"""Sums that every run has, 0 if there is nothing to add up."""

MAX_NAMES = 100
"""Tools, and models, with numbers of their own; later ones count under `OTHERS`."""
OTHERS = "others"

NAME_IN_KEY_CHARS = 200
"""Longest name of a tool or model in a metric's key (characters)."""

SAMPLE_SIZE = 64
"""Latencies kept of a tool. Up to here percentiles are exact; beyond, those of an even sample."""

MAX_PARAMS = 500
"""Params of one run; metadata beyond is counted as ``too_many_params``."""

MAX_NESTING = 8
"""Levels of nested metadata that become params."""

_NOT_PARAMS = frozenset(
    # How the run went: tags, metrics and status. A param is an input of the run.
    {"stop_reason", "final_result", "success", "status", "error", "qitos.closed", "qitos.killed"}
    # Ties to other traces.
    | {"linked_trace_id", "linked_span_id"}
)


@dataclass
class RunTotals:
    """Totals of one trace so far. Its size is bounded, however long the trace.

    Attributes:
        facts: the trace's facts; they take in each record first.
        last_step: the highest step of its spans.
        spans: their number.
        sums: by the name of the metric that each becomes.
        scores: number, sum, lowest and highest of the critics' scores; empty before the first.
        groups: tools and models with numbers of their own, as their metrics' names begin.
        latencies: a sample of each tool's latencies in ms (see `sample`), by its group.
        params: keys of the params that are written.
    """

    facts: TraceFacts
    last_step: int = 0
    spans: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    params: list[str] = field(default_factory=list)

    def fold(self, record: Record, run: RunData) -> None:
        """Take in the trace's next record; what it adds to the run beside its facts goes to `run`.

        Args:
            record: the record.
            run: takes metrics, params and tags.
        """
        fields: Mapping[str, Any] = record
        data, lost = mapping(fields.get("data")), self.facts.lost
        step = fields.get("step")  # The outermost agent's.
        if step is None:
            step = data.get("step_number")
        step = self.last_step if step is None else limits.clean_step(step)
        self.last_step = max(self.last_step, step)
        numbers: dict[str, Any] = {}
        if record["kind"] == "span":
            numbers = self._fold_span(record, data, run)
        else:
            version = {"qitos_mlflow_version": self.facts.settings.get("plugin_version")}
            found = {**version, **mapping(fields.get("metadata"))}
            run.params += self._new_params(found)
        if record["kind"] == "trace_end":
            numbers = self._totals(mapping(record.get("metadata")))
        at_ms = clean_ms(fields.get("end_ns") or fields.get("time_ns") or fields.get("start_ns"))
        for key, value in [*numbers.items(), *added(record, "metrics").items()]:
            number = clean_metric(value, lost)
            if number is not None:
                run.metrics.append(Metric(key, number, at_ms, step))
        if record["kind"] == "trace_end":
            lost.update(mapping(record.get("lost")))
            run.tags += self.ledger({})

    def ledger(self, missing: Mapping[str, int]) -> list[tuple[str, str]]:
        """The tags that say what became of the run's spans, and of single values.

        Each span that was seen here counts as delivered. If the server refuses some (dead letters),
        the sink sends these tags again, and the last ones stay.

        Args:
            missing: how many of the spans seen here are not on the server, by reason.
        """
        facts = self.facts
        recorded = max(facts.recorded, self.spans)
        delivered = max(0, self.spans - sum(missing.values()))
        lost = {**facts.dropped, **missing}
        # What the agent did not know of when the trace ended: a damaged line, a deleted file.
        lost["lost_in_spool"] = max(0, recorded - delivered - sum(lost.values()))
        tags = [("qitos.spans.recorded", str(recorded)), ("qitos.spans.delivered", str(delivered))]
        for tag, counts in (("qitos.spans.dropped", lost), ("qitos.values.dropped", facts.lost)):
            found = [f"{reason}={count}" for reason, count in sorted(counts.items()) if count]
            if found:
                tags.append((tag, clean_text(", ".join(found), limits.TAG_CHARS)))
        return tags

    # -- spans -------------------------------------------------------------------------------

    def _fold_span(self, record: SpanEnd, data: Mapping[str, Any], run: RunData) -> dict[str, Any]:
        """Count a span; returns the metrics of its end."""
        kind, start_ns, end_ns = kind_of(record), record.get("start_ns"), record.get("end_ns")
        self.spans += 1
        if kind.params:
            run.params += self._new_params(read_all(kind.params, data))
        if record.get("late"):  # How many spans have ended after their trace.
            run.tags.append(("qitos.spans.late", str(record["late"])))
        latency_ms = None
        if start_ns is not None and end_ns is not None:
            latency_ms = max(0, limits.clean_ns(end_ns) - limits.clean_ns(start_ns)) / 1e6
        if tool := read(kind.tool, data):
            self._count_tool_call(tool, record.get("error") is not None, latency_ms)
            name = clean_text(tool, limits.TAG_CHARS, self.facts.lost)
            run.tags.append((kind.tool_tag, name))
        numbers = read_all(kind.metrics, data)
        if kind.counts == "steps":
            self.sums["total_steps"] += 1
        elif kind.counts == "tokens":
            numbers |= self._count_model_call(data)
        elif kind.counts == "scores":
            numbers["critic/score"] = self._count_score(data.get("score"))
        if kind.latency:
            numbers[kind.latency] = latency_ms
        return numbers

    def _count_tool_call(self, name: str, failed: bool, latency_ms: float | None) -> None:
        tool = self._group(f"tool/{clean_key(name, NAME_IN_KEY_CHARS)}")
        if latency_ms is not None:
            kept = self.latencies.setdefault(tool, [])
            sample(kept, self.sums[f"{tool}/calls"], latency_ms)
        self.sums.update({"total_tool_calls": 1, f"{tool}/calls": 1, f"{tool}/errors": int(failed)})

    def _count_model_call(self, data: Mapping[str, Any]) -> dict[str, Any]:
        usage = parse_usage(data.get("token_usage"), self.facts.lost)
        prompt, completion, total = None, None, None
        if usage is not None:
            prompt, completion, total = usage.prompt, usage.completion, usage.total
        counts = {
            "generations": 1,
            "prompt_tokens": prompt or 0,
            "completion_tokens": completion or 0,
            "total_tokens": (prompt or 0) + (completion or 0) if total is None else total,
        }
        self.sums.update({f"total_{key.removeprefix('total_')}": n for key, n in counts.items()})
        if data.get("model"):
            model = self._group(f"model/{clean_key(str(data['model']), NAME_IN_KEY_CHARS)}")
            self.sums.update({f"{model}/{key}": n for key, n in counts.items()})
        return {
            "generation/prompt_tokens": prompt,
            "generation/completion_tokens": completion,
            "generation/total_tokens": total,
        }

    def _count_score(self, raw: Any) -> float | None:
        if raw is None:
            return None
        score = limits.clean_score(raw)
        number, total, lowest, highest = self.scores or (0, 0.0, math.inf, -math.inf)
        if score is None or math.isinf(total + score):
            self.facts.lost["bad_value"] += 1
            return None
        self.scores = [number + 1, total + score, min(lowest, score), max(highest, score)]
        return score

    def _group(self, group: str) -> str:
        """`group` if it may have numbers of its own, else the one of all others of its kind."""
        if group not in self.groups:
            kind = group.split("/")[0]
            if sum(known.startswith(f"{kind}/") for known in self.groups) >= MAX_NAMES:
                return f"{kind}/{OTHERS}"
            self.groups.append(group)
        return group

    def _new_params(self, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Scalars of `metadata` as params, nested ones by their path (``a.b``); None says nothing.

        MLflow refuses the whole batch that changes a param or names it twice, so the first value of
        a key is the one that stays.
        """
        found, too_many, lost = [], 0, self.facts.lost
        for name, value in _flat(metadata, MAX_NESTING):
            key = clean_key(name)
            if name in _NOT_PARAMS or key in self.params:
                continue
            if len(self.params) >= MAX_PARAMS:
                too_many += 1
                continue
            self.params.append(key)
            found.append((key, clean_text(value, PARAM_CHARS, lost)))
        # Not a sum: a trace's metadata comes again, and more complete, when it ends.
        if too_many > lost["too_many_params"]:
            lost["too_many_params"] = too_many
        return found

    # -- the end -----------------------------------------------------------------------------

    def _totals(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        facts, sums = self.facts, self.sums
        numbers: dict[str, Any] = {**dict.fromkeys(TOTALS, 0), **sums}
        if facts.started:
            began_ns = facts.began_ns or facts.start_ns
            numbers["duration_s"] = max(0, (facts.ended_ns or 0) - began_ns) / 1e9
        if sums["total_tool_calls"]:
            of_tools = (key for key in sums if key.startswith("tool/") and key.endswith("/errors"))
            errors = sum(sums[key] for key in of_tools)
            numbers["tool/error_rate"] = errors / sums["total_tool_calls"]
        if self.scores:
            number, total, lowest, highest = self.scores
            numbers["critic/avg_score"] = total / number
            numbers["critic/min_score"], numbers["critic/max_score"] = lowest, highest
        for tool, kept in self.latencies.items():
            numbers[f"{tool}/p95_latency_ms"] = sorted(kept)[math.ceil(0.95 * len(kept)) - 1]
        numbers["success"] = metadata.get("success")
        if numbers["success"] is None and facts.status != "FINISHED":
            # If its process died, the trace may have been as good as done.
            numbers["success"] = None if "qitos.killed" in metadata else False
        return numbers


def sample(kept: list[float], index: int, value: float) -> None:
    """Keep every n-th number of a stream in `kept`; n doubles whenever there are `SAMPLE_SIZE`.

    The same stream always gives the same sample, because a replay must log the same percentile. A
    random reservoir would not.

    Args:
        kept: the sample so far; changed in place.
        index: how many numbers came before.
        value: the next number.
    """
    if index % (1 << (index // SAMPLE_SIZE).bit_length()) == 0:
        if len(kept) == SAMPLE_SIZE:
            del kept[1::2]
        kept.append(round(value, 3))


def _flat(metadata: Mapping[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in metadata.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if depth > 1:
                yield from _flat(value, depth - 1, f"{name}.")
        elif isinstance(value, list):
            if value and all(isinstance(item, (str, int, float)) for item in value):
                yield name, ", ".join(map(str, value))
        elif isinstance(value, (str, int, float)):  # bool is an int; None says nothing
            yield name, str(value)
