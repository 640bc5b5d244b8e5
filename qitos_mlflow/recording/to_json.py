"""Any value to JSON: whatever it holds, whatever its classes do, whatever other threads do to it.

Runs on the agent's thread; never raises. There are two paths. The fast one copies the containers
and has orjson write the copies. The slow one, for what orjson refuses, makes a copy that orjson is
certain to accept.

orjson crashes the process if a container changes while it is inside: through another thread, or
through Python code that orjson calls (`default`, an Enum's value, a time zone). It also crashes if
such code raises. So it receives nothing but dicts, lists, texts and numbers, and of each container
that holds others our own copy. A dict of texts and numbers, as most chat messages are, needs no
copy: orjson calls no code for it, and no other thread runs meanwhile.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Collection, Mapping, Sequence, Set, ValuesView
from contextlib import suppress
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from enum import Enum
from itertools import islice
from os import PathLike, fspath
from typing import Any
from uuid import UUID

import orjson

from qitos_mlflow.redaction.trim import CUT_HERE, cut

MAX_REPR = 2_000
"""Longest `repr` kept of an unknown object (characters)."""

MAX_ARRAY = 1_000
"""Largest array that is written out (elements); a larger one becomes its shape and type."""

MAX_ITEMS = 20_000
"""Items written of one record's models, mappings, sets and sequences other than list and dict."""

MAX_LEVELS, MAX_CONTAINERS = 250, 350_000
"""Bounds of the fast path. orjson writes 254 levels. A default field (1 MiB of JSON) has room for
no more containers; only a record that holds one container in many places reaches the bound."""

MAX_SLOW_LEVELS, MAX_SLOW_CONTAINERS = 60, 50_000
"""Bounds of the slow path, which takes up to 2 µs a container; the rest is cut."""

_ATOMS = frozenset({str, int, float, bool, type(None)})

_STRICT = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
"""orjson refuses these types, so that it runs no code of theirs. A flat dict may hold some."""


def encode(record: dict[str, Any]) -> bytes:
    """`record` as JSON. Agent's thread; never raises, and leaves `record` as it is."""
    own = record.copy()
    try:
        _own(own, MAX_LEVELS, [MAX_ITEMS, MAX_CONTAINERS])
        return orjson.dumps(own, option=_STRICT)
    except Exception:  # noqa: BLE001 - a key that is no text, a cycle, a huge number, …
        return orjson.dumps(_accepted(own, MAX_SLOW_LEVELS, [MAX_SLOW_CONTAINERS]))


def text_of(value: Any) -> str:
    """The message of an exception, the `repr` of anything else; at most `MAX_REPR` characters."""
    try:
        text = str.__str__(str(value) if isinstance(value, BaseException) else repr(value))
    except Exception:  # noqa: BLE001 - the class's own __repr__
        return f"<{type(value).__qualname__} without a repr>"
    return text if len(text) <= MAX_REPR else cut(text, MAX_REPR)


def finite(value: Any) -> Any:
    """`value`, but NaN and infinity as a text: a sink counts it, while JSON would have null."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _own(own: Any, levels: int, budget: list[int]) -> None:
    """Replace every container in `own`, a dict or list of ours, by a copy; the fast path.

    Args:
        own: what is changed.
        levels: how many more are allowed.
        budget: how many more items and containers are allowed; counted down.

    Raises:
        RecursionError: there are more.
    """
    budget[1] -= 1
    if levels == 0 or budget[1] < 0:
        raise RecursionError
    for key, item in own.items() if type(own) is dict else enumerate(own):
        kind = type(item)
        if kind is str or item is None or kind in _ATOMS:
            continue
        if kind is dict:
            if _nested(item):
                own[key] = item = item.copy()  # One step: no other thread runs in between.
                _own(item, levels - 1, budget)
        elif kind is list:
            own[key] = item = [*item]
            if not _ATOMS.issuperset(map(type, item)):
                _own(item, levels - 1, budget)
        elif kind is tuple:
            if not _ATOMS.issuperset(map(type, item)):  # Else nothing in it can change.
                own[key] = item = [*item]
                _own(item, levels - 1, budget)
        else:
            known = [_known(item, budget)]
            _own(known, levels - 1, budget)
            own[key] = known[0]


def _refers(values: dict[Any, Any]) -> bool:
    """Whether `values` holds anything that may refer to something else: a container, an Enum."""
    return not _ATOMS.issuperset(map(type, values.values()))


# The garbage collector answers ten times faster. From 3.13 on it does not know an object's
# `__dict__`.
_nested = gc.is_tracked if sys.version_info < (3, 13) else _refers


def _accepted(value: Any, levels: int, budget: list[int]) -> Any:
    """A copy of `value` that orjson is certain to accept; the slow path. Never raises.

    What raises, and what exceeds `levels` or `budget`, becomes a few words; the rest stays intact.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or kind is float or kind is bool:
        return value
    try:
        if kind is int:
            return value if -(2**63) <= value < 2**64 else str(value)
        if kind is dict or kind is list or kind is tuple:
            budget[0] -= 1
            if levels == 0 or budget[0] < 0:
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
            left = [max(0, budget[0]) // 4]  # The rest is for what stands beside it.
            budget[0] -= left[0]
            known = _known(value, left)
            budget[0] += left[0]
            return _accepted(known, levels - 1, budget)
    except Exception:  # noqa: BLE001 - the class's own code
        return _accepted(text_of(value), 0, budget)
    return f"<{kind.__qualname__}, cut>"


def _name(key: Any, levels: int, budget: list[int]) -> str:
    """`key` as a text: what is not text becomes its JSON, bytes their `repr`."""
    if issubclass(type(key), bytes):
        return text_of(key)  # As a value only the length is kept; here it is the name.
    key = _accepted(key, levels, budget)
    return key if type(key) is str else orjson.dumps(key).decode()


def _known(value: Any, budget: list[int]) -> Any:
    """`value`, which orjson cannot write, as something simpler; cheap, however large it is.

    Runs as little code of its class as possible. Subclasses of str, int, float, dict and list run
    none.
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
        if kind is UUID:
            return str(value)
        if is_dataclass(kind):
            return _attributes(value)
        if hasattr(kind, "__pydantic_fields_set__") or hasattr(kind, "__fields_set__"):
            return _first_pairs(_attributes(value), budget)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{len(value)} bytes>"
        if hasattr(kind, "shape"):
            return _array(value)
        if isinstance(value, Mapping):
            return _first_pairs(value, budget)
        if isinstance(value, (Set, Sequence, ValuesView)):
            return _first(value, budget)
        if isinstance(value, PathLike):
            return fspath(value)
    except Exception:  # noqa: BLE001 - the class's own code
        pass
    return text_of(value)


def _attributes(value: Any) -> dict[str, Any]:
    """The public attributes, as far as they are set, of a dataclass's or a pydantic instance.

    Runs code of the class only if it is a dataclass with slots.
    """
    held: dict[str, Any] = {}
    for name in ("__dict__", "__pydantic_extra__"):
        with suppress(AttributeError):
            held.update(object.__getattribute__(value, name) or {})
    if not held and is_dataclass(value):
        names = (field.name for field in fields(value))
        held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {name: item for name, item in held.items() if name[:1] != "_"}


def _first_pairs(value: Mapping[Any, Any], budget: list[int]) -> dict[Any, Any]:
    pairs = _first(value.items(), budget)
    if pairs and type(pairs[-1]) is str:
        pairs[-1] = ("…", pairs[-1])
    return dict(pairs)


def _first(values: Collection[Any], budget: list[int]) -> list[Any]:
    """As many of `values` as the budget allows; the last is a note of their number if some lack."""
    items = list(islice(values, budget[0] + 1))
    if len(items) > budget[0]:
        items[-1] = f"{CUT_HERE}{len(values)} items in all]"
    budget[0] = max(0, budget[0] - len(items))
    return items


def _array(value: Any) -> Any:
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
    return text_of(value)
