"""A snapshot has copies of its own, and takes those of a conversation's messages again."""

from __future__ import annotations

import random
import sys
import threading
from copy import deepcopy
from typing import Any

import pytest

from qitos_mlflow import _json
from qitos_mlflow.recording import to_json
from qitos_mlflow.recording.simpler import MAX_CONVERSATIONS, SlowTexts
from qitos_mlflow.recording.to_json import MAX_CONTAINERS, Snapshot, as_json, encode

Message = dict[str, Any]


def said(number: int) -> Message:
    """A message of its own."""
    return {"role": "user", "content": f"message {number}"}


def snapshot(messages: list[Any], slow: SlowTexts) -> Snapshot:
    """That of a record with these messages."""
    return encode({"kind": "span", "data": {"input_content": messages}}, slow)


def stored(made: Snapshot) -> Any:
    """The messages that it has."""
    return _json.loads(as_json(made))["data"]["input_content"]


def kept(made: Snapshot) -> list[Any]:
    """Its own messages."""
    found: list[Any] = made.record["data"]["input_content"]
    return found


def test_messages_that_stay_are_copied_once() -> None:
    """Those of a longer list are the same objects as those of the one before."""
    slow, messages = SlowTexts(), [said(number) for number in range(6)]
    before = snapshot(messages, slow)
    messages += [said(6), said(7)]
    after = snapshot(messages, slow)
    assert all(one is other for one, other in zip(kept(before), kept(after), strict=False))
    assert not any(one is other for one, other in zip(kept(after), messages, strict=True))
    assert stored(after) == messages
    assert len(after) == len(snapshot(messages, SlowTexts()))


def test_whatever_an_agent_does_to_its_messages() -> None:
    """Each snapshot has what was there when it was made, also if two agents share a trace."""
    chance = random.Random(7)
    slow, made = SlowTexts(), []
    conversations = [[said(number) for number in range(5)] for _ in range(3)]
    for step in range(400):
        messages = chance.choice(conversations)
        match chance.randrange(9):
            case 0:
                messages[chance.randrange(len(messages))]["content"] = f"edited in step {step}"
            case 1:
                chance.shuffle(messages)
            case 2:
                del messages[: len(messages) - 4]
            case 3:
                messages[0] = {"role": "user", "content": chance.choice([1, 1.0, True, None, "1"])}
            case 4:
                messages[1]["new"] = chance.choice([["a"], {"b": [1]}, 5, "text"])
            case 5:
                messages[1].pop("new", None)
            case _:
                messages.append(said(step))
        made.append((snapshot(messages, slow), deepcopy(messages)))
    for one, then in made:
        assert repr(stored(one)) == repr(then)


class Foreign:
    """Says that it is equal to anything, and tells."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    def __hash__(self) -> int:
        return hash("user")

    def __repr__(self) -> str:
        return "foreign"


@pytest.mark.parametrize("foreign", [Foreign(), {"role": Foreign(), "content": "message 2"}])
def test_no_code_of_the_users_runs_for_a_comparison(foreign: Any) -> None:
    """If an object takes the place of a message, or of a text in it."""
    slow, messages = SlowTexts(), [said(number) for number in range(6)]
    snapshot(messages, slow)
    messages[2] = foreign
    assert "foreign" in repr(stored(snapshot(messages, slow))[2])


def test_files_of_pictures_are_named_each_time() -> None:
    """The screen that a path names may be another one by now."""
    slow, block = SlowTexts(), {"type": "image_file", "path": "/screen.png"}
    content = [{"type": "text", "text": str(number)} for number in range(5)]
    for _ in range(3):
        assert snapshot([{"role": "user", "content": [block, *content]}], slow).names_files
    assert not snapshot([{"role": "user", "content": content}], slow).names_files


def test_containers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small ones, and one that is in many places, which would each be a copy."""
    accepted = []
    monkeypatch.setattr(to_json, "_accepted", lambda own, *_: accepted.append(1) or own)
    encode({"kind": "span", "output": [said(1)] * (MAX_CONTAINERS - 3)})
    assert not accepted
    encode({"kind": "span", "output": [said(1)] * MAX_CONTAINERS})
    assert accepted


@pytest.mark.parametrize(
    "output",
    [
        [1.5] * 50_000,
        list(range(50_000)),
        [[0, 1]] * 20_000,
        {"x" * 200 + str(number): 1 for number in range(5_000)},
        {"inner": {f"key {number}": None for number in range(20_000)}},
        ["text"] * 50_000,
        {(1, number): number for number in range(20_000)},
    ],
    ids=["floats", "numbers", "lists", "long keys", "keys", "texts", "odd keys"],
)
def test_the_size_is_about_that_of_the_json(output: Any) -> None:
    """The queue is bounded by it, and what a record may take below a limit of memory."""
    made = encode({"kind": "span", "output": output})
    assert len(as_json(made)) / 2 < len(made)


def test_threads_of_one_trace_have_their_own_conversations() -> None:
    """One that another thread changes meanwhile is no reason to cut a record."""
    slow, wrong = SlowTexts(), []
    interval = sys.getswitchinterval()

    def work(own: int) -> None:
        messages = [said(own * 1000 + number) for number in range(6)]
        for step in range(300):
            messages = messages[:6] if len(messages) > 20 else [*messages, said(step)]
            if stored(snapshot(messages, slow)) != messages:
                wrong.append(messages)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(6)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(slow.conversations) <= MAX_CONVERSATIONS
