"""What interrupts code from outside: Ctrl-C, other signals, and exceptions of other threads."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def ctrl_c(*_: Any) -> None:
    """Ctrl-C, at this moment."""
    # A shell that starts the tests in the background has them ignore SIGINT.
    with handled_by(signal.default_int_handler, signal.SIGINT):
        signal.raise_signal(signal.SIGINT)


@contextmanager
def handled_by(handler: Any, number: int = signal.SIGINT) -> Iterator[None]:
    """A program whose handler of this signal is `handler`."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def alarm(handler: Callable[..., Any], after_s: float = 0.02) -> Iterator[None]:
    """A program that has an alarm go off."""
    with handled_by(handler, signal.SIGALRM):
        signal.setitimer(signal.ITIMER_REAL, after_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def inject(thread: threading.Thread, kind: type[BaseException]) -> None:
    """Have `thread` raise an exception of this class, wherever it is."""
    assert thread.ident is not None
    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
    assert set_exception(ctypes.c_ulong(thread.ident), ctypes.py_object(kind)) == 1


POSIX = sys.platform != "win32"
"""Whether there are signals and alarms as here."""
