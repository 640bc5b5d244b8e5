"""Scripted agents of the real QitOS: offline models, decisions, tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qitos import Action, AgentModule, Decision, ModelResponse, StateSchema, ToolRegistry, tool


@dataclass
class State(StateSchema):
    """The state of the scripted agents."""

    seen: list[Any] = field(default_factory=list)


class Model:
    """An offline model: answers from a script, item by item; raises items that are exceptions."""

    model = "scripted-1"

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.asked: list[Any] = []

    def __call__(self, messages: Any, **options: Any) -> Any:
        self.asked.append(messages)
        item = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(item, BaseException):
            raise item
        return item() if callable(item) else item


class ModelAgent(AgentModule[State, Any, Any]):
    """Asks a model; the host's default protocol parses what it says."""

    name = "asker"

    def __init__(self, llm: Any, tools: ToolRegistry | None = None, max_steps: int = 6) -> None:
        super().__init__(tool_registry=tools or toolbox(), llm=llm)
        self.steps = max_steps

    def init_state(self, task: str, **kwargs: Any) -> State:
        return State(task=task, max_steps=kwargs.get("max_steps", self.steps))

    def prepare(self, state: State) -> str:
        return f"task: {state.task}"

    def reduce(self, state: State, observation: Any, decision: Any) -> State:
        state.seen.append(decision.mode)
        return state


class ScriptAgent(ModelAgent):
    """Decides from a script of decisions (or callables that make them), without a model."""

    name = "script"

    def __init__(self, *script: Any, tools: ToolRegistry | None = None, max_steps: int = 6) -> None:
        super().__init__(None, tools, max_steps)
        self.script = list(script)

    def decide(self, state: State, observation: Any) -> Any:
        item = self.script[min(state.current_step, len(self.script) - 1)]
        if isinstance(item, BaseException):
            raise item
        return item() if callable(item) else item


def toolbox(**bodies: Callable[..., Any]) -> ToolRegistry:
    """A registry with ``add``, ``fail`` and the given functions."""
    registry = ToolRegistry()

    @tool(name="add")
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    @tool(name="fail")
    def fail(why: str = "no reason") -> int:
        """Raise."""
        raise ValueError(why)

    for function in (add, fail, *(tool(name=name)(body) for name, body in bodies.items())):
        registry.register(function)
    return registry


def act(*names: str, **args: Any) -> Decision[Any]:
    """A decision to call these tools with these arguments."""
    return Decision.act([Action(name=name, args=dict(args)) for name in names])


def answer(text: str, **more: Any) -> ModelResponse:
    """A model's answer with whatever is known of it."""
    return ModelResponse(text=text, **more)


FINAL = "Thought: done\nFinal Answer: 42"
ADD = "Thought: sum\nAction: add(a=19, b=23)"
