"""What a span is about: one small class a kind of span, each a set of plain attributes.

Receives what the caller has; hands on `export`, a dict of ``type`` and the fields. Values are
kept as given, neither copied nor checked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import Any, ClassVar


class SpanType(str, Enum):
    """The kinds of spans; `DELEGATE`, `FANOUT`, `PARSE` and `GUARDRAIL` have no class here."""

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
    """Exports its dataclass fields."""

    kind: ClassVar[SpanType]

    @property
    def type(self) -> str:
        return self.kind.value

    def export(self) -> dict[str, Any]:
        exported: dict[str, Any] = {"type": self.type}
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            exported[name] = getattr(self, name)
        return exported


# No generated __repr__: a span that ends up in a log line must not bring its content along. No
# generated __eq__: spans of equal content are still different spans.
# (Spelled out each time: type checkers do not follow an alias of `dataclass`.)


@dataclass(eq=False, repr=False)
class AgentSpanData(_FieldSpanData):
    """One run of an agent; `tools` are names."""

    kind = SpanType.AGENT
    name: str
    _: KW_ONLY
    model: str | None = None
    tools: list[str] | None = None
    output_type: str | None = None
    task: Any = field(default=None, init=False)
    """What it was given to do, where the metadata of its trace does not say; not on every host."""

    def __post_init__(self) -> None:
        self.tools = self.tools or []

    def export(self) -> dict[str, Any]:
        """As the others, but without `task` if not given."""
        exported = super().export()
        if self.task is None:
            del exported["task"]
        return exported


@dataclass(eq=False, repr=False)
class StepSpanData(_FieldSpanData):
    """One turn of the agent's loop; `step_number` counts as the engine counts."""

    kind = SpanType.STEP
    step_number: int
    _: KW_ONLY
    observation: Any = None
    decision: Any = None


@dataclass(eq=False, repr=False)
class DecideSpanData(_FieldSpanData):
    """Finding the next decision, from observation to decision."""

    kind = SpanType.DECIDE
    _: KW_ONLY
    input_content: Any = None
    output_content: Any = None
    model_response: dict[str, Any] | None = None


@dataclass(eq=False, repr=False)
class GenerationSpanData(_FieldSpanData):
    """One call of a language model; `token_usage` holds real counts or is None."""

    kind = SpanType.GENERATION
    _: KW_ONLY
    model: str | None = None
    input_content: Any = None
    output_content: Any = None
    model_response: dict[str, Any] | None = None
    token_usage: dict[str, int] | None = None


@dataclass(eq=False, repr=False)
class ActSpanData(_FieldSpanData):
    """Carrying out a decision's actions."""

    kind = SpanType.ACT
    _: KW_ONLY
    action_name: str | None = None
    tool_args: dict[str, Any] | None = None
    output_content: Any = None


@dataclass(eq=False, repr=False)
class ToolSpanData(_FieldSpanData):
    """One call of a tool."""

    kind = SpanType.TOOL
    _: KW_ONLY
    tool_name: str
    tool_args: dict[str, Any] | None = None
    output_content: Any = None


@dataclass(eq=False, repr=False)
class ReduceSpanData(_FieldSpanData):
    """Folding results into the agent's state; `input_count` is how many there were."""

    kind = SpanType.REDUCE
    _: KW_ONLY
    input_count: int = 0
    output_content: Any = None


@dataclass(eq=False, repr=False)
class CriticSpanData(_FieldSpanData):
    """One critic's verdict; `score` is None when it gave none."""

    kind = SpanType.CRITIC
    _: KW_ONLY
    critic_name: str | None = None
    input_content: Any = None
    output_content: Any = None
    score: float | None = None


@dataclass(eq=False, repr=False)
class HandoffSpanData(_FieldSpanData):
    """One agent passing the run to another."""

    kind = SpanType.HANDOFF
    _: KW_ONLY
    from_agent: str | None = None
    to_agent: str | None = None
    output_content: Any = None
    context_strategy: str | None = None
    messages_passed: int | None = None

    def export(self) -> dict[str, Any]:
        """As the others, but without `context_strategy` and `messages_passed` if not given."""
        exported = super().export()
        for name in ("context_strategy", "messages_passed"):
            if exported[name] is None:
                del exported[name]
        return exported


@dataclass(eq=False, repr=False)
class MCPSpanData(_FieldSpanData):
    """One call of a tool on an MCP server."""

    kind = SpanType.MCP
    _: KW_ONLY
    server_name: str | None = None
    tool_name: str | None = None
    tool_args: dict[str, Any] | None = None
    output_content: Any = None


@dataclass(eq=False, repr=False)
class CustomSpanData(_FieldSpanData):
    """Anything else, under a name of the caller's."""

    kind = SpanType.CUSTOM
    _: KW_ONLY
    name: str
    data: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.data = self.data or {}
