"""The tasks of `qitos-mlflow demo`: what is asked, which model answers, and how each must end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qitos import Task, TaskBudget
from qitos.engine.hooks import EngineHook

from qitos_mlflow.cli._demo_agent import (
    DeskAgent,
    Notes,
    Reviewer,
    ScriptedModel,
    act,
    answer,
    ask_librarian,
    calculate,
    search_almanac,
)

LARGE, SMALL = "scripted-large", "scripted-small"
BENCHMARK = {"benchmark": "desk-questions", "split": "demo"}

ABOUT_MOON = ("search_almanac", {"query": "how far away is the Moon from the Earth", "top": 1})
ABOUT_LIGHT = ("search_almanac", {"query": "how far light travels in a second", "top": 1})
ABOUT_EVEREST = ("search_almanac", {"query": "water boils summit Everest", "top": 2})


@dataclass(frozen=True)
class DemoTask:
    """One task, the replies its model will give and the stop reason it ends with."""

    id: str
    agent: str
    objective: str
    model: str
    replies: tuple[str | Exception, ...]
    stop_reason: str = "final"
    max_steps: int = 8
    reviewed_for: tuple[str, ...] = ()
    librarian: tuple[str, ...] = ()


class StepCounter(EngineHook):  # type: ignore[misc]  # mypy does not follow qitos
    """Calls `step_began` at each step of the run it is attached to."""

    def __init__(self, step_began: Callable[[], None]) -> None:
        self._step_began = step_began

    def on_before_step(self, ctx: Any, engine: Any) -> None:
        self._step_began()


def run_task(demo: DemoTask, workspace: Path, step_began: Callable[[], None]) -> Any:
    """Run one task on a QitOS Engine and return its EngineResult; never raises for a failed one."""
    notes = Notes(workspace)
    tools: list[Callable[..., Any]] = [calculate, search_almanac]
    tools += [notes.write_note, notes.read_note]
    if demo.librarian:
        tools.append(ask_librarian(ScriptedModel(SMALL, demo.librarian)))
    agent = DeskAgent(demo.agent, ScriptedModel(demo.model, demo.replies), tools)
    return agent.run(
        task=Task(
            id=demo.id,
            objective=demo.objective,
            budget=TaskBudget(max_steps=demo.max_steps),
            metadata=dict(BENCHMARK),
        ),
        max_steps=demo.max_steps,
        critics=[Reviewer(*demo.reviewed_for)] if demo.reviewed_for else None,
        hooks=[StepCounter(step_began)],
        trace=False,
        render=False,
        return_state=True,
    )


def prepare_workspace(workspace: Path) -> None:
    """Put the notes there that the tasks expect to find."""
    (workspace / "shopping-list.txt").write_text("12 eggs\n3 loaves\n", encoding="utf-8")


def _endless_searches(count: int) -> Iterator[str]:
    for number in range(1, count + 1):
        query = f"how many bees are there, attempt {number}"
        yield act("Not in the almanac yet.", ("search_almanac", {"query": query}))


TASKS = (
    DemoTask(
        id="moonlight",
        agent="astronomer",
        objective="How many seconds does light take from the Moon to the Earth?",
        model=LARGE,
        replies=(
            act("I need the distance and the speed.", ABOUT_MOON, ABOUT_LIGHT),
            act("Metres by metres a second.", ("calculate", {"expression": "384400000/299792458"})),
            answer("Both numbers are known.", "About 1.28 seconds."),
        ),
    ),
    DemoTask(
        id="moonlight",
        agent="astronomer",
        objective="How many seconds does light take from the Moon to the Earth?",
        model=SMALL,
        replies=(
            act("First the distance.", ABOUT_MOON),
            act("Kilometres by metres.", ("calculate", {"expression": "384400/299792458"})),
            act("That is far too small. What is the speed?", ABOUT_LIGHT),
            act("Metres it is.", ("calculate", {"expression": "384400*1000/299792458"})),
            answer("Done.", "About 1.28 seconds."),
        ),
    ),
    DemoTask(
        id="marathon-laps",
        agent="sports-desk",
        objective="How many laps of a track make a marathon? Leave a note with the answer.",
        model=SMALL,
        replies=(
            act("How long are they?", ("search_almanac", {"query": "marathon lap track long"})),
            act("Divide.", ("calculate", {"expression": "42195/400"})),
            act("Note it.", ("write_note", {"name": "laps.txt", "text": "105.4875 laps"})),
            act("Is it there?", ("read_note", {"name": "laps.txt"})),
            answer("It is noted.", "105.4875 laps, as laps.txt says."),
        ),
    ),
    DemoTask(
        id="shopping",
        agent="shopper",
        objective="How many things are on the shopping list?",
        model=SMALL,
        replies=(
            act("Read the list.", ("read_note", {"name": "shopping.txt"})),
            act("It has another name.", ("read_note", {"name": "shopping-list.txt"})),
            act("Add up.", ("calculate", {"expression": "12+3"})),
            answer("Added up.", "15 things."),
        ),
    ),
    DemoTask(
        id="boiling-water",
        agent="tea-taster",
        objective="Why is tea not as good on Mount Everest? Name your source.",
        model=LARGE,
        reviewed_for=("boils", "70", "almanac", "8849"),
        replies=(
            answer("I know this.", "Because water boils too early up there."),
            act("The reviewer wants facts.", ABOUT_EVEREST),
            answer("Numbers.", "Water boils near 70 degrees there, says the almanac."),
            answer(
                "And the height.",
                "At 8849 metres water boils near 70 degrees, says the almanac: too cold for tea.",
            ),
        ),
    ),
    DemoTask(
        id="sunlight",
        agent="astronomer",
        objective="How many minutes does light take from the Sun to the Earth? Ask the librarian.",
        model=LARGE,
        librarian=(
            act("The Sun.", ("search_almanac", {"query": "how far away is the Sun", "top": 1})),
            answer("Found.", "The Sun is on average 149597871 kilometres away."),
        ),
        replies=(
            act("The librarian knows.", ("ask_librarian", {"question": "How far is the Sun?"})),
            act("The speed I look up.", ABOUT_LIGHT),
            act("In minutes.", ("calculate", {"expression": "149597871000/299792458/60"})),
            answer("Done.", "About 8.3 minutes."),
        ),
    ),
    DemoTask(
        id="counting-bees",
        agent="beekeeper",
        objective="How many honey bees are there on Earth?",
        model=SMALL,
        replies=tuple(_endless_searches(6)),
        max_steps=6,
        stop_reason="budget_steps",
    ),
    DemoTask(
        id="equator-walk",
        agent="hiker",
        objective="How many days does walking the equator take, at 30 kilometres a day?",
        model=LARGE,
        replies=(
            act("How long is it?", ("search_almanac", {"query": "equator long", "top": 1})),
            act("Divide.", ("calculate", {"expression": "40075/30"})),
            RuntimeError("scripted-large is out of service (as this demo wants it)"),
        ),
        stop_reason="unrecoverable_error",
    ),
)
