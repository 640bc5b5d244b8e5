"""A whole QitOS agent that needs no key and no network: its model says what a script tells it.

Everything but the model is real: the Engine runs the steps, parses the replies, calls the tools
and asks the critic. Nothing here knows of MLflow; `demo` logs it as it would any other agent.
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from qitos import AgentModule, ModelResponse, StateSchema, ToolRegistry
from qitos.engine.critic import Critic
from qitos.kit.parser.json_parser import JsonDecisionParser

ALMANAC = (
    "Light travels 299792458 metres in one second in a vacuum.",
    "Sound travels about 343 metres in one second in air of 20 degrees Celsius.",
    "The Moon is on average 384400 kilometres away from the Earth.",
    "The Sun is on average 149597871 kilometres away from the Earth.",
    "The Earth's equator is 40075 kilometres long.",
    "A marathon is 42195 metres long.",
    "One lap of a running track is 400 metres long.",
    "The summit of Mount Everest is 8849 metres above the sea.",
    "Water boils at 100 degrees Celsius at the sea and near 70 on the summit of Mount Everest.",
    "Lake Baikal is the deepest lake on Earth.",
    "Honey bees dance to tell each other where flowers are.",
    "A day on Venus lasts longer than a year on Venus.",
)
"""What the agent can look things up in."""

WORK_PER_TOKEN = {"scripted-small": 40, "scripted-large": 200}
"""Hash rounds a model spends on each token: its size, as far as the clock can tell."""


def act(thought: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """A model's reply that calls tools: pairs of a tool's name and its arguments."""
    actions = [{"name": name, "args": args} for name, args in calls]
    return json.dumps({"thought": thought, "actions": actions})


def answer(thought: str, text: str) -> str:
    """A model's reply that ends the task with the answer `text`."""
    return json.dumps({"thought": thought, "final_answer": text})


class ScriptedModel:
    """Says the given replies one after another; an exception among them is raised instead.

    Its token counts are real: the words and signs of what it was sent and of what it said.
    """

    provider = "scripted"
    context_window = 32_768

    def __init__(self, model: str, replies: Iterable[str | Exception]) -> None:
        self.model = model
        self._replies = iter(replies)

    def __call__(self, messages: list[dict[str, str]], **options: Any) -> ModelResponse:
        reply = next(self._replies, None)
        if reply is None:
            raise RuntimeError(f"the script of {self.model} has no further reply")
        if isinstance(reply, Exception):
            raise reply
        prompt = "\n".join(message["content"] for message in messages)
        sent, said = _tokens(prompt), _tokens(reply)
        rounds = WORK_PER_TOKEN.get(self.model, 1) * (sent // 10 + said)
        digest = hashlib.pbkdf2_hmac("sha256", prompt.encode(), reply.encode(), rounds)
        return ModelResponse(
            text=reply,
            usage={"prompt_tokens": sent, "completion_tokens": said, "total_tokens": sent + said},
            finish_reason="stop",
            model_name=self.model,
            provider=self.provider,
            metadata={"id": f"reply-{digest.hex()[:12]}"},
        )


def _tokens(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> float:
    """Work out an arithmetic expression with + - * / and brackets."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError(f"cannot calculate {ast.unparse(node)!r}")

    return round(value(ast.parse(expression, mode="eval").body), 6)


def search_almanac(query: str, top: int = 2) -> list[str]:
    """Find the sentences of the almanac nearest to the query, nearest first."""

    def nearness(sentence: str) -> float:
        words = re.findall(r"\w+", sentence.lower())
        return sum(
            max(SequenceMatcher(None, word, other).ratio() for other in words) ** 4
            for word in re.findall(r"\w+", query.lower())
        )

    return sorted(ALMANAC, key=nearness, reverse=True)[:top]


class Notes:
    """Two tools that write and read text files in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write_note(self, name: str, text: str) -> str:
        """Write a note, over what it held before."""
        self._path(name).write_text(text, encoding="utf-8")
        return f"{name}: {len(text)} characters"

    def read_note(self, name: str) -> str:
        """Read a note back."""
        path = self._path(name)
        if not path.is_file():
            there = ", ".join(sorted(note.name for note in self._directory.iterdir())) or "none"
            raise FileNotFoundError(f"there is no note {name!r}; the notes are: {there}")
        return path.read_text(encoding="utf-8")

    def _path(self, name: str) -> Path:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the plain name of a note")
        return self._directory / name


@dataclass
class DeskState(StateSchema):  # type: ignore[misc]  # mypy does not follow qitos
    """What the agent knows of its task: the task, and what happened so far."""

    happened: list[str] = field(default_factory=list)


class DeskAgent(AgentModule):  # type: ignore[misc]  # mypy does not follow qitos
    """Answers questions with the tools it was given, one model reply a step."""

    def __init__(self, name: str, llm: Any, tools: Iterable[Callable[..., Any]]) -> None:
        registry = ToolRegistry()
        for tool in tools:
            registry.register(tool)
        super().__init__(
            tool_registry=registry,
            llm=llm,
            model_parser=JsonDecisionParser(),
            model_protocol="json_decision_v1",
        )
        self.name = name

    def init_state(self, task: str, **kwargs: Any) -> DeskState:
        return DeskState(task=task, max_steps=int(kwargs.get("max_steps", 10)))

    def base_persona_prompt(self, state: DeskState) -> str:
        return "You answer questions at a desk, with an almanac, a calculator and notes."

    def prepare(self, state: DeskState) -> str:
        return "\n".join([f"Task: {state.task}", *state.happened])

    def reduce(self, state: DeskState, observation: Any, decision: Any) -> DeskState:
        if decision.rationale:
            state.happened.append(f"Thought: {decision.rationale}")
        for result in observation.get("action_results", []):
            state.happened.append(f"Tool: {_plain(result)}")
        return state


def _plain(result: Any) -> Any:
    """A tool's result or error as the model should read it; later QitOS wraps them."""
    if isinstance(result, dict) and "output" in result:
        return result.get("error") or result["output"]
    return result


def ask_librarian(model: ScriptedModel) -> Callable[..., Any]:
    """A tool that hands a question on to a second agent, run inside the first one's step."""

    def ask_librarian(question: str) -> str:
        """Ask the librarian, who searches the almanac and answers in one sentence."""
        librarian = DeskAgent("librarian", model, [search_almanac])
        result = librarian.run(
            task=question, max_steps=4, trace=False, render=False, return_state=True
        )
        return str(result.state.final_result)

    return ask_librarian


class Reviewer(Critic):  # type: ignore[misc]  # mypy does not follow qitos
    """Sends an answer back until it says every one of the given words."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def evaluate(self, state: Any, decision: Any, results: list[Any]) -> dict[str, Any]:
        if decision.mode != "final":
            return {"action": "continue", "reason": "no answer yet"}
        missing = [word for word in self._words if word not in decision.final_answer]
        state.happened.extend(f"Reviewer: please mention {word!r}." for word in missing)
        return {
            "action": "retry" if missing else "continue",
            "reason": f"does not mention {', '.join(missing)}" if missing else "complete",
            "score": 1 - len(missing) / len(self._words),
        }
