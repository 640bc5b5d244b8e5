"""A run's numbers: each record of a trace becomes metrics and params. Pure.

Receives decoded, redacted records of one trace, in order; hands on `RunData`. A `RunTotals` keeps
the totals of the trace. It turns to JSON and back, so that delivery goes on in another process
from the same numbers.

Metrics at a span's end have the agent's step number as their step (the outermost agent's, if agents
are nested) and the span's end as their time. The totals follow when the trace ends, at the last
step. `span_kinds` says which metrics a type of span has, and whether it is a tool call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qitos_mlflow._usage import parse_usage
from qitos_mlflow.mlflow_plugin.mapping import contributed, limits, params_and_tags
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric, RunData
from qitos_mlflow.mlflow_plugin.mapping.limits import (
    clean_key,
    clean_metric,
    clean_ms,
    clean_text,
    mapping,
)
from qitos_mlflow.mlflow_plugin.mapping.percentiles import Sample
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import Counts, kind_of, read, read_all
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts
from qitos_mlflow.recording.record import Record, SpanEnd, TraceEnd, TraceStart

MAX_NAMES = 100
"""Tools, and models, with numbers of their own; later ones count under `OTHERS`."""
OTHERS = "others"

NAME_IN_KEY_CHARS = 200
"""Longest name of a tool or model in a metric's key (characters)."""


@dataclass
class ToolStats:
    """Calls of one tool."""

    calls: int = 0
    errors: int = 0
    latencies: Sample = field(default_factory=Sample)


@dataclass
class ModelStats:
    """Tokens of one model."""

    prompt: int = 0
    completion: int = 0
    total: int = 0
    generations: int = 0


@dataclass
class RunTotals:
    """Totals of one trace so far. Its size is bounded, however long the trace.

    Attributes:
        facts: the trace's facts; they take in each record first.
        last_step: the highest step of its spans.
        params: keys of the params that are written.
    """

    facts: TraceFacts = field(default_factory=TraceFacts)
    last_step: int = 0
    spans: int = 0
    steps: int = 0
    generations: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    scores: int = 0
    score_sum: float = 0.0
    score_min: float = 0.0
    score_max: float = 0.0
    tools: dict[str, ToolStats] = field(default_factory=dict)
    models: dict[str, ModelStats] = field(default_factory=dict)
    params: list[str] = field(default_factory=list)

    # -- as JSON -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The totals as plain JSON values, without the facts."""
        plain = {name: value for name, value in vars(self).items() if name != "facts"}
        plain["tools"] = {
            name: [tool.calls, tool.errors, tool.latencies.to_json()]
            for name, tool in self.tools.items()
        }
        plain["models"] = {name: list(vars(model).values()) for name, model in self.models.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], facts: TraceFacts) -> RunTotals:
        """The totals that `to_json` described."""
        state = cls(facts, **plain)
        state.tools = {
            name: ToolStats(calls, errors, Sample.from_json(sample))
            for name, (calls, errors, sample) in plain["tools"].items()
        }
        state.models = {name: ModelStats(*numbers) for name, numbers in plain["models"].items()}
        return state

    # -- records -----------------------------------------------------------------------------

    def fold(self, record: Record) -> RunData:
        """Take in the trace's next record; returns what it adds to the run beside its tags."""
        added = list(contributed.metrics(record, self.facts.lost))
        fields: Mapping[str, Any] = record
        run = RunData()
        if record["kind"] == "span":
            run = self._fold_span(record)
        elif record["kind"] == "trace_start":
            run = RunData(params=self._trace_params(record))
        elif record["kind"] == "trace_end":
            run = self._fold_end(record)
        step = fields.get("step")
        step = self.last_step if step is None else limits.clean_step(step)
        at_ms = clean_ms(fields.get("end_ns") or fields.get("time_ns"))
        run.metrics.extend(Metric(key, value, at_ms, step) for key, value in added)
        return run

    def killed(self) -> RunData:
        """What ends the run of a trace that the facts say was killed: the totals so far."""
        return RunData(self._totals(), [], self._accounts())

    def ledger(self, missing: Mapping[str, int]) -> list[tuple[str, str]]:
        """The run's account of its spans.

        Args:
            missing: how many of the spans seen here are not on the server, by reason.
        """
        delivered = max(0, self.spans - sum(missing.values()))
        dropped = {**self.facts.dropped, **missing}
        recorded = max(self.facts.recorded, self.spans)
        return params_and_tags.ledger_tags(recorded, delivered, dropped)

    def _accounts(self) -> list[tuple[str, str]]:
        return self.ledger({}) + params_and_tags.lost_tags(self.facts.lost)

    def _fold_end(self, record: TraceEnd) -> RunData:
        facts = self.facts
        metrics = self._totals()
        success = mapping(record.get("metadata")).get("success")
        if success is None and facts.status != "FINISHED":
            success = False
        value = clean_metric(success, facts.lost, booleans=True)
        if value is not None:
            metrics.append(Metric("success", value, clean_ms(facts.ended_ns), self.last_step))
        params = self._trace_params(record)
        facts.lost.update(mapping(record.get("lost")))
        return RunData(metrics, params, self._accounts())

    def _fold_span(self, record: SpanEnd) -> RunData:
        data, kind = mapping(record.get("data")), kind_of(record)
        start_ns, end_ns = record.get("start_ns"), record.get("end_ns")
        at_ms = clean_ms(end_ns if end_ns is not None else start_ns)
        self.spans += 1
        step = record.get("step")  # The outermost agent's.
        if step is None and kind.counts is Counts.STEP:
            step = data.get("step_number")
        step = self.last_step if step is None else limits.clean_step(step)
        self.last_step = max(self.last_step, step)

        run = RunData(params=self._new_params(read_all(kind.params, data)))
        if record.get("late"):  # How many spans have ended after their trace.
            run.tags.append(("qitos.spans.late", str(record["late"])))
        latency_ms = None
        if start_ns is not None and end_ns is not None:
            latency_ms = max(0, limits.clean_ns(end_ns) - limits.clean_ns(start_ns)) / 1e6
        if tool := read(kind.tool, data):
            self._tool_call(tool, record.get("error") is not None, latency_ms)
            name = clean_text(tool, limits.TAG_CHARS, self.facts.lost)
            run.tags.append((kind.tool_tag, name))
        values = {**read_all(kind.metrics, data), **self._count(kind.counts, data)}
        if kind.latency:
            values[kind.latency] = latency_ms
        for key, value in values.items():
            number = clean_metric(value, self.facts.lost)
            if number is not None:
                run.metrics.append(Metric(key, number, at_ms, step))
        return run

    # -- parts -------------------------------------------------------------------------------

    def _count(self, counts: Counts, data: Mapping[str, Any]) -> dict[str, Any]:
        """Count what spans of this type count; returns metrics of the span's end."""
        if counts is Counts.STEP:
            self.steps += 1
        elif counts is Counts.MODEL_CALL:
            return self._model_call(data)
        elif counts is Counts.VERDICT:
            return {"critic/score": self._score(data.get("score"))}
        return {}

    def _model_call(self, data: Mapping[str, Any]) -> dict[str, Any]:
        self.generations += 1
        model = data.get("model")
        stats = self._named(self.models, str(model), ModelStats) if model else None
        if stats:
            stats.generations += 1
        usage = parse_usage(data.get("token_usage"), self.facts.lost)
        if usage is None:
            return {}
        prompt, completion = usage.prompt or 0, usage.completion or 0
        total = prompt + completion if usage.total is None else usage.total
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.total_tokens += total
        if stats:
            stats.prompt += prompt
            stats.completion += completion
            stats.total += total
        return {
            "generation/prompt_tokens": usage.prompt,
            "generation/completion_tokens": usage.completion,
            "generation/total_tokens": usage.total,
        }

    def _score(self, raw: Any) -> float | None:
        if raw is None:
            return None
        score = None if isinstance(raw, str) else clean_metric(raw, None)
        if score is None:
            self.facts.lost["bad_value"] += 1
            return None
        self.score_min = min(self.score_min, score) if self.scores else score
        self.score_max = max(self.score_max, score) if self.scores else score
        self.scores += 1
        self.score_sum += score
        return score

    def _tool_call(self, name: str, failed: bool, latency_ms: float | None) -> None:
        self.tool_calls += 1
        self.tool_errors += failed
        stats = self._named(self.tools, name, ToolStats)
        stats.calls += 1
        stats.errors += failed
        if latency_ms is not None:
            stats.latencies.add(latency_ms)

    @staticmethod
    def _named(table: dict[str, Any], name: str, new: Any) -> Any:
        key = clean_key(name, NAME_IN_KEY_CHARS)
        if key not in table and len(table) >= MAX_NAMES:
            key = OTHERS
        return table.setdefault(key, new()) if key not in table else table[key]

    def _trace_params(self, record: TraceStart | TraceEnd) -> list[tuple[str, str]]:
        version = {"qitos_mlflow_version": self.facts.settings.get("plugin_version")}
        return self._new_params({**version, **mapping(record.get("metadata"))})

    def _new_params(self, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
        found = params_and_tags.params(metadata, self.params, self.facts.lost)
        self.params += [key for key, _ in found]
        return found

    def _totals(self) -> list[Metric]:
        end_ns = self.facts.ended_ns or 0
        values: dict[str, float] = {
            "total_tokens": self.total_tokens,
            "total_prompt_tokens": self.prompt_tokens,
            "total_completion_tokens": self.completion_tokens,
            "total_generations": self.generations,
            "total_steps": self.steps,
            "total_tool_calls": self.tool_calls,
        }
        if self.facts.started:
            values["duration_s"] = max(0, end_ns - self.facts.start_ns) / 1e9
        if self.tool_calls:
            values["tool/error_rate"] = self.tool_errors / self.tool_calls
        if self.scores:
            values["critic/avg_score"] = self.score_sum / self.scores
            values["critic/min_score"] = self.score_min
            values["critic/max_score"] = self.score_max
        for name, tool in sorted(self.tools.items()):
            values[f"tool/{name}/calls"] = tool.calls
            values[f"tool/{name}/errors"] = tool.errors
            p95 = tool.latencies.percentile(0.95)
            if p95 is not None:
                values[f"tool/{name}/p95_latency_ms"] = p95
        for name, model in sorted(self.models.items()):
            values[f"model/{name}/generations"] = model.generations
            values[f"model/{name}/prompt_tokens"] = model.prompt
            values[f"model/{name}/completion_tokens"] = model.completion
            values[f"model/{name}/total_tokens"] = model.total
        at_ms = clean_ms(end_ns)
        # A sum of scores can overflow although each of them did not.
        cleaned = ((key, clean_metric(value, self.facts.lost)) for key, value in values.items())
        return [
            Metric(key, value, at_ms, self.last_step) for key, value in cleaned if value is not None
        ]
