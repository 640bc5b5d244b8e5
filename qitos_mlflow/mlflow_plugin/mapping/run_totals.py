"""What a run's numbers are: each record of a trace becomes metrics, params and tags. Pure.

Receives decoded, redacted records of one trace, in order; hands on `RunData`. The totals of
the trace are kept in a `RunTotals`, which turns to JSON and back, so that delivery goes on in
another process exactly where it stopped. No clock, no threads, no MLflow.

In short: metrics at each span's end are drawn over the agent's step number (the outermost agent's,
where agents are nested), with the span's end as their time; the totals follow when the trace ends,
at the last step. Tool calls are tool and MCP spans, and act spans that name an action (the bridge
never makes both for one call).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qitos_mlflow._usage import parse_usage
from qitos_mlflow.mlflow_plugin.mapping import contributed, limits, params_and_tags
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric
from qitos_mlflow.mlflow_plugin.mapping.limits import (
    clean_key,
    clean_metric,
    clean_ms,
    clean_text,
    mapping,
)
from qitos_mlflow.mlflow_plugin.mapping.percentiles import Sample

MAX_NAMES = 100
"""Tools, and models, with numbers of their own; what comes later counts under `OTHERS`."""
OTHERS = "others"

NAME_CHARS = 200
"""Room for a tool's or model's name in a metric's key."""


@dataclass(frozen=True)
class RunData:
    """What one record adds to its run; `status` and `end_ms` when the run is to end."""

    metrics: list[Metric] = field(default_factory=list)
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)
    status: str | None = None
    end_ms: int | None = None


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

    Args (all of the rest is the state itself):
        constant_tags: tags every run of this destination gets, such as the user's.
        constant_params: params every run of this destination gets, such as the version.
    """

    constant_tags: dict[str, str] = field(default_factory=dict)
    constant_params: dict[str, str] = field(default_factory=dict)
    start_ns: int | None = None
    last_ns: int = 0
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
    lost: Counter[str] = field(default_factory=Counter)

    # -- as JSON -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        plain = dict(vars(self))
        plain["tools"] = {
            name: [tool.calls, tool.errors, tool.latencies.to_json()]
            for name, tool in self.tools.items()
        }
        plain["models"] = {name: list(vars(model).values()) for name, model in self.models.items()}
        plain["params"] = list(self.params)
        plain["lost"] = dict(self.lost)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunTotals:
        """The state that `to_json` described."""
        state = cls(**plain)
        state.tools = {
            name: ToolStats(calls, errors, Sample.from_json(sample))
            for name, (calls, errors, sample) in plain["tools"].items()
        }
        state.models = {name: ModelStats(*numbers) for name, numbers in plain["models"].items()}
        state.params = list(plain["params"])
        state.lost = Counter(plain["lost"])
        return state

    # -- records -----------------------------------------------------------------------------

    def fold(self, record: Mapping[str, Any]) -> RunData:
        """Take in the trace's next record; returns what it adds to the run."""
        added = list(contributed.metrics(record, self.lost))
        tags = contributed.tags(record, self.lost)
        kind, run = record.get("kind"), RunData()
        if kind == "span":
            run = self._fold_span(record)
        elif kind == "trace_start":
            run = self._fold_start(record)
        elif kind == "trace_end":
            run = self._fold_end(record)
        step = record.get("step")
        step = self.last_step if step is None else limits.clean_step(step)
        at_ms = clean_ms(record.get("end_ns") or record.get("time_ns"))
        run.metrics.extend(Metric(key, value, at_ms, step) for key, value in added)
        run.tags.extend(tags)
        return run

    def abandoned(self, last_ns: int | None = None, reason: str = "the process died") -> RunData:
        """The end of a run whose trace will never end: KILLED, with the totals so far.

        Args:
            last_ns: when the process was last known to live; None: its last record.
            reason: goes into the tag ``qitos.killed``.
        """
        end_ns = max(limits.clean_ns(last_ns), self.last_ns)
        tags = [("qitos.killed", clean_text(reason, limits.TAG_CHARS))]
        tags += params_and_tags.ledger_tags(self.spans, self.spans, {}) + params_and_tags.lost_tags(
            self.lost
        )
        return RunData(self._totals(end_ns), [], tags, "KILLED", clean_ms(end_ns))

    def _fold_start(self, record: Mapping[str, Any]) -> RunData:
        self.start_ns = limits.clean_ns(record.get("time_ns"))
        self.last_ns = max(self.last_ns, self.start_ns)
        tags = params_and_tags.start_tags(record, self.lost)
        tags += params_and_tags.cleaned(self.constant_tags, self.lost)
        metadata = mapping(record.get("metadata"))
        return RunData([], self._new_params({**self.constant_params, **metadata}), tags)

    def _fold_end(self, record: Mapping[str, Any]) -> RunData:
        end_ns = limits.clean_ns(record.get("time_ns"))
        self.last_ns = max(self.last_ns, end_ns)
        metadata = mapping(record.get("metadata"))
        status = record.get("status") or "FINISHED"
        metrics = self._totals(end_ns)
        success = metadata.get("success")
        if success is None and status != "FINISHED":
            success = False
        value = clean_metric(success, self.lost, booleans=True)
        if value is not None:
            metrics.append(Metric("success", value, clean_ms(end_ns), self.last_step))
        params = self._new_params({**self.constant_params, **metadata})
        tags = params_and_tags.end_tags(record, self.lost)
        self.lost.update(mapping(record.get("lost")))
        dropped = mapping(record.get("dropped"))
        recorded = record.get("recorded")
        recorded = max(recorded if isinstance(recorded, int) else 0, self.spans)
        tags += params_and_tags.ledger_tags(recorded, self.spans, dropped)
        tags += params_and_tags.lost_tags(self.lost)
        return RunData(metrics, params, tags, status, clean_ms(end_ns))

    def _fold_span(self, record: Mapping[str, Any]) -> RunData:
        data = mapping(record.get("data"))
        start_ns, end_ns = record.get("start_ns"), record.get("end_ns")
        at_ns = limits.clean_ns(end_ns if end_ns is not None else start_ns)
        self.spans += 1
        self.last_ns = max(self.last_ns, at_ns)
        kind = record.get("type")
        step = record.get("step")  # The outermost agent's.
        if step is None and kind == "step":
            step = data.get("step_number")
        step = self.last_step if step is None else limits.clean_step(step)
        self.last_step = max(self.last_step, step)

        run = RunData()
        if record.get("late"):  # So many of this trace ended after it.
            run.tags.append(("qitos.spans.late", str(record["late"])))
        latency_ms = None
        if start_ns is not None and end_ns is not None:
            latency_ms = max(0, limits.clean_ns(end_ns) - limits.clean_ns(start_ns)) / 1e6
        values: dict[str, Any] = {}
        if kind == "generation":
            values = self._generation(data, run)
        elif kind == "step":
            self.steps += 1
            values = {"step/number": data.get("step_number")}
        elif kind == "critic":
            values = {"critic/score": self._score(data.get("score"))}
        elif kind in ("tool", "mcp"):
            name = str(data.get("tool_name") or data.get("server_name") or "unnamed")
            self._tool_call(name, record.get("error") is not None, latency_ms)
            run.tags.append(("tool/name", clean_text(name, limits.TAG_CHARS, self.lost)))
        elif kind == "act" and data.get("action_name"):
            name = _text_of_names(data["action_name"])
            self._tool_call(name, record.get("error") is not None, latency_ms)
            run.tags.append(("action/name", clean_text(name, limits.TAG_CHARS, self.lost)))
        elif kind == "agent":
            run.params.extend(
                self._new_params({"agent_name": data.get("name"), "model_name": data.get("model")})
            )
        if kind in ("generation", "step", "tool"):
            values[f"{kind}/latency_ms"] = latency_ms
        elif kind == "mcp":
            values["tool/latency_ms"] = latency_ms
        for key, value in values.items():
            number = clean_metric(value, self.lost)
            if number is not None:
                run.metrics.append(Metric(key, number, clean_ms(at_ns), step))
        return run

    # -- parts -------------------------------------------------------------------------------

    def _generation(self, data: Mapping[str, Any], run: RunData) -> dict[str, Any]:
        self.generations += 1
        model = data.get("model")
        run.params.extend(self._new_params({"model_name": model}))
        stats = self._named(self.models, str(model), ModelStats) if model else None
        if stats:
            stats.generations += 1
        usage = parse_usage(data.get("token_usage"), self.lost)
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
            self.lost["bad_value"] += 1
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
        key = clean_key(name, NAME_CHARS)
        if key not in table and len(table) >= MAX_NAMES:
            key = OTHERS
        return table.setdefault(key, new()) if key not in table else table[key]

    def _new_params(self, metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
        found = params_and_tags.params(metadata, self.params, self.lost)
        self.params += [key for key, _ in found]
        return found

    def _totals(self, end_ns: int) -> list[Metric]:
        values: dict[str, float] = {
            "total_tokens": self.total_tokens,
            "total_prompt_tokens": self.prompt_tokens,
            "total_completion_tokens": self.completion_tokens,
            "total_generations": self.generations,
            "total_steps": self.steps,
            "total_tool_calls": self.tool_calls,
        }
        if self.start_ns is not None:
            values["duration_s"] = max(0, end_ns - self.start_ns) / 1e9
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
        cleaned = ((key, clean_metric(value, self.lost)) for key, value in values.items())
        return [
            Metric(key, value, at_ms, self.last_step) for key, value in cleaned if value is not None
        ]


def _text_of_names(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
