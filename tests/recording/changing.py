"""Payloads that change, or raise, while a snapshot is made: such ones crashed the process once.

A program, so that a crash is the end of it and not of the tests:

    python -m tests.recording.changing alone|threads

It prints the name of each payload before it makes the snapshot.
"""

from __future__ import annotations

import enum
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, cast

import orjson

from qitos_mlflow.recording import to_json
from qitos_mlflow.recording.simpler import SlowTexts


def encode(record: dict[str, Any], slow: SlowTexts | None = None) -> bytes:
    """The JSON of a record, as the spooling thread makes it of what the agent's thread has made."""
    return to_json.as_json(to_json.encode(record, slow))


live: Any = None
"""The container whose snapshot is being made."""

_junk: list[bytearray] = []


def forget() -> None:
    """Empty the container, and fill the memory that it used."""
    live.clear()
    _junk.extend(bytearray(64) for _ in range(2000))


class Unknown:
    """Its text is made by code of its own."""

    def __repr__(self) -> str:
        forget()
        return "o"


class Valued(enum.Enum):
    """So is the value of this."""

    A = 1

    @property
    def value(self) -> int:
        forget()
        return 1


class Raising(enum.Enum):
    """It has none."""

    A = 1

    @property
    def value(self) -> int:
        raise RuntimeError


class Holding(enum.Enum):
    """Its value is a container that can be changed."""

    A = cast("list[Any]", [])


class Zone(tzinfo):
    """A time zone that raises, but not where a time becomes a key."""

    raises = False

    def utcoffset(self, when: datetime | None) -> timedelta:
        if self.raises:
            forget()
            raise RuntimeError
        return timedelta(0)


@dataclass
class Slotted:
    """As `@dataclass(slots=True)` makes it."""

    __slots__ = ("a", "b")
    a: Any
    b: int


class Sublist(list[Any]):
    """A user's list."""


class Subdict(dict[Any, Any]):
    """A user's dict."""


def unset() -> Slotted:
    """One of its fields has no value yet."""
    slotted = Slotted(1, 2)
    del slotted.b
    return slotted


def listed(first: Any, kind: Callable[[], Any] = list) -> Any:
    """A list that begins with `first` and goes on with what is easily lost."""
    live = kind()
    live.extend([first, *(f"s{i}" * 10 for i in range(2000)), *({"a": i} for i in range(2000))])
    return live


def mapped(first: Any, kind: Callable[[], Any] = dict, key: Any = "first") -> Any:
    """The same as a dict."""
    live = kind()
    live.update({key: first, **{f"k{i}": f"s{i}" * 10 for i in range(2000)}})
    return live


def held() -> Any:
    """The list that `Holding.A` is."""
    Holding.A.value.extend(listed(Unknown()))
    return Holding.A.value


MOMENT = datetime(2026, 1, 2, tzinfo=Zone())

PAYLOADS: dict[str, Callable[[], tuple[Any, Any]]] = {
    # What is emptied, and what is encoded if that is not the same.
    "unknown in a list": lambda: (listed(Unknown()), None),
    "unknown in a dict": lambda: (mapped(Unknown()), None),
    "unknown in a subclass of list": lambda: (listed(Unknown(), Sublist), None),
    "unknown in a subclass of dict": lambda: (mapped(Unknown(), Subdict), None),
    "unknown in a deque": lambda: (listed(Unknown(), deque), None),
    "list in a deque": lambda: (inner := listed(Unknown()), deque([inner])),
    "list in a dataclass": lambda: (inner := listed(Unknown()), Slotted(inner, 1)),
    "list in an enum": lambda: (held(), [Holding.A]),
    "enum in a list": lambda: (listed(Valued.A), None),
    "enum in a dict": lambda: (mapped(Valued.A), None),
    "enum as a key": lambda: (mapped(1, key=Valued.A), None),
    "enum without a value": lambda: (listed(Raising.A), None),
    "enum without a value as a key": lambda: (mapped(1, key=Raising.A), None),
    "time in a list": lambda: (listed(MOMENT), None),
    "time as a key": lambda: (mapped(1, key=MOMENT), None),
    "dataclass without one of its fields": lambda: (listed(unset()), None),
    "dataclass in a list": lambda: (listed(Slotted(Unknown(), 1)), None),
}


def say(text: str) -> None:
    """Print `text` at once, so that the output of a crashed process shows how far it came."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def alone() -> None:
    """Every one of `PAYLOADS`, changed by the code of what is in it."""
    global live
    for name, made in PAYLOADS.items():
        Zone.raises = False
        say(name)
        live, payload = made()
        Zone.raises = True
        record = {"value": live if payload is None else payload, "beside": 1}
        assert orjson.loads(encode(record))["beside"] == 1


def threads() -> None:
    """Lists and dicts that other threads change all the time."""
    log: list[Any] = []
    jobs: dict[str, Any] = {}
    done = threading.Event()

    def trim() -> None:
        while not done.is_set():
            log.append({"file": Path("/tmp/x"), "line": "y" * len(log)})
            if len(log) > 40:
                del log[:20]

    def replace() -> None:
        at = 0
        while not done.is_set():
            at += 1
            jobs[f"job{at % 50}"] = {"path": Path("/tmp/x"), "text": f"{at}" * 9}
            jobs.pop(f"job{at * 3 % 50}", None)
            if at % 500 == 0:
                jobs.clear()

    changing = [threading.Thread(target=target) for target in (trim, replace)]
    for thread in changing:
        thread.start()
    sys.setswitchinterval(1e-5)
    try:
        for name, value in (("list", log), ("dict", jobs)):
            say(name)
            for _ in range(ROUNDS):
                encode({"kind": "span", "output": {"live": value}})
    finally:
        done.set()
        for thread in changing:
            thread.join()


ROUNDS = 300
"""Enough to crash ten times of ten where orjson is given what other threads change."""

if __name__ == "__main__":
    {"alone": alone, "threads": threads}[sys.argv[1]]()
    say("no crash")
