"""Any value to JSON: whatever it holds, whatever its classes do, whatever other threads do to it.

`encode` runs on the agent's thread and raises nothing but `MemoryError`. It writes JSON. If the
memory of the process is limited, it writes marshal's bytes, because orjson ends a process whose
memory is over. `as_json` makes JSON of them on the spooling thread.

There are two paths. The fast one copies the containers and has the copies written. The slow one,
for all else, makes a copy of what JSON has.

orjson crashes the process if a container changes while it is inside: through another thread, or
through Python code that it calls (`default`, an Enum's value, a time zone). So it, and marshal,
receive nothing but dicts whose keys are texts, lists, tuples, texts and numbers, and of each
container that holds others our own copy. A dict of texts and numbers, as most chat messages are,
needs no copy: no code is called for it, and no other thread runs meanwhile.
"""

from __future__ import annotations

import marshal
from collections.abc import Collection
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow._guard import let_through
from qitos_mlflow.recording.simpler import Budget, SlowTexts, known, text_of

MAX_LEVELS, MAX_CONTAINERS = 250, 350_000
"""Bounds of the fast path. orjson has 254 levels. A default field (1 MiB of JSON) has room for no
more containers; only a record that holds one container in many places reaches the bound."""

MAX_SLOW_LEVELS, MAX_SLOW_CONTAINERS = 60, 50_000
"""Bounds of the slow path, which takes up to 2 µs a container; the rest is cut."""

SHARE, SMALL_BYTES = 8, 64 * 1024
"""A record takes at most an eighth of the memory that is left below a limit: the rest is the
agent's. What is no larger is always taken."""

_FORMAT = 2
"""Marshal's. Later ones write an object that is in many places once, so the size of the bytes would
not say how much there is, and keep each interned text for ever (3.13)."""


def encode(record: dict[str, Any], slow: SlowTexts | None = None) -> bytes:
    """`record` as bytes for `as_json`; `slow` is its trace's. Agent's thread; never changes it.

    Raises:
        MemoryError: there is too little memory, and nothing else.
    """
    own, budget = record.copy(), Budget(slow or SlowTexts(), MAX_CONTAINERS)
    limited = _json.is_limited()
    try:
        _own(own, MAX_LEVELS, budget)
        if not limited:
            return _json.dumps_strict(own)
        _check_keys(own)
        payload = marshal.dumps(own, _FORMAT)
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - a cycle, a key that is no text, …
        let_through(error)
        budget.containers = MAX_SLOW_CONTAINERS
        accepted = _accepted(own, MAX_SLOW_LEVELS, budget)
        if not limited:
            return _json.dumps_strict(accepted)
        try:
            payload = marshal.dumps(accepted, _FORMAT)
        except ValueError:  # How marshal says that it got no memory for a text.
            raise MemoryError from None
    if len(payload) > SMALL_BYTES:
        left = _json.memory_left()
        if left is not None and len(payload) * SHARE > left:
            raise MemoryError
    return payload


def is_json(payload: bytes) -> bool:
    """Whether `encode` wrote it as JSON."""
    return payload.startswith(b'{"')


def as_json(payload: bytes) -> bytes:
    """The JSON of what `encode` wrote. Spooling thread.

    Raises:
        MemoryError: there is too little memory, and nothing else.
    """
    if is_json(payload):
        return payload
    record = marshal.loads(payload)  # noqa: S302 - from this process's memory
    try:
        return _json.dumps(record)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - half a character, a huge number
        budget = Budget(SlowTexts(), MAX_SLOW_CONTAINERS)
        return _json.dumps(_accepted(record, MAX_SLOW_LEVELS, budget))


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
    """
    budget.containers -= 1
    if levels == 0 or budget.containers < 0:
        raise RecursionError
    for key, item in own.items() if type(own) is dict else enumerate(own):
        kind = type(item)
        if kind is str or item is None or kind is int or kind is bool:
            continue
        if kind is float:
            own[key] = _number(item)
        elif kind is dict:
            if not _plain(item.values()):  # Raises if another thread changes it: the slow path.
                own[key] = item = item.copy()  # One step: no other thread runs in between.
                _own(item, levels - 1, budget)
        elif kind is list:
            own[key] = item = [*item]
            if not _plain(item):
                _own(item, levels - 1, budget)
        elif kind is tuple:
            if not _plain(item):  # Else nothing in it can change.
                own[key] = item = [*item]
                _own(item, levels - 1, budget)
        else:
            simple = [known(item, budget)]
            _own(simple, levels - 1, budget)
            own[key] = simple[0]


def _check_keys(own: Any) -> None:
    """See that keys are texts, as orjson does.

    Raises:
        TypeError: one is none. Of what has a buffer, such as numpy's texts, marshal would write the
            bytes, and redaction would not know the name.
    """
    if type(own) is dict:
        for key in own:
            if type(key) is not str:
                raise TypeError
        own = own.values()
    for item in own:
        kind = type(item)
        if kind is dict or kind is list or kind is tuple:
            _check_keys(item)


def _plain(values: Collection[Any]) -> bool:
    """Whether JSON has each of `values`, of a container of ours, as it is."""
    for value in values:
        kind = type(value)
        if kind is str or value is None or kind is int or kind is bool:
            continue
        if kind is not float or value - value != 0:  # That is so of NaN and infinity.
            return False
    return True


def _accepted(value: Any, levels: int, budget: Budget) -> Any:
    """A copy of `value` with nothing but what JSON has; the slow path. Never raises.

    What raises, and what exceeds `levels` or `budget`, becomes a few words; the rest stays intact.
    """
    kind = type(value)
    if kind is str:
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
            if kind is dict:
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
