"""One row for each type of span: its MLflow type, its name, what it shows and what it counts. Pure.

To add a span type, add a row here and a data class in `tracing.span_data`. A type without a row is
shown whole and counted as a span only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qitos_mlflow.mlflow_plugin.mapping.limits import mapping
from qitos_mlflow.recording.record import SpanEnd

Data = Mapping[str, Any]
Source = str | Callable[[Data], Any]
"""A field of the span's data, or a function of the data."""


def _everything(data: Data) -> Data | None:
    found = {key: value for key, value in data.items() if key != "output_content"}
    return {key: value for key, value in found.items() if value is not None} or None


@dataclass(frozen=True)
class SpanKind:
    """How spans of one type are shown and counted.

    Attributes:
        mlflow_type: MLflow's span type; None: QitOS's type in capitals.
        name: what the tree calls a span that has no name of its own.
        title: what the tree calls a span whatever its name, unless this gives None.
        inputs: shown as the span's inputs.
        output: shown as the span's outputs; if it gives None, the span's output is.
        attributes: further attributes of the span.
        metrics: metrics of the run at the span's end.
        latency: metric of the run that the span's duration becomes (milliseconds), if any.
        params: params of the run; the first value of each stays.
        tool: name of the tool that the span is a call of; None: it is no tool call.
        tool_tag: tag of the run that gets that name.
        counts: what else it adds to the run's numbers: a step of the agent; a model call and its
            tokens; a critic's score, which is also feedback on the trace.
    """

    mlflow_type: str | None = None
    name: Source = "name"
    title: Source | None = None
    inputs: Source = _everything
    output: Source = "output_content"
    attributes: Mapping[str, Source] = field(default_factory=dict)
    metrics: Mapping[str, Source] = field(default_factory=dict)
    latency: str | None = None
    params: Mapping[str, Source] = field(default_factory=dict)
    tool: Source | None = None
    tool_tag: str = "tool/name"
    counts: Literal["steps", "tokens", "scores"] | None = None


def read(source: Source | None, data: Data) -> Any:
    """What `source` gives of a span's data; None for no source."""
    if source is None or isinstance(source, str):
        return data.get(source) if source else None
    return source(data)


def read_all(sources: Mapping[str, Source], data: Data) -> dict[str, Any]:
    """What each of `sources` gives, by its name."""
    return {name: read(source, data) for name, source in sources.items()}


def kind_of(record: SpanEnd) -> SpanKind:
    """The row of a span's type."""
    try:
        return SPAN_KINDS[record["type"]]
    except (KeyError, TypeError):  # None, or damaged: a list.
        return OTHER


def span_name(record: SpanEnd) -> str:
    """What the tree shows: ``step 3``, the model, the tool, the critic, or the span's type."""
    kind, data = kind_of(record), mapping(record.get("data"))
    name = read(kind.title, data) or record.get("name") or read(kind.name, data)
    return str(name or record.get("type") or "span")


# -- sources -------------------------------------------------------------------------------------


def _task(data: Data) -> Data | None:
    return None if data.get("task") is None else {"task": data["task"]}


def _step_title(data: Data) -> str | None:
    return None if data.get("step_number") is None else f"step {data['step_number']}"


def _actions(data: Data) -> str | None:
    names = data.get("action_name")
    return ", ".join(map(str, names)) if isinstance(names, list) else names and str(names)


def _tool(data: Data) -> str:
    return str(data.get("tool_name") or data.get("server_name") or "unnamed")


def _server_and_tool(data: Data) -> str | None:
    server, tool = data.get("server_name"), data.get("tool_name")
    return f"{server}/{tool}" if server and tool else None


def _handoff(data: Data) -> str | None:
    giver, taker = data.get("from_agent"), data.get("to_agent")
    return f"{giver or '?'} → {taker or '?'}" if giver or taker else None


def _decision(data: Data) -> Any:
    return data.get("output_content") if data.get("decision") is None else data["decision"]


OTHER = SpanKind()
"""Types of later hosts: everything that is there."""

_TOOL_CALL = SpanKind(
    "TOOL", name="tool_name", inputs="tool_args", latency="tool/latency_ms", tool=_tool
)
_STAGE = SpanKind("CHAIN", inputs="input_content", attributes={"qitos.input_count": "input_count"})
"""A stage of the agent's step, from its input to its output."""

SPAN_KINDS: Mapping[str, SpanKind] = {
    "agent": SpanKind(
        "AGENT",
        inputs=_task,
        attributes={"qitos.model": "model", "qitos.tools": "tools"},
        params={"agent_name": "name", "model_name": "model"},
    ),
    "step": SpanKind(
        "CHAIN",
        title=_step_title,
        inputs="observation",
        output=_decision,
        metrics={"step/number": "step_number"},
        latency="step/latency_ms",
        counts="steps",
    ),
    "decide": _STAGE,
    "generation": SpanKind(
        "CHAT_MODEL",
        name="model",
        inputs="input_content",  # As a conversation: see `span_attributes`.
        latency="generation/latency_ms",
        params={"model_name": "model"},
        counts="tokens",
    ),
    "act": SpanKind(
        "CHAIN", name=_actions, inputs="tool_args", tool=_actions, tool_tag="action/name"
    ),
    "tool": _TOOL_CALL,
    "mcp": replace(_TOOL_CALL, title=_server_and_tool),
    "reduce": _STAGE,
    "critic": SpanKind(
        "EVALUATOR",
        name="critic_name",
        inputs="input_content",
        attributes={"qitos.score": "score"},
        counts="scores",
    ),
    "handoff": SpanKind("AGENT", title=_handoff),
    "delegate": SpanKind("AGENT"),
    "fanout": SpanKind("CHAIN"),
    "parse": SpanKind("PARSER"),
    "guardrail": SpanKind("GUARDRAIL"),
    "custom": SpanKind("UNKNOWN", inputs="data"),
}
