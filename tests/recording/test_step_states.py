"""A step's state is recorded where it changes, and can be read at each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
import pydantic
import pytest
from qitos import Decision

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.recording.differences import LONG_TEXT, Shorter
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.simpler import SlowTexts
from qitos_mlflow.recording.step_states import StepStates
from qitos_mlflow.recording.to_json import Snapshot, as_json
from qitos_mlflow.redaction.redact import MARKER, redact
from qitos_mlflow.tracing import SpanType, StepSpanData, create_trace, set_trace_processors
from tests.bridge.agents import ScriptAgent, State, act

PAGE = "a page of text, " * 200
"""3.2 KB, as a tool's result may be."""


class Keeper:
    """Keeps every record as it is about to be stored."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    @pluggy.HookimplMarker("qitos")
    def qitos_record(self, record: dict[str, Any]) -> None:
        self.records.append(copy.deepcopy(record))


class Agent(ScriptAgent):
    """Adds 2 and 2 in each step; `change` says what becomes of its state."""

    def __init__(self, change: Callable[[State, int], State | None], steps: int) -> None:
        script = [act("add", a=2, b=2)] * (steps - 1)
        super().__init__(*script, Decision.final("4"), max_steps=steps + 1)
        self.change = change

    def reduce(self, state: State, observation: Any, decision: Any) -> State:
        return self.change(state, state.current_step) or state


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Runs an `Agent` and returns the records of its spans."""

    def run(
        change: Callable[[State, int], State | None], steps: int, *plugins: Any
    ) -> list[dict[str, Any]]:
        keeper = Keeper()
        named = {str(number): plugin for number, plugin in enumerate([keeper, *plugins])}
        mlflow = MlflowTraceProcessor(offline=True, spool_dir=tmp_path)
        set_trace_processors([mlflow, PluginTraceProcessor(named)])
        Agent(change, steps).run(task="sum", trace=False, render=False, max_steps=steps + 1)
        mlflow.shutdown()
        return [record for record in keeper.records if record["kind"] == "span"]

    yield run
    set_trace_processors([])


def seen(records: list[dict[str, Any]]) -> list[Any]:
    """What the steps show of the state's field `seen`, in order."""
    steps = (one["data"] for one in records if one["type"] == "step")
    return [step["observation"]["state"]["seen"] for step in steps]


def spelled(records: list[dict[str, Any]], *kinds: str) -> int:
    """Characters of the records of these types."""
    return sum(len(repr(one["data"])) for one in records if one["type"] in kinds)


def grow(state: State, step: int) -> None:
    state.seen.append(f"page {step}: {PAGE}")


@pytest.mark.parametrize(
    "item",
    [
        lambda step: f"page {step}: {PAGE}",
        lambda step: {"role": "tool", "content": f"page {step}: {PAGE}"},
        lambda step: (step, f"page {step}: {PAGE}"),
    ],
    ids=["texts", "messages", "rows"],
)
def test_what_is_recorded_grows_with_the_steps_only(run: Run, item: Callable[[int], Any]) -> None:
    """Twice as many steps of a state that grows with each are about twice as much, not four times.

    A new item is shown by the reduction that adds it and by the next step; and the whole state now
    and then, which adds no more than that.
    """

    def grow(state: State, step: int) -> None:
        state.seen.append(item(step))

    size = {steps: spelled(run(grow, steps), "step", "decide", "reduce") for steps in (20, 40)}
    assert size[40] < 2.8 * size[20]
    assert size[40] < 40 * 5.5 * len(PAGE)


def test_a_step_shows_what_is_new_in_its_place(run: Run) -> None:
    """Beside what it had before; numbers and short texts are whole at each step."""
    steps = [one["data"] for one in run(grow, 30) if one["type"] == "step"]
    for step, before in zip(steps[15:], steps[14:], strict=False):
        number, observation = step["step_number"], step["observation"]
        state = observation["state"]
        assert {**state, "seen": 0} == {**before["observation"]["state"], "seen": 0} | {
            "current_step": number
        }
        new = f"page {number - 1}: {PAGE}"
        if "…" in observation:
            assert state["seen"] == [f"[{number - 1} items as at step {number - 1}]", new]
        else:
            assert state["seen"] == [f"page {one}: {PAGE}" for one in range(number)]


def test_the_step_that_shows_everything_is_named(run: Run) -> None:
    """The first does, and later ones, ever more seldom."""
    steps = [one["data"] for one in run(grow, 60) if one["type"] == "step"]
    whole = [one["step_number"] for one in steps if "…" not in one["observation"]]
    assert whole[0] == 0
    assert len(whole) < 14
    assert whole[-1] > 25
    for step in steps:
        named = step["observation"].get("…", f"[in full at step {step['step_number']}]")
        last = max(one for one in whole if one <= step["step_number"])
        assert named == f"[in full at step {last}]"


def test_a_reduction_shows_what_it_changes(run: Run) -> None:
    """`before` and `after` of the host are there, each without what both have."""
    (change,) = [
        one["data"]["output_content"]["seen"]
        for one in run(grow, 30)
        if one["type"] == "reduce" and one["step"] == 20
    ]
    assert change["before"] == ["[20 items, unchanged]"]
    assert change["after"] == ["[20 items, unchanged]", f"page 20: {PAGE}"]


def test_a_decision_names_the_step_that_shows_what_it_got(run: Run) -> None:
    """It gets what the step before it shows."""
    (got,) = [
        one["data"]["input_content"]
        for one in run(grow, 30)
        if one["type"] == "decide" and one["step"] == 20
    ]
    assert got["state"]["seen"] == ["[19 items as at step 19]"]
    assert got["step"] == 19


def test_a_small_state_is_whole_at_each_step(run: Run) -> None:
    """As long as nothing is gained, nothing is left out."""
    records = run(lambda state, step: state.seen.append(step), 30)
    assert seen(records) == [[*range(step)] for step in range(30)]
    assert "…" not in repr(records)
    assert "as at" not in repr(records)


def test_an_edit_in_place_is_seen(run: Run) -> None:
    """Also of a dict deep in the state, which is the same object as before."""

    def change(state: State, step: int) -> None:
        state.seen.append({"page": step, "text": PAGE})
        state.seen[step // 2]["page"] = -1

    shown = seen(run(change, 40))
    steps = [step for step in range(25, 40) if "as at" in repr(shown[step])]
    assert steps
    for step in steps:
        edited = {"page": -1, "text": f"[{len(PAGE)} characters as at step {step - 1}]"}
        if (step - 1) % 2 == 0:  # Else the same item was edited before.
            assert edited in shown[step]
        assert shown[step][-1] == {"page": step - 1, "text": PAGE}


def test_a_state_that_is_replaced_is_whole(run: Run) -> None:
    """What an agent returns may have nothing in common with what it got."""

    def change(state: State, step: int) -> State:
        return State(task=state.task, max_steps=state.max_steps, current_step=step, seen=[
            f"{step} {index} {PAGE}" for index in range(15)
        ])  # fmt: skip

    shown = seen(run(change, 12))
    for step in range(1, 12):
        assert shown[step] == [f"{step - 1} {index} {PAGE}" for index in range(15)]


def test_a_list_that_shrinks_says_how_long_it_was(run: Run) -> None:
    """Both if the last items are taken, and if the first ones are."""

    def change(state: State, step: int) -> None:
        if step == 0:
            state.seen.extend(f"{index} {PAGE}" for index in range(40))
        else:
            state.seen.pop(-1 if step % 2 else 0)

    for step, items in enumerate(seen(run(change, 12))[2:], 2):
        if items[0].startswith("["):
            assert items == [f"[{41 - step} of {42 - step} items as at step {step - 1}]"]
        else:
            assert len(items) == 41 - step


def test_a_window_of_the_last_items_is_recognised(run: Run) -> None:
    """QitOS's agents keep the last forty lines."""

    def change(state: State, step: int) -> None:
        state.seen.append(f"page {step}: {PAGE}")
        del state.seen[:-15]

    shown = [items for items in seen(run(change, 40))[20:] if items[0].startswith("[")]
    assert shown
    for items in shown:
        assert items[0].startswith("[14 of 15 items as at step ")
        assert len(items) == 2


def test_equal_states_are_notes(run: Run) -> None:
    """Each step then shows no more than that."""

    def change(state: State, step: int) -> None:
        if step == 0:
            state.seen.extend([PAGE] * 12)

    shown = seen(run(change, 10))
    assert shown[2:] == [[f"[12 items as at step {step}]"] for step in range(1, 9)]


class Message(pydantic.BaseModel):
    text: str
    number: int


@dataclass
class Note:
    text: str


class Unspeakable:
    """Raises in its repr, and in every comparison."""

    def __repr__(self) -> str:
        raise ValueError("no repr")

    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("make", [Message, lambda text, number: Note(f"{number} {text}")])
def test_models_and_dataclasses_are_compared_by_their_fields(
    run: Run, make: Callable[..., Any]
) -> None:
    """They are shown as their fields."""
    shown = seen(run(lambda state, step: state.seen.append(make(text=PAGE, number=step)), 30))
    brief = [items for items in shown[15:] if type(items[0]) is str]
    assert len(brief) > 8
    assert all(len(items) == 2 and PAGE in items[1]["text"] for items in brief)


def encoded(observation: Any, number: int, states: StepStates) -> Any:
    """What the record of a step with this observation has of it."""
    record = {
        "type": "step", "data": {"step_number": number, "observation": observation},
    }  # fmt: skip
    payload = states.encode("agent", record, SlowTexts())
    states.recorded("agent", record, payload.json_bytes)
    return _json.loads(as_json(payload))["data"]["observation"]


@pytest.fixture
def states() -> StepStates:
    return StepStates()


def test_an_object_without_repr_or_comparison_harms_nothing(states: StepStates) -> None:
    """It has its name where it is, and the rest is as it would be without."""
    items = [*range(30), PAGE]
    for number in range(4):
        shown = encoded({"state": {"odd": Unspeakable(), "items": items}}, number, states)
    assert shown["state"]["odd"] == "<Unspeakable without a repr>"
    assert shown["state"]["items"] == ["[31 items as at step 2]"]


def test_a_state_that_holds_itself_is_recorded_as_before(states: StepStates) -> None:
    """It has no end that could be compared."""
    state: dict[str, Any] = {"text": PAGE}
    state["self"] = state
    for number in range(3):
        assert encoded({"state": state}, number, states)["state"]["text"] == PAGE


class Observation(dict[str, Any]):
    """That of later hosts."""


@pytest.mark.parametrize("kind", [dict, Observation, lambda given: Note(given["state"]["text"])])
def test_any_kind_of_observation_is_shortened(
    states: StepStates, kind: Callable[[dict[str, Any]], Any]
) -> None:
    """The step's and the next decision's alike, whether that gets the same object or a copy."""
    for number in range(3):
        given = kind({"state": {"text": PAGE, "n": 1}, "decision": {"mode": "act"}})
        shown = encoded(given, number, states)
    note = f"[{len(PAGE)} characters as at step 1]"
    assert note in repr(shown)
    assert PAGE not in repr(shown)
    assert shown["…"] == "[in full at step 0]"
    for got in (given, copy.copy(given)):
        record = {"type": "decide", "data": {"input_content": got}}
        data = _json.loads(as_json(states.encode("agent", record, SlowTexts())))["data"]
        assert PAGE not in repr(data)
        assert note.replace("step 1", "step 2") in repr(data)


def test_nan_and_odd_keys_are_recorded_as_before(states: StepStates) -> None:
    """JSON has neither."""
    for number in range(2):
        shown = encoded({"state": {"text": PAGE, 7: math.nan}}, number, states)
    assert shown["state"] == {"text": f"[{len(PAGE)} characters as at step 0]", "7": "NaN"}


def test_after_a_lost_step_the_next_one_shows_everything(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing refers to a step that was lost before it reached the queue."""
    offer, lost = RecordPipeline.offer, []

    def lossy(self: RecordPipeline, payload: Snapshot, **options: Any) -> bool:
        if b'"type":"step"' in as_json(payload) and b'"step_number":20' in as_json(payload):
            lost.append(payload)
            return False
        return offer(self, payload, **options)

    monkeypatch.setattr(RecordPipeline, "offer", lossy)
    records = run(grow, 24)
    assert len(lost) == 1
    assert "as at step 20" not in repr(records)
    assert seen(records)[20] == [f"page {one}: {PAGE}" for one in range(21)]  # of step 21


def test_spans_made_by_hand_stay_as_they_are(tmp_path: Path) -> None:
    """Only the bridge knows that steps are those of one agent."""
    keeper = Keeper()
    mlflow = MlflowTraceProcessor(offline=True, spool_dir=tmp_path)
    set_trace_processors([mlflow, PluginTraceProcessor({"keeper": keeper})])
    observation = {"state": {"seen": [PAGE] * 20}}
    try:
        with create_trace("by hand") as trace:
            for number in range(3):
                data = StepSpanData(number, observation=observation)
                trace.create_span(SpanType.STEP, data).start().finish()
        mlflow.shutdown()
    finally:
        set_trace_processors([])
    steps = [one["data"]["observation"] for one in keeper.records if one["kind"] == "span"]
    assert steps == [observation] * 3


def test_processors_get_the_observation_of_the_host(run: Run) -> None:
    """Only the record is shorter."""
    held: list[Any] = []

    class Watch:
        @pluggy.HookimplMarker("qitos")
        def qitos_span_end(self, span: Any) -> None:
            if span.data.type == "step":
                held.append(copy.deepcopy(span.data.observation))

    run(grow, 20, Watch())
    assert held[15]["state"]["seen"] == [f"page {one}: {PAGE}" for one in range(15)]


LINES = ["MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQ" + "Q" * 20] * 20
OPEN = "-----BEGIN PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([["user", "password"], *[["ann", "hunter2secret"]] * 20], [["bob", "hunter3secret"]]),
        ([OPEN, *LINES], ["MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjNEWLINE"]),
        ([f"a{n}" for n in range(70)] + ["--password"], ["hunter3secret"]),
        ([*["curl", "-s"] * 8, "--user"], ["ann:hunter3secret"]),
        ([["Accept", "all"]] * 20, [["Cookie", "sid=hunter3secret"]]),
    ],
    ids=["table", "key", "option", "command", "pairs"],
)
def test_no_credential_shows_because_what_names_it_is_left_out(
    before: list[Any], after: list[Any]
) -> None:
    """A new row, line or word is redacted as it is in the whole list."""
    shorter = Shorter(SlowTexts())
    new = [*before, *after]
    whole, brief = redact(new), redact(shorter.value(new, before))
    assert "NEWLINE" not in repr(whole)
    assert "hunter3secret" not in repr(whole)
    assert "NEWLINE" not in repr(brief)
    assert "hunter3secret" not in repr(brief)
    assert MARKER in repr(brief)


def test_a_text_that_grows_is_whole(states: StepStates) -> None:
    """What is added to it may be the value of a name before it."""
    text = "word " * LONG_TEXT + "password="
    for number, said in enumerate([text, text, text + "hunter3secret"]):
        shown = encoded({"text": said, "more": PAGE}, number, states)
    assert shown["text"] == said


def test_pictures_stay_where_they_are(states: StepStates) -> None:
    """Each is stored once anyway, and the page shows it at each step."""
    block = {"type": "image_base64", "mime_type": "image/png", "data": "iVBOR" + "A" * 4000}
    for number in range(3):
        shown = encoded({"screen": [block], "text": PAGE}, number, states)
    assert shown["screen"] == [block]
    assert shown["text"] != PAGE


def test_what_an_environment_says_twice_is_there_once(states: StepStates) -> None:
    """QitOS gives its observation alone, and in the last result."""
    observation = {"data": {"screen": PAGE}, "metadata": {}}
    env = {"enabled": True, "observation": observation,
           "last_result": {"observation": observation, "reward": 1}}  # fmt: skip
    shown = encoded({"env": env}, 0, states)["env"]
    assert shown["observation"] == observation
    assert shown["last_result"] == {"reward": 1, "observation": {
        "data": {"screen": f"[{len(PAGE)} characters as in env.observation]"}, "metadata": {},
    }}  # fmt: skip
