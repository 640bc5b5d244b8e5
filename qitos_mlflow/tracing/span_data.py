"""What a span is about: one small class for each kind of span, with plain attributes.

`export` returns a dict of ``type`` and the fields. Values are kept as given, neither copied nor
checked. A class that is added here is part of the tracing API without any further list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import Any, ClassVar


class SpanType(str, Enum):
    """The kinds of spans. `DELEGATE`, `FANOUT`, `PARSE` and `GUARDRAIL` have no class here."""

    AGENT = "agent"
    STEP = "step"
    DECIDE = "decide"
    ACT = "act"
    REDUCE = "reduce"
    CRITIC = "critic"
    TOOL = "tool"
    HANDOFF = "handoff"
    DELEGATE = "delegate"
    FANOUT = "fanout"
    PARSE = "parse"
    GENERATION = "generation"
    GUARDRAIL = "guardrail"
    MCP = "mcp"
    CUSTOM = "custom"


class SpanData(ABC):
    """Base of every span's data; derive from it for kinds of your own."""

    @property
    @abstractmethod
    def type(self) -> str:
        """The kind of span, one of `SpanType`'s values or a word of your own."""

    @abstractmethod
    def export(self) -> dict[str, Any]:
        """A new dict of ``type`` and the fields; the values are the live ones, not copies."""


class _FieldSpanData(SpanData):
    """Exports its dataclass fields; those in `left_out` only if they are not None."""

    kind: ClassVar[SpanType]
    left_out: ClassVar[frozenset[str]] = frozenset()

    @property
    def type(self) -> str:
        return self.kind.value

    def export(self) -> dict[str, Any]:
        exported: dict[str, Any] = {"type": self.type}
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            exported[name] = getattr(self, name)
        for name in self.left_out:
            if exported[name] is None:
                del exported[name]
        return exported


# No generated __repr__: a span in a log line must not show its content. No generated __eq__:
# spans of equal content are still different spans.
# (Spelled out each time: type checkers do not follow an alias of `dataclass`.)


@dataclass(eq=False, repr=False)
class AgentSpanData(_FieldSpanData):
    """One run of an agent; `tools` are names."""

    kind = SpanType.AGENT
    left_out = frozenset({"task"})
    name: str
    _: KW_ONLY
    model: str | None = None
    tools: list[str] | None = None
    output_type: str | None = None
    task: Any = field(default=None, init=False)
    """Its task, if the metadata of its trace does not have it; not on every host."""

    def __post_init__(self) -> None:
        self.tools = self.tools or []


@dataclass(eq=False, repr=False)
class StepSpanData(_FieldSpanData):
    """One turn of the agent's loop; `step_number` counts as the engine counts."""

    kind = SpanType.STEP
    step_number: int
    _: KW_ONLY
    observation: Any = None
    decision: Any = None


@dataclass(eq=False, repr=False, kw_only=True)
class DecideSpanData(_FieldSpanData):
    """The way from an observation to a decision."""

    kind = SpanType.DECIDE
    input_content: Any = None
    output_content: Any = None
    model_response: dict[str, Any] | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class GenerationSpanData(_FieldSpanData):
    """One call of a language model; `token_usage` holds real counts or is None."""

    kind = SpanType.GENERATION
    model: str | None = None
    input_content: Any = None
    output_content: Any = None
    model_response: dict[str, Any] | None = None
    token_usage: dict[str, int] | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class ActSpanData(_FieldSpanData):
    """Carrying out a decision's actions."""

    kind = SpanType.ACT
    action_name: str | None = None
    tool_args: dict[str, Any] | None = None
    output_content: Any = None


@dataclass(eq=False, repr=False, kw_only=True)
class ToolSpanData(_FieldSpanData):
    """One call of a tool."""

    kind = SpanType.TOOL
    tool_name: str
    tool_args: dict[str, Any] | None = None
    output_content: Any = None


@dataclass(eq=False, repr=False, kw_only=True)
class ReduceSpanData(_FieldSpanData):
    """Merging results into the agent's state; `input_count` is their number."""

    kind = SpanType.REDUCE
    input_count: int = 0
    output_content: Any = None


@dataclass(eq=False, repr=False, kw_only=True)
class CriticSpanData(_FieldSpanData):
    """One critic's verdict; `score` is None when it gave none."""

    kind = SpanType.CRITIC
    critic_name: str | None = None
    input_content: Any = None
    output_content: Any = None
    score: float | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class HandoffSpanData(_FieldSpanData):
    """One agent passing the run to another."""

    kind = SpanType.HANDOFF
    left_out = frozenset({"context_strategy", "messages_passed"})
    from_agent: str | None = None
    to_agent: str | None = None
    output_content: Any = None
    context_strategy: str | None = None
    messages_passed: int | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class MCPSpanData(_FieldSpanData):
    """One call of a tool on an MCP server."""

    kind = SpanType.MCP
    server_name: str | None = None
    tool_name: str | None = None
    tool_args: dict[str, Any] | None = None
    output_content: Any = None


@dataclass(eq=False, repr=False, kw_only=True)
class CustomSpanData(_FieldSpanData):
    """Anything else, under a name of the caller's choice."""

    kind = SpanType.CUSTOM
    name: str
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.data = self.data or {}
