"""Any value to JSON, whatever it holds and whatever happens to it meanwhile. On the agent's thread.

orjson is given dicts, lists, texts and numbers alone, and of a container that holds others always
our own copy. It keeps pointers into the container it is in, and crashes the process where that one
changes meanwhile: by another thread, or by Python code that it calls (`default`, an Enum's value,
a time zone). It crashes as well where such code raises. A dict of texts and numbers, as most chat
messages are, calls none, and needs no copy: no other thread runs while it is read.
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
"""Characters kept of an unknown object's `repr`."""

MAX_ARRAY = 1_000
"""Elements of an array, or of whatever has a shape, that is written out; larger ones are told."""

MAX_DEPTH, MAX_NODES = 24, 20_000
"""Bounds of containers that are neither list, tuple nor dict, and of the slow path for payloads
that orjson refuses (cycles, lone surrogates, …)."""

MAX_LEVELS = 250
"""Levels of lists and dicts that orjson is given; it takes 254."""

MAX_CONTAINERS = 350_000
"""Lists and dicts copied: no more fit into the 1 MiB of JSON that a field has by default. Beyond,
where one that holds another twice holds it twice and so on, the slow path is taken."""

_ATOMS = frozenset({str, int, float, bool, type(None)})

_STRICT = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
"""Of what is left of these, `_own` has not seen the inside."""


def encode(record: dict[str, Any]) -> bytes:
    """`record` as JSON; total: whatever it holds, something readable comes out."""
    budget = [MAX_NODES, MAX_CONTAINERS]
    try:
        own = record.copy()
        _own(own, MAX_LEVELS, budget)
        try:
            return orjson.dumps(own, option=_STRICT)
        except TypeError:
            return orjson.dumps(_exact(own, budget))
    except Exception:  # noqa: BLE001 - too deep, too large a number, somebody else's __eq__, …
        return orjson.dumps(_plain(record, MAX_DEPTH, [MAX_NODES]))


def text_of(value: Any) -> str:
    """What an exception says, the `repr` of anything else; bounded."""
    try:
        text = str.__str__(str(value) if isinstance(value, BaseException) else repr(value))
    except Exception:  # noqa: BLE001 - somebody else's __repr__
        return f"<{type(value).__qualname__} without a repr>"
    return text if len(text) <= MAX_REPR else cut(text, MAX_REPR)


def _own(own: Any, levels: int, budget: list[int]) -> None:
    """Put copies in the place of all containers in `own`, a dict or list that is ours."""
    budget[1] -= 1
    if levels == 0 or budget[1] < 0:
        raise RecursionError
    for key, item in own.items() if type(own) is dict else enumerate(own):
        kind = type(item)
        if kind is str or item is None or kind in _ATOMS:
            continue
        if kind is dict:
            if _nested(item):
                own[key] = item = item.copy()  # In one go: no other thread comes in between.
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
    """Whether anything in `values` may refer to something else: a container, an Enum."""
    return not _ATOMS.issuperset(map(type, values.values()))


# The garbage collector knows it ten times faster; from 3.13 on not of an object's `__dict__`.
_nested = gc.is_tracked if sys.version_info < (3, 13) else _refers


def _exact(value: Any, budget: list[int]) -> Any:
    """What is left to do where orjson refuses what `_own` has made: keys, and what it skipped."""
    kind = type(value)
    if kind is dict:
        return {
            key if type(key) is str else _text_key(key, budget): _exact(item, budget)
            for key, item in value.items()
        }
    if kind is list or kind is tuple:
        return [_exact(item, budget) for item in value]
    if kind in _ATOMS:
        return value
    known = [_known(value, budget)]
    _own(known, MAX_DEPTH, budget)
    return _exact(known[0], budget)


def _text_key(key: Any, budget: list[int]) -> str:
    """`key` as a text; what is none, as JSON."""
    if issubclass(type(key), bytes):
        return text_of(key)  # Of a value the length will do; here it is the name.
    key = _exact(key, budget)
    return key if type(key) is str else orjson.dumps(key).decode()


def _known(value: Any, budget: list[int]) -> Any:
    """What orjson cannot write by itself, as something it can; cheap, however large it is."""
    kind = type(value)
    try:
        if issubclass(kind, str):
            return str.__str__(value)
        if issubclass(kind, int):
            return int.__int__(value)
        if issubclass(kind, dict):
            return dict(dict.items(value))  # By none of its own code.
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
    except Exception:  # noqa: BLE001 - somebody else's class
        pass
    return text_of(value)


def _attributes(value: Any) -> dict[str, Any]:
    """The public attributes of a dataclass's or pydantic's instance, as far as they are set.

    By none of its own code, but where a dataclass has slots.
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
    """As many of `values` as the budget allows, and how many there are where that is not all."""
    items = list(islice(values, budget[0] + 1))
    if len(items) > budget[0]:
        items[-1] = f"{CUT_HERE}{len(values)} items in all]"
    budget[0] = max(0, budget[0] - len(items))
    return items


def _array(value: Any) -> Any:
    """A number or an array of numpy's, or something like it (a tensor, a data frame)."""
    shape = tuple(value.shape)
    if math.prod(shape) > MAX_ARRAY:
        # Its repr may be slow, or copy it from another device.
        kind = getattr(value, "dtype", "")
        return f"<{type(value).__qualname__} {shape} {kind}".rstrip() + ">"
    numpy = sys.modules.get("numpy")  # Perhaps half imported, by another thread.
    array, scalar = (getattr(numpy, name, ()) for name in ("ndarray", "generic"))
    plain: Any = value
    if isinstance(value, array):
        plain = value.tolist()
    elif isinstance(value, scalar) and value.dtype.kind not in "mM":
        plain = value.item()
    # Of some types it is what it was; of a time, nanoseconds.
    return plain if type(plain) in (bool, int, float, str, list) else text_of(value)


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    """A copy of `value` that orjson is sure to take, cut where it is too deep or too large."""
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        return f"<{type(value).__qualname__}, cut>"
    try:
        return _plain_of(value, depth, budget)
    except Exception:  # noqa: BLE001 - somebody else's class: it alone becomes its text
        return _plain_of(text_of(value), depth, budget)


def _plain_of(value: Any, depth: int, budget: list[int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value).encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        pairs = list(islice(value.items(), budget[0] + 1))
        return {_key(key, budget): _plain(item, depth - 1, budget) for key, item in pairs}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(islice(value, budget[0] + 1))
        return [_plain(item, depth - 1, budget) for item in items]
    if depth == 1:  # What comes of it would be too deep, and may be large.
        return f"<{type(value).__qualname__}, cut>"
    share = max(0, budget[0]) // 4  # What stands beside it needs some, too.
    return _plain(_known(value, [share]), depth - 1, budget)


def _key(key: Any, budget: list[int]) -> Any:
    try:
        key = str(key)
    except Exception:  # noqa: BLE001
        key = text_of(key)
    return _plain(key, 1, budget)
