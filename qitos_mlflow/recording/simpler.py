"""Values that JSON does not have, as something simpler: cheap, however large they are.

Runs on the agent's thread; raises nothing but `MemoryError`. A query set runs a database query for
its `repr`, length or truth value. Of an object that may be one, only the type is looked at.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence, Set, ValuesView
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from enum import Enum
from itertools import islice
from pathlib import PurePath
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from uuid import UUID
from weakref import ref

from qitos_mlflow._guard import let_through
from qitos_mlflow.redaction.trim import CUT_HERE, cut_later

MAX_REPR = 2_000
"""Longest `repr` kept of an unknown object (characters)."""

SLOW_REPR_S, SLOW_CLASS_S, MAX_SLOW = 0.001, 0.1, 100
"""A `repr` that takes longer than the first runs once in a trace. Other objects of its class, such
as the copies that QitOS makes of a state, are its name when slow ones took the second in all. A
trace remembers so many objects and classes."""

MAX_ARRAY = 1_000
"""Largest array that is written out (elements); a larger one becomes its shape and type."""

MAX_ITEMS = 20_000
"""Items written of one record's models, mappings, sets and sequences other than list and dict."""

MAX_CONVERSATIONS = 4
"""Conversations that a trace remembers: of its agent, of sub-agents and of critics."""

HOLD_DATA = frozenset({
    "numpy", "pandas", "polars", "pyarrow", "scipy", "torch", "tensorflow", "jax", "jaxlib", "cupy",
    "sklearn", "PIL", "bs4", "pint", "requests",
})  # fmt: skip
"""Packages whose objects have their data at hand, or have a `repr` that fetches none."""


class SlowTexts:
    """What the slow `repr`s of one trace gave, and how long they took; any thread."""

    def __init__(self) -> None:
        self.texts: dict[int, tuple[ref[Any], str]] = {}  # By id, which another object may get.
        self.spent_s: dict[str, float] = {}  # By the class's name.
        self.conversations: tuple[tuple[list[Any], int], ...] = ()
        """Copies of the last lists of messages, each with its size (bytes)."""

    def add(self, value: Any, text: str, took_s: float) -> None:
        """Remember the text for as long as its object lives."""
        if len(self.texts) + len(self.spent_s) >= MAX_SLOW:
            self.texts.clear()
            self.spent_s.clear()
        name = type(value).__qualname__
        self.spent_s[name] = self.spent_s.get(name, 0) + took_s
        with suppress(TypeError):  # Its class has slots: nothing says how long it lives.
            self.texts[id(value)] = ref(value), text


def text_of(value: Any, slow: SlowTexts) -> str:
    """The message of an exception, the `repr` of anything else; at most `MAX_REPR` characters."""
    held, kind = slow.texts.get(id(value)), type(value)
    if held is not None and held[0]() is value:
        return held[1]
    if slow.spent_s.get(kind.__qualname__, 0) > SLOW_CLASS_S:
        return f"<{kind.__qualname__}, slow repr>"
    began_s = perf_counter()
    try:
        text = str.__str__((str if issubclass(kind, BaseException) else repr)(value))
    except BaseException as error:  # noqa: BLE001 - the class's own __repr__
        let_through(error)
        text = f"<{kind.__qualname__} without a repr>"
    text = text if len(text) <= MAX_REPR else cut_later(text, MAX_REPR)
    if (took_s := perf_counter() - began_s) > SLOW_REPR_S:
        slow.add(value, text, took_s)
    return text


class Budget:
    """How much more one record may hold, and what it holds so far.

    Attributes:
        chars: about how large it is without its containers (bytes).
        names_files: some block names the file of a picture.
    """

    __slots__ = ("chars", "containers", "items", "names_files", "slow", "texts")

    def __init__(self, slow: SlowTexts, containers: int) -> None:
        self.items, self.containers, self.slow = MAX_ITEMS, containers, slow
        self.chars, self.names_files = 0, False
        # By id, with the object: it stays alive, so that no other one gets its id.
        self.texts: dict[int, tuple[Any, str]] = {}


def known(value: Any, budget: Budget) -> Any:
    """`value`, which JSON does not have, as something simpler; once, if that is a text."""
    if (held := budget.texts.get(id(value))) is not None:
        return held[1]
    simple = _simpler(value, budget)
    if type(simple) is str:
        budget.texts[id(value)] = value, simple
    return simple


def _simpler(value: Any, budget: Budget) -> Any:
    """`value` as something simpler; cheap, however large it is.

    Runs as little code of its class as possible (`isinstance` would ask the object for its class).
    Subclasses of str, int, float, dict and list run none.
    """
    kind = type(value)
    try:
        if issubclass(kind, str):
            return str.__str__(value)
        if issubclass(kind, int):
            return int.__int__(value)
        if issubclass(kind, float):
            return float.__float__(value)
        if issubclass(kind, dict):
            return dict(dict.items(value))
        if issubclass(kind, list):
            return [*list.__iter__(value)]
        if issubclass(kind, Enum):
            return value.value
        if kind in (datetime, date, time):
            return value.isoformat()
        # Of other paths, some download a file when they are asked for one.
        if kind is UUID or issubclass(kind, PurePath):
            return str(value)
        if hasattr(kind, "__attrs_attrs__") or is_dataclass(kind) or kind is SimpleNamespace:
            return _attributes(value)
        if hasattr(kind, "__pydantic_fields_set__") or hasattr(kind, "__fields_set__"):
            return _first_pairs(_attributes(value), budget)
        if issubclass(kind, (bytes, bytearray, memoryview)):
            return f"<{len(value)} bytes>"
        if issubclass(kind, Mapping):
            return _first_pairs(value, budget)
        if issubclass(kind, (Set, Sequence, ValuesView)):
            return _first(value, budget)
        if _may_fetch(kind):
            return f"<{kind.__qualname__}>"
        if hasattr(kind, "shape"):
            return _array(value, budget)
    except BaseException as error:  # noqa: BLE001 - the class's own code
        let_through(error)
    return text_of(value, budget.slow)


def _may_fetch(kind: type) -> bool:
    """Whether looking at an object of `kind` may fetch or compute what it stands for.

    True for classes that can be iterated, counted or indexed, or turned into a table or an array,
    unless they are Python's own or from a package in `HOLD_DATA`.
    """
    looks = ("__iter__", "__len__", "__getitem__", "__array__", "__dataframe__", "shape")
    if not any(hasattr(kind, look) for look in looks):
        return False
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return roots[0] not in sys.stdlib_module_names and HOLD_DATA.isdisjoint(roots)


def _attributes(value: Any) -> dict[str, Any]:
    """The public attributes, as far as they are set, of a dataclass's, attrs' or pydantic instance.

    Runs code of the class only if it has slots.
    """
    held: dict[str, Any] = {}
    for name in ("__dict__", "__pydantic_extra__"):
        with suppress(AttributeError):
            held.update(object.__getattribute__(value, name) or {})
    if not held:
        of = fields(value) if is_dataclass(value) else getattr(type(value), "__attrs_attrs__", ())
        held = {one.name: getattr(value, one.name) for one in of if hasattr(value, one.name)}
    return {name: item for name, item in held.items() if name[:1] != "_"}


def _first_pairs(value: Mapping[Any, Any], budget: Budget) -> dict[Any, Any]:
    pairs = _first(value.items(), budget)
    if pairs and type(pairs[-1]) is str:
        pairs[-1] = ("…", pairs[-1])
    return dict(pairs)


def _first(values: Collection[Any], budget: Budget) -> list[Any]:
    """As many of `values` as the budget allows; the last is a note of their number if some lack."""
    items = list(islice(values, budget.items + 1))
    if len(items) > budget.items:
        items[-1] = f"{CUT_HERE}{len(values)} items in all]"
    budget.items = max(0, budget.items - len(items))
    return items


def _array(value: Any, budget: Budget) -> Any:
    """A numpy number or array, or a similar object (a tensor, a data frame), as JSON or text."""
    shape = tuple(value.shape)
    if math.prod(shape) > MAX_ARRAY:
        # Its repr may be slow, or copy the array from another device.
        kind = getattr(value, "dtype", "")
        return f"<{type(value).__qualname__} {shape} {kind}".rstrip() + ">"
    numpy = sys.modules.get("numpy")  # Another thread may be importing it.
    array, scalar = (getattr(numpy, name, ()) for name in ("ndarray", "generic"))
    if isinstance(value, array) or (isinstance(value, scalar) and value.dtype.kind not in "mM"):
        plain = value.tolist()
        if type(plain) in (bool, int, float, str, list):  # Some types give back themselves.
            return plain
    return text_of(value, budget.slow)
