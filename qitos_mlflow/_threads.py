"""A thread of ours: goes on after whatever its work raises, and ends in a forked child."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from qitos_mlflow._guard import report
from qitos_mlflow._inheritance import Forked, check, here
from qitos_mlflow._json import memory_left

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
"""From the first failure to the next try; each further failure doubles it (seconds)."""
START_BYTES = 64 * 1024 * 1024
"""Memory that must be left to start a thread (bytes). If one gets its stack of 8 MB and no more,
Python waits for ever for it to begin (3.10 to 3.13)."""
LAST_PAUSE_S = 10.0
"""The longest pause; after as long without a failure it is the first one again (seconds)."""


class OwnThread(threading.Thread):
    """A daemon that does its `work` in the process that made it, and ends in a forked child.

    If `work` raises, whatever it is, it is called again after a pause. Otherwise the thread would
    end without a word, and the records that it has taken from a queue would be lost.
    """

    serves_all = True  # It is not in what the thread that starts it is in (`fluent.carried`).

    def __init__(self, name: str, work: Callable[[], object] | None = None) -> None:
        super().__init__(name=name, daemon=True)
        if work is not None:
            self.work = work  # type: ignore[method-assign]
        self._pid = os.getpid()
        self.when_failed: Callable[[], object] = lambda: None
        """Called after `work` has raised, before it is called again."""

    def start(self) -> None:
        """Start it.

        Raises:
            MemoryError: too little memory is left below a limit of the process.
            RuntimeError: the system or the interpreter allows no further thread.
        """
        left = memory_left()
        if left is not None and left < START_BYTES:
            raise MemoryError
        super().start()

    def work(self) -> object:
        """What the thread is for; calls `check`. If it is called again, it goes on."""
        raise NotImplementedError

    def run(self) -> None:
        """Work until it is done; say nothing in a forked child."""
        here.pid = self._pid
        try:
            self._work()
        except Forked:
            threading.current_thread()  # Has `threading` know it again, so that it can forget it.
        finally:
            here.pid = None

    def _work(self) -> None:
        pause_s = 0.0
        while True:
            began_s = time.monotonic()
            try:
                check()
                self.work()
                return
            except Forked:
                raise
            except BaseException as error:  # noqa: BLE001 - also what another thread injects
                long = time.monotonic() - began_s > LAST_PAUSE_S
                pause_s = FIRST_PAUSE_S if long or not pause_s else min(2 * pause_s, LAST_PAUSE_S)
                with suppress(BaseException):  # Such as no memory, again.
                    report(f"the thread {self.name}", error)
                    self.when_failed()
            time.sleep(pause_s)


def in_time(act: Callable[[], T], timeout_s: float) -> T | None:
    """What `act` returns, on a thread of its own; None if it raises or takes longer (seconds).

    A disk on a network that is gone answers no call, and nothing can end one. If no thread can be
    started (no memory; Python 3.12 while the interpreter ends), the calling thread does it.
    """
    done: list[T] = []

    def work() -> None:
        with suppress(Exception):
            done.append(act())

    thread = OwnThread("qitos-mlflow-in-time", work)
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        work()
    else:
        thread.join(timeout_s)
    return done[0] if done else None
