"""Tells what code raises itself from what interrupts it: Ctrl-C, signal handlers, other threads.

Both leave a plugin as an exception. What the plugin raises is its own failure, whatever its class.
What interrupts it is meant for the program, which happened to be in the plugin. The traceback tells
them apart: it ends where the exception came into being.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from opcode import opmap
from types import FrameType
from typing import Any

from qitos_mlflow._inheritance import Forked

MAX_EXCEPTIONS = 100
"""So many are looked at: those in groups, and those that were being handled."""

_BARE = frozenset(
    {"CancelledError", "Empty", "GeneratorExit", "StopAsyncIteration", "StopIteration"}
)
"""Classes that C code raises without arguments."""

_RAISE = opmap["RAISE_VARARGS"]
_HAS_STAR_ARGS = 0x04  # `inspect` has a name for this bit of `co_flags`, and takes 10 ms to import.
_Group: Any = getattr(builtins, "BaseExceptionGroup", None)  # 3.11 and later.


def interruption(error: BaseException) -> BaseException | None:
    """The exception that interrupted the code which `error` has left; None: it is the code's own.

    It may be `error` itself, be in a group, or, unless it is an `Exception`, be what the code was
    handling when it raised `error`. It is one of these:

    - What a signal handler raises. The handler's frame has the frame below it as an argument.
    - A `KeyboardInterrupt` that no ``raise`` made, or one of the standard library's: Ctrl-C.
    - Another exception that no ``raise`` made, with the arguments that its class gives it: another
      thread has injected the class, by `PyThreadState_SetAsyncExc`.

    A `MemoryError` counts as the code's own. Python 3.12 and 3.13 may crash when a frame is read
    that got no memory for its variables.

    Call it where `error` is caught. Any thread; never raises.
    """
    try:
        if issubclass(type(error), MemoryError):
            return None
        return next((one for one in _all(error) if _is_from_outside(one)), None)
    except BaseException:  # noqa: BLE001 - a class of the user's, or no memory
        return None


def let_through(error: BaseException) -> None:
    """Raise what interrupted the code that `error` has left, if anything did."""
    if (outside := interruption(error)) is not None:
        raise outside


def _all(error: BaseException) -> Iterator[BaseException]:
    """`error`, what is in it, and what was handled meanwhile by the code that it has left."""
    left, seen, frames = [error], set[int](), set[FrameType]()
    while left and len(seen) < MAX_EXCEPTIONS:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        # The first frame is that of the guard, or was left before.
        frames.update(islice(_frames(one), 1, None))
        handled = _get("__context__", one)
        if handled is not None and not frames.isdisjoint(islice(_frames(handled), 1)):
            left += [] if issubclass(type(handled), Exception) else [handled]
        if _Group is not None and issubclass(type(one), _Group):
            left += _Group.exceptions.__get__(one)


def _is_from_outside(error: BaseException) -> bool:
    kind, trace = type(error), _get("__traceback__", error)
    if any(_is_handler(frame, before) for before, frame in pairwise(_frames(error))):
        return True
    if kind is Forked or trace is None:
        return kind is Forked
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame, code = trace.tb_frame, trace.tb_frame.f_code
    raised = _is_raised(code.co_code, trace.tb_lasti)
    if kind is KeyboardInterrupt:
        home = str(frame.f_globals.get("__name__")).partition(".")[0]
        return not raised or home in sys.stdlib_module_names  # Such as asyncio's own handler.
    if raised or kind.__name__ in _BARE or (kind is SystemExit and _calls_exit(frame)):
        return False
    given = _get("args", error)
    return given == () or bool(given == kind().args)


def _is_raised(instructions: bytes, at: int) -> bool:
    """Whether the code raises there by itself. Compiled code has a traceback without a place."""
    if at < 0 and instructions and sys.version_info < (3, 11):
        return False  # Before the first instruction.
    return not 0 <= at < len(instructions) or instructions[at] == _RAISE


def _calls_exit(frame: FrameType) -> bool:
    """Whether the code in `frame` has a name for `sys.exit`, which raises like another thread."""
    names, known = frame.f_code.co_names, frame.f_globals
    values = [*frame.f_locals.values(), *(known.get(name) for name in names)]
    return "exit" in names or any(value is sys.exit for value in values)


def _is_handler(frame: FrameType, interrupted: FrameType) -> bool:
    """Whether `frame` was called with a number and the frame that called it, as handlers are."""
    code = frame.f_code
    more = bool(code.co_flags & _HAS_STAR_ARGS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + more]
    values: list[Any] = [frame.f_locals.get(name) for name in names]
    if more and type(values[-1]) is tuple:
        values += values.pop()
    return any(b is interrupted and issubclass(type(a), int) for a, b in pairwise(values))


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = _get("__traceback__", error)
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _get(name: str, error: BaseException) -> Any:
    """An attribute as Python has it, whatever the class makes of it."""
    return vars(BaseException)[name].__get__(error)
