"""Any value to JSON: whatever it holds, whatever its classes do, whatever other threads do to it.

`encode` runs on the agent's thread and raises nothing but `MemoryError`. It copies the containers,
and shares the texts and numbers in them, which cannot change. So its time does not depend on how
long the texts are, and the queue holds no second copy of them. `as_json` writes the JSON, on the
spooling thread.

There are two paths. The fast one takes lists, dicts with texts as keys, texts and numbers as they
are. The slow one, for all else, makes what JSON has of it.

orjson crashes the process if a container changes while it is inside: through another thread, or
through Python code that it calls (`default`, an Enum's value, a time zone). It receives nothing but
our own copies of dicts and lists, texts and numbers.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow._guard import let_through
from qitos_mlflow.recording.simpler import MAX_CONVERSATIONS, Budget, SlowTexts, known, text_of

MAX_LEVELS, MAX_CONTAINERS = 250, 350_000
"""Bounds of the fast path. orjson has 254 levels. A default field (1 MiB of JSON) has room for no
more containers; only a record that holds one container in many places reaches the bound."""

MAX_SLOW_LEVELS, MAX_SLOW_CONTAINERS = 60, 50_000
"""Bounds of the slow path, which takes up to 2 µs a container; the rest is cut."""

CONTAINER_BYTES, ITEM_BYTES = 100, 30
"""What a container takes, and each item in it beside its text, about as much as in JSON (bytes)."""

LEAST_MESSAGES = 4
"""A shorter list is copied at once, whatever it is."""

_TEXTS = {str, type(None)}

SHARE, SMALL_BYTES = 8, 64 * 1024
"""A record takes at most an eighth of the memory that is left below a limit: the rest is the
agent's. What is no larger is always taken."""

IMAGE_FILE = "image_file"
"""The type of a block that names the file of a picture."""


class Snapshot:
    """A record as it was: containers of its own, with nothing in them but what JSON has.

    Attributes:
        record: the record. Never changed.
        names_files: some block in it has the type `IMAGE_FILE`.
    """

    __slots__ = ("_size", "names_files", "record")

    def __init__(self, record: dict[str, Any], size: int, names_files: bool) -> None:
        self.record, self._size, self.names_files = record, size, names_files

    def __len__(self) -> int:
        """About what it takes in memory, with the texts that it shares, and as JSON (bytes)."""
        return self._size


def encode(record: dict[str, Any], slow: SlowTexts | None = None) -> Snapshot:
    """What `as_json` makes JSON of; `slow` is its trace's. Agent's thread; never changes `record`.

    Raises:
        MemoryError: there is too little memory, and nothing else.
    """
    own, most = record.copy(), MAX_CONTAINERS
    budget = Budget(slow or SlowTexts(), most)
    try:
        _own(own, MAX_LEVELS, budget)
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - a cycle, a key that is no text, …
        let_through(error)
        budget.containers = most = MAX_SLOW_CONTAINERS
        budget.chars = 0
        own = _accepted(own, MAX_SLOW_LEVELS, budget)
    size = budget.chars + CONTAINER_BYTES * (most - budget.containers)
    if size > SMALL_BYTES:
        left = _json.memory_left()
        if left is not None and size * SHARE > left:
            raise MemoryError
    return Snapshot(own, size, budget.names_files)


def as_json(snapshot: Snapshot | bytes) -> bytes:
    """The JSON of what `encode` made; JSON as it is. Spooling thread.

    Raises:
        MemoryError: there is too little memory, and nothing else.
    """
    if isinstance(snapshot, bytes):
        return snapshot
    try:
        return _json.dumps(snapshot.record)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - half a character, a huge number
        budget = Budget(SlowTexts(), MAX_SLOW_CONTAINERS)
        return _json.dumps(_accepted(snapshot.record, MAX_SLOW_LEVELS, budget))


def _number(value: float) -> float | str:
    """`value`, but NaN and infinity as texts: JSON would have null for them."""
    if value - value == 0:
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _own(own: Any, levels: int, budget: Budget) -> None:
    """Replace every container in `own`, a dict or list of ours, by a copy; the fast path.

    Args:
        own: what is changed.
        levels: how many more are allowed.
        budget: how many more items and containers are allowed; counted down.

    Raises:
        RecursionError: there are more.
        TypeError: a key is no text.
    """
    budget.containers -= 1
    if levels == 0 or budget.containers < 0:
        raise RecursionError
    budget.chars += ITEM_BYTES * len(own)
    if type(own) is dict:
        budget.chars += len("".join(own))  # Its keys are texts, or this raises.
    for key, item in own.items() if type(own) is dict else enumerate(own):
        kind = type(item)
        if kind is str:
            budget.chars += len(item)
        elif item is None or kind is int or kind is bool:
            pass
        elif kind is float:
            own[key] = _number(item)
        elif kind is dict:
            own[key] = item = item.copy()  # One step: no other thread runs in between.
            if "type" in item and type(item["type"]) is str and item["type"] == IMAGE_FILE:
                budget.names_files = True
            chars = ITEM_BYTES * len(item)
            # Not `items()`: without memory for a pair, Python crashes (3.11).
            for name in item:
                if type(name) is not str:
                    raise TypeError
                chars += len(name)
                value = item[name]
                kind = type(value)
                if kind is str:
                    chars += len(value)
                elif not (value is None or kind is int or kind is bool):
                    _own(item, levels - 1, budget)
                    break
            else:  # As most messages are: nothing in it has to be copied.
                budget.chars += chars
                budget.containers -= 1
                if budget.containers < 0:
                    raise RecursionError
        elif kind is list or kind is tuple:
            own[key] = item = [*item]
            if len(item) < LEAST_MESSAGES:
                _own(item, levels - 1, budget)
            else:
                _own_conversation(item, levels - 1, budget)
        else:
            simple = [known(item, budget)]
            _own(simple, levels - 1, budget)
            own[key] = simple[0]


def _own_conversation(own: list[Any], levels: int, budget: Budget) -> None:
    """As `_own`, for a list that may be a conversation: it takes the copies from before again.

    Only those of messages with nothing but texts: 1 is equal to True, and only texts have no code
    of their own that runs when they are compared.
    """
    before, chars = budget.containers, budget.chars
    known_lists = budget.slow.conversations  # Other threads put others in its place.
    for copies, known_chars in known_lists:
        begins = own[: len(copies)]
        if len(begins) == len(copies) and _are_texts(begins) and begins == copies:
            rest = own[len(copies) :]
            budget.chars += known_chars
            budget.containers = before - len(copies)
            _own(rest, levels, budget)
            own[:] = [*copies, *rest]
            if rest and not budget.names_files and _are_texts(rest):
                others = (one for one in known_lists if one[0] is not copies)
                budget.slow.conversations = ((own, budget.chars - chars), *others)
            return
    _own(own, levels, budget)
    if not budget.names_files and _are_texts(own):  # Else its files are read again.
        newest = own, budget.chars - chars
        budget.slow.conversations = (newest, *known_lists[: MAX_CONVERSATIONS - 1])


def _are_texts(messages: list[Any]) -> bool:
    """Whether all messages are dicts with nothing but texts."""
    if not {*map(type, messages)} <= {dict}:
        return False
    return {*map(type, chain.from_iterable(map(dict.values, messages)))} <= _TEXTS


def _accepted(value: Any, levels: int, budget: Budget) -> Any:
    """A copy of `value` with nothing but what JSON has; the slow path. Never raises.

    What raises, and what exceeds `levels` or `budget`, becomes a few words; the rest stays intact.
    """
    kind = type(value)
    if kind is str:
        budget.chars += len(value)
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or kind is bool:
        return value
    if kind is float:
        return _number(value)
    try:
        if kind is int:
            return value if -(2**63) <= value < 2**64 else str(value)
        if kind is dict or kind is list or kind is tuple:
            budget.containers -= 1
            if levels == 0 or budget.containers < 0:
                return f"<{kind.__qualname__}, cut>"
            budget.chars += ITEM_BYTES * len(value)
            if kind is dict:
                named = value.get("type")
                budget.names_files |= type(named) is str and named == IMAGE_FILE
                return {
                    key
                    if type(key) is str and key.isascii()
                    else _name(key, levels - 1, budget): _accepted(item, levels - 1, budget)
                    for key, item in value.copy().items()
                }
            return [_accepted(item, levels - 1, budget) for item in [*value]]
        if levels > 0:
            given = max(0, budget.containers) // 4  # The rest is for what stands beside it.
            budget.items = given
            simple = known(value, budget)
            budget.containers -= given - budget.items
            return _accepted(simple, levels - 1, budget)
    except BaseException as error:  # noqa: BLE001 - the class's own code
        let_through(error)
        return _accepted(text_of(value, budget.slow), 0, budget)
    return f"<{kind.__qualname__}, cut>"


def _name(key: Any, levels: int, budget: Budget) -> str:
    """`key` as a text: what is not text becomes its JSON, bytes their `repr`."""
    if issubclass(type(key), bytes):
        return text_of(key, budget.slow)  # As a value only the length is kept; here it is the name.
    key = _accepted(key, levels, budget)
    return key if type(key) is str else _json.dumps(key).decode()
