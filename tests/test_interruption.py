"""What code raises itself is its own, whatever it is; what interrupts the code is not."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import functools
import json
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qitos_mlflow._guard import in_words, shield
from qitos_mlflow._interruption import interruption
from tests.interrupts import POSIX, alarm, ctrl_c, handled_by, inject

Work = Callable[[], Any]
group: Any = getattr(builtins, "BaseExceptionGroup", None)
"""None before Python 3.11."""


class Own(BaseException):
    """A class of a plugin's that nothing catches."""


class Timeout(Exception):
    """One that needs no arguments and gives itself some."""

    def __init__(self) -> None:
        super().__init__("timed out")


class Hostile(BaseException):
    """One that raises whatever is asked of it."""

    def _fail(self, *_: Any) -> Any:
        raise SystemExit

    __class__ = property(_fail)  # type: ignore[assignment]
    __traceback__ = __context__ = args = property(_fail)  # type: ignore[assignment]
    __str__ = __repr__ = __eq__ = _fail  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def found_in(work: Work) -> str | None:
    """The name of the exception that interrupted `work`; None: what it has raised is its own."""
    try:
        work()
    except BaseException as error:
        outside = interruption(error)
        return None if outside is None else type(outside).__name__
    pytest.fail("nothing was raised")


def raising(error: Any) -> Work:
    def fail() -> None:
        raise error

    return fail


def exits_with_what_main_returns() -> None:
    def main() -> None: ...

    sys.exit(main())


def cancelled() -> None:
    async def wait() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    asyncio.run(wait())


def thrown() -> None:
    def generator() -> Iterator[None]:
        yield

    made = generator()
    next(made)
    made.throw(GeneratorExit)  # type: ignore[attr-defined]


def in_a_circle() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    raise first


def endless() -> None:
    endless()


RAISED: list[Any] = [
    *(SystemExit, SystemExit(3), KeyboardInterrupt, GeneratorExit, asyncio.CancelledError),
    *(Own, Own(), Timeout, Hostile, MemoryError, ValueError(1)),
]
CALLED: list[Work] = [
    *(sys.exit, lambda: sys.exit(None), lambda: sys.exit(3), exits_with_what_main_returns),
    *(cancelled, thrown, in_a_circle, endless, lambda: next(iter(()))),
    *(queue.SimpleQueue[None]().get_nowait, lambda: int("x"), lambda: json.loads("{x")),
]


@pytest.mark.parametrize("work", [*map(raising, RAISED), *CALLED])
def test_what_code_raises_is_its_own(work: Work) -> None:
    """Of whatever class, by a statement, by `sys.exit` or in C."""
    assert found_in(lambda: work()) is None


@pytest.mark.skipif(group is None, reason="has no groups")
def test_a_group_of_its_own_failures_is_its_own() -> None:
    """What several tasks of a plugin raise stays with it."""
    assert found_in(raising(group("tasks", [ValueError(1), SystemExit(3)]))) is None


def test_what_the_program_handles_already_is_no_interruption() -> None:
    """An agent that is run to clean up after Ctrl-C has plugins, too."""
    try:
        ctrl_c()
    except KeyboardInterrupt:
        assert found_in(lambda: int("x")) is None
        assert found_in(raising(SystemExit)) is None


# -- from outside ------------------------------------------------------------------------------


def spins() -> None:
    while True:
        pass


def calls_c() -> None:
    number = 0
    while True:
        number += len("abc")


def calls_python() -> None:
    while True:
        threading.current_thread()


def waits() -> None:
    while True:
        threading.Event().wait(0.01)


def cleans_up() -> None:
    try:
        spins()
    finally:
        int("x")  # Its own failure, but the program is to end.


def converts() -> None:
    try:
        spins()
    except BaseException as error:
        raise RuntimeError("interrupted") from error


def manages() -> None:
    @contextlib.contextmanager
    def manager() -> Iterator[None]:
        try:
            yield
        finally:
            threading.current_thread()

    with manager():
        spins()


def groups() -> None:
    try:
        spins()
    except BaseException as error:
        raise group("tasks", [ValueError(1), error]) from None


WORKS = [spins, calls_c, calls_python, waits, manages]
ENDING = [cleans_up, converts, *([groups] if group else [])]


class Handler:
    """An object that is a handler, and has another one as its method."""

    def __call__(self, number: int, frame: Any) -> None:
        raise Own

    def exits(self, number: int, frame: Any) -> None:
        sys.exit(3)


def times_out(number: int, frame: Any) -> None:
    def fail() -> None:
        raise TimeoutError("the task took too long")

    fail()


def takes_anything(*_: Any) -> None:
    raise SystemExit


HANDLERS: list[tuple[Any, str, list[Work]]] = [
    (signal.default_int_handler, "KeyboardInterrupt", [*WORKS, *ENDING]),
    (takes_anything, "SystemExit", [*WORKS, *ENDING]),
    (lambda number, frame: sys.exit(), "SystemExit", [*WORKS, *ENDING]),
    (Handler().exits, "SystemExit", WORKS),
    (Handler(), "Own", WORKS),
    (times_out, "TimeoutError", WORKS),
    (functools.partial(times_out), "TimeoutError", WORKS),
]


@pytest.mark.skipif(not POSIX, reason="has no alarms")
@pytest.mark.parametrize(("handler", "kind", "works"), HANDLERS)
def test_what_a_signal_handler_raises_passes(handler: Any, kind: str, works: list[Work]) -> None:
    """Wherever the signal arrives; one that ends the program, whatever the code makes of it."""
    for work in works:
        with alarm(handler):
            assert found_in(work) == kind, work


@pytest.mark.skipif(not POSIX, reason="has no alarms")
def test_ctrl_c_passes_through_an_event_loop() -> None:
    """asyncio handles the signal itself, and raises when its task has ended."""
    default = handled_by(signal.default_int_handler)
    with default, alarm(lambda *_: signal.raise_signal(signal.SIGINT)):
        assert found_in(lambda: asyncio.run(asyncio.sleep(60))) == "KeyboardInterrupt"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Own, Timeout, TimeoutError])
def test_what_another_thread_injects_passes(kind: type[BaseException]) -> None:
    """`PyThreadState_SetAsyncExc` is how programs stop a thread, or time out in one."""
    works = [*WORKS, *([] if issubclass(kind, Exception) else ENDING)]
    for work in works:
        ready, found = threading.Event(), list[str | None]()

        def at_work(work: Work = work, ready: Any = ready, found: Any = found) -> None:
            found.append(found_in(lambda: (ready.set(), work())))

        thread = threading.Thread(target=at_work)
        thread.start()
        assert ready.wait(30)
        inject(thread, kind)
        thread.join(30)
        assert found == [kind.__name__], work


# -- the guards --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", RAISED)
def test_a_shield_keeps_what_code_raises(error: Any, swallowed: list[Any]) -> None:
    """It is reported with its place, and can be put in words, whatever its class does."""
    with shield("here"):
        raise error
    [(where, kept)] = swallowed
    assert where == "here"
    assert type(kept) is (error if isinstance(error, type) else type(error))
    assert in_words(kept).startswith(type(kept).__name__)
    swallowed.clear()


def test_a_shield_raises_what_interrupts_it() -> None:
    """Ctrl-C, also where it makes the code fail in another way."""

    def interrupted() -> None:
        try:
            ctrl_c()
        finally:
            int("x")

    with pytest.raises(KeyboardInterrupt), shield("here"):
        ctrl_c()
    with pytest.raises(KeyboardInterrupt), shield("here"):
        interrupted()
