"""The agents and tasks of `qitos-mlflow demo`. The model replies from a script: no key, no network.

Everything else is real: the Engine runs the steps, parses the replies, calls the tools and asks
the critic. Nothing here imports MLflow; `demo` logs these agents as it would log any others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qitos import AgentModule, ModelResponse, StateSchema, Task, TaskBudget, ToolRegistry
from qitos.engine.critic import Critic
from qitos.kit.parser.json_parser import JsonDecisionParser

ALMANAC = (
    "Light travels 299792458 metres in one second in a vacuum.",
    "The Moon is on average 384400 kilometres away from the Earth.",
    "The Sun is on average 149597871 kilometres away from the Earth.",
    "The Earth's equator is 40075 kilometres long.",
    "The summit of Mount Everest is 8849 metres above the sea.",
    "Water boils at 100 degrees Celsius at the sea and near 70 on the summit of Mount Everest.",
    "Honey bees dance to tell each other where flowers are.",
)
"""What `search_almanac` searches."""


def act(thought: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """A reply that calls tools. Each call is the tool's name and its arguments."""
    actions = [{"name": name, "args": args} for name, args in calls]
    return json.dumps({"thought": thought, "actions": actions})


def answer(thought: str, text: str) -> str:
    """A reply that ends the task with the answer `text`."""
    return json.dumps({"thought": thought, "final_answer": text})


class ScriptedModel:
    """Gives the replies one after another; an exception among them is raised.

    Token counts are real: the words and signs of the prompt and of the reply.
    """

    provider = "scripted"
    context_window = 32_768

    def __init__(self, model: str, replies: Iterable[str | Exception]) -> None:
        self.model = model
        self._replies = iter(replies)

    def __call__(self, messages: list[dict[str, str]], **options: Any) -> ModelResponse:
        reply = next(self._replies, RuntimeError(f"{self.model} has no further reply"))
        if isinstance(reply, Exception):
            raise reply
        prompt = "\n".join(message["content"] for message in messages)
        sent, said = (len(re.findall(r"\w+|[^\w\s]", text)) for text in (prompt, reply))
        return ModelResponse(
            text=reply,
            usage={"prompt_tokens": sent, "completion_tokens": said, "total_tokens": sent + said},
            finish_reason="stop",
            model_name=self.model,
            provider=self.provider,
        )


def calculate(expression: str) -> float:
    """Work out an arithmetic expression with + - * / and brackets."""
    if not re.fullmatch(r"(?!.*\*\*)[-+*/(). 0-9]+", expression):
        raise ValueError(f"cannot calculate {expression!r}")
    return float(round(eval(expression), 6))  # noqa: S307 - only digits, operators and brackets


def search_almanac(query: str, top: int = 1) -> list[str]:
    """Find the sentences of the almanac that share most words with the query, best first."""
    asked, *said = (set(re.findall(r"\w+", text.lower())) for text in (query, *ALMANAC))
    by_words = sorted(zip(said, ALMANAC, strict=True), key=lambda pair: -len(asked & pair[0]))
    return [line for _, line in by_words[:top]]


class DeskAgent(AgentModule):  # type: ignore[misc]  # mypy does not follow qitos
    """Answers questions with the given tools, one model reply a step.

    The state's metadata has what happened so far.
    """

    def __init__(self, name: str, llm: Any, tools: Iterable[Callable[..., Any]]) -> None:
        registry = ToolRegistry()
        for tool in tools:
            registry.register(tool)
        parser = {"model_parser": JsonDecisionParser(), "model_protocol": "json_decision_v1"}
        super().__init__(tool_registry=registry, llm=llm, **parser)
        self.name = name

    def init_state(self, task: str, max_steps: int = 10, **kwargs: Any) -> StateSchema:
        return StateSchema(task=task, max_steps=max_steps, metadata={"happened": []})

    def base_persona_prompt(self, state: StateSchema) -> str:
        return "You answer questions at a desk, with an almanac and a calculator."

    def prepare(self, state: StateSchema) -> str:
        return "\n".join([f"Task: {state.task}", *state.metadata["happened"]])

    def reduce(self, state: StateSchema, observation: Any, decision: Any) -> StateSchema:
        happened = state.metadata["happened"]
        if decision.rationale:
            happened.append(f"Thought: {decision.rationale}")
        for result in observation.get("action_results", []):
            if isinstance(result, dict) and "output" in result:  # Later QitOS wraps results.
                result = result.get("error") or result["output"]
            happened.append(f"Tool: {result}")
        return state


class Reviewer(Critic):  # type: ignore[misc]  # mypy does not follow qitos
    """Sends an answer back until it contains all the given words."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def evaluate(self, state: Any, decision: Any, results: list[Any]) -> dict[str, Any]:
        if decision.mode != "final":
            return {"action": "continue", "reason": "no answer yet"}
        missing = [word for word in self._words if word not in decision.final_answer]
        asked = (f"Reviewer: please mention {word!r}." for word in missing)
        state.metadata["happened"].extend(asked)
        return {
            "action": "retry" if missing else "continue",
            "reason": f"does not mention {', '.join(missing)}" if missing else "complete",
            "score": 1 - len(missing) / len(self._words),
        }


@dataclass(frozen=True)
class DemoTask:
    """A question, and the model's replies to it; the budget is a step for each reply."""

    id: str
    agent: str
    objective: str
    replies: tuple[str | Exception, ...]
    needs: tuple[str, ...] = ()
    """Words that the reviewer wants; without any there is none."""
    librarian: tuple[str, ...] = ()
    """Replies of the second agent, which the first one runs inside its own step."""


def run_task(demo: DemoTask) -> Any:
    """Run one task on a QitOS Engine and return its EngineResult. A failed task does not raise."""

    def ask_librarian(question: str) -> str:
        """Ask the librarian, who searches the almanac and answers in one sentence."""
        model = ScriptedModel("scripted-small", demo.librarian)
        librarian = DeskAgent("librarian", model, [search_almanac])
        return str(librarian.run(task=question, max_steps=4, trace=False, render=False))

    max_steps = len(demo.replies)
    tools: list[Any] = [calculate, search_almanac, ask_librarian]
    return DeskAgent(demo.agent, ScriptedModel("scripted-large", demo.replies), tools).run(
        task=Task(
            id=demo.id,
            objective=demo.objective,
            budget=TaskBudget(max_steps=max_steps),
            metadata={"benchmark": "desk-questions", "split": "demo"},
        ),
        max_steps=max_steps,
        critics=[Reviewer(*demo.needs)] if demo.needs else None,
        trace=False,
        render=False,
        return_state=True,
    )


LIGHT = ("search_almanac", {"query": "how far light travels in a second"})
MOONLIGHT = (
    act("Distance and speed.", ("search_almanac", {"query": "how far is the Moon"}), LIGHT),
    act("Metres by metres a second.", ("calculate", {"expression": "384400000/299792458"})),
    answer("Both numbers are known.", "About 1.28 seconds."),
)
BOILING_WATER = (
    answer("I know this.", "Because water boils too early up there."),
    act("Facts, then.", ("search_almanac", {"query": "water boils summit Everest", "top": 2})),
    answer("Numbers.", "Water boils near 70 degrees there, says the almanac."),
    answer("And the height.", "At 8849 metres water boils near 70 degrees, says the almanac."),
)
SUNLIGHT = (
    act("The librarian knows.", ("ask_librarian", {"question": "How far is the Sun?"})),
    act("The speed I look up.", LIGHT),
    act("In minutes.", ("calculate", {"expression": "149597871 kilometres / 299792458 / 60"})),
    act("Only numbers, then.", ("calculate", {"expression": "149597871000/299792458/60"})),
    answer("Done.", "About 8.3 minutes."),
)
LIBRARIAN = (
    act("The Sun.", ("search_almanac", {"query": "how far away is the Sun"})),
    answer("Found.", "The Sun is on average 149597871 kilometres away."),
)
BEES = tuple(act("No.", ("search_almanac", {"query": f"how many bees, {n}"})) for n in range(1, 7))
EQUATOR = (
    act("How long is it?", ("search_almanac", {"query": "equator long"})),
    act("Divide.", ("calculate", {"expression": "40075/30"})),
    RuntimeError("scripted-large is out of service (as this demo wants it)"),
)

MOON_ASKED = "How many seconds does light take from the Moon to the Earth?"
TEA_ASKED = "Why is tea not as good on Mount Everest? Name your source."
SUN_ASKED = "How many minutes does light take from the Sun to the Earth? Ask the librarian."
BEES_ASKED = "How many honey bees are there on Earth?"
WALK_ASKED = "How many days does walking the equator take, at 30 kilometres a day?"
TEA_NEEDS = ("boils", "70", "almanac", "8849")

TASKS = (
    DemoTask("moonlight", "astronomer", MOON_ASKED, MOONLIGHT),
    DemoTask("boiling-water", "tea-taster", TEA_ASKED, BOILING_WATER, needs=TEA_NEEDS),
    DemoTask("sunlight", "astronomer", SUN_ASKED, SUNLIGHT, librarian=LIBRARIAN),
    DemoTask("counting-bees", "beekeeper", BEES_ASKED, BEES),
    DemoTask("equator-walk", "hiker", WALK_ASKED, EQUATOR),
)
