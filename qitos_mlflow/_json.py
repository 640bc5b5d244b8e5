"""JSON by orjson; near a limit of the process's memory by the standard library, which may fail.

orjson does not look whether it got the memory it asked for: under ``ulimit -v`` it ends the process
(3.9 to 3.13). The standard library's encoder raises `MemoryError`, but takes 20 times as long. So
orjson works as long as there is no limit, or much more left below it than orjson could need. A
container's limit is different: no allocation fails there, the kernel ends a process. The agent's
thread has no time for that look: see `recording.to_json`.
"""

from __future__ import annotations

import json
import marshal
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import orjson

try:
    import resource
except ImportError:  # Windows has no such limits.
    _LIMITS: list[tuple[int, int]] = []
else:
    _LIMITS = [(resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)]
"""Each limit, and which number of ``/proc/self/statm`` it is about."""

SPARE_BYTES = 128 * 1024 * 1024
"""Room that must be left beside what orjson may need: other threads take memory meanwhile."""

DUMPS_FACTOR, LOADS_FACTOR = 256, 48
"""What orjson may need for each byte that marshal or JSON has (measured: at most 212, for a list of
None, and 34, for a list of empty dicts)."""

MOST_PARTS = 2_000_000
"""Values in a JSON text that may be anyone's. A record of ours has 350,000 containers at most.
64 MiB of ``[],`` would take 1.9 GB and half a minute."""
_NO_PART = bytes(set(range(256)) - set(b'",[{'))
_BLOCK_BYTES = 1024 * 1024

JSONDecodeError = json.JSONDecodeError
"""The base class of orjson's, too."""

_STRICT = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
"""orjson refuses these types, so that it runs no code of theirs. A dict that is not copied may hold
some by now: another thread may have put them there."""
INDENT = orjson.OPT_INDENT_2


def dumps(
    value: Any,
    default: Callable[[Any], Any] | None = None,
    option: int | None = None,
) -> bytes:
    """`value` as JSON.

    Args:
        value: of what JSON has, and dataclasses.
        default: makes such a value of another one.
        option: of orjson.

    Raises:
        MemoryError: there is too little memory.
        TypeError, ValueError: JSON cannot hold it.
    """
    if (left := memory_left()) is None:
        return orjson.dumps(value, default, option)
    try:
        size = len(marshal.dumps(value, 2))
    except ValueError:  # A value that only `default` can encode, or that nothing can.
        size = 0
    if 0 < size * DUMPS_FACTOR < left - SPARE_BYTES:
        return orjson.dumps(value, default, option)
    indent, separators = (2, None) if option == INDENT else (None, (",", ":"))
    return json.dumps(
        value,
        ensure_ascii=False,
        allow_nan=False,
        default=partial(_simpler, default),
        indent=indent,
        separators=separators,
    ).encode()


def _simpler(default: Callable[[Any], Any] | None, value: Any) -> Any:
    """What orjson makes of a dataclass by itself, and `default` of anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    if default is None:
        raise TypeError(f"Type is not JSON serializable: {type(value).__qualname__}")
    return default(value)


def loads(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        MemoryError: there is too little memory.
        JSONDecodeError: it is not JSON.
    """
    left = memory_left()
    if left is None or len(data) * LOADS_FACTOR < left - SPARE_BYTES:
        return orjson.loads(data)
    try:
        text = data if isinstance(data, str) else data.decode()
        if "\\ud" in text or "\\uD" in text:  # Half a pair is no text. Rare: we write no escapes.
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        return json.loads(text, parse_int=_integer, parse_constant=_no_number)
    except JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise JSONDecodeError(str(error), "", 0) from None


def loads_foreign(data: bytes) -> Any:
    """`loads` for what may be anyone's: takes some 200 MB beside `data` at most.

    Raises:
        MemoryError, JSONDecodeError: as `loads`; also if there are more than `MOST_PARTS` in it.
    """
    if len(data) > MOST_PARTS and _has_more_parts(data):
        raise JSONDecodeError(f"more than {MOST_PARTS} parts", "", 0)
    return loads(data)


def _has_more_parts(data: bytes) -> bool:
    """Whether more than `MOST_PARTS` are outside of texts."""
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_PART)
    found = in_text = 0
    for at in range(0, len(bare), _BLOCK_BYTES):
        pieces = bare[at : at + _BLOCK_BYTES].split(b'"')
        found += sum(map(len, pieces[in_text::2]))
        in_text = (in_text + len(pieces) - 1) % 2
    return found > MOST_PARTS


def _integer(digits: str) -> int | float:
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(number)  # As orjson has it.


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def dumps_strict(value: Any) -> bytes:
    """`value` as JSON, if it is of what JSON has and memory is not limited (see `is_limited`).

    Raises:
        TypeError: it holds something else.
    """
    return orjson.dumps(value, option=_STRICT)


def is_limited() -> bool:
    """Whether this process has a limit of memory at which allocations fail."""
    # Each time: a program may limit itself at any moment.
    return any(resource.getrlimit(kind)[0] >= 0 for kind, _ in _LIMITS)


def memory_left() -> int | None:
    """How many bytes the process may still take, below a limit of its own.

    None without a limit, 0 if there is one and the system does not say how near it is.
    """
    # Each time: a program may limit itself at any moment.
    found = [(most, at) for kind, at in _LIMITS if (most := resource.getrlimit(kind)[0]) >= 0]
    if not found:
        return None
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pages = os.read(descriptor, 200).split()
        finally:
            os.close(descriptor)
        return max(1, min(most - int(pages[at]) * resource.getpagesize() for most, at in found))
    except (OSError, IndexError):  # Another system, or no descriptor is left.
        return 0
