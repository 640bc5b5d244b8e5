"""A thread that does pieces of work in order, and ends if there are none for a while.

So a trace that is never ended leaves no thread behind.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow._inheritance import check
from qitos_mlflow._threads import OwnThread

LINGER_S, LOOK_S = 5.0, 1.0
"""How long the thread waits for more work, and how often it looks for how long (seconds)."""


class InBackground:
    """Does what it is given, in order. Any thread; a forked child's copy does nothing.

    Args:
        name: of the work, in the thread's name and in the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        # Reentrant: a signal handler may offer work while this thread does.
        self._lock = threading.RLock()
        self._works = False
        self._done = 0
        self._linger_s = LINGER_S

    @property
    def waiting(self) -> int:
        """Pieces of work that have not begun."""
        return self._work.qsize()

    def do(self, work: Callable[..., object], *args: Any) -> None:
        """Have it done, without waiting; if no thread can be started, do all that waits here."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._work.put(partial(work, *args))
            if self._works:
                return
            self._works = True
        try:
            self.start_another()
        except (RuntimeError, MemoryError):  # At the interpreter's exit, or too little memory.
            self._works = False
            while not self._work.empty():
                self._do_next(0.0)

    def wait(self, stall_s: float, at_most_s: float) -> bool:
        """Whether all is done that was given before. Gives up if nothing is done for `stall_s`.

        The thread ends with that work, if no more comes.
        """
        self._linger_s = 0.0
        over, done, until_s = threading.Event(), -1, time.monotonic() + at_most_s
        self.do(over.set)
        while os.getpid() == self._pid and done != self._done:
            done = self._done
            if over.wait(max(0.0, min(stall_s, until_s - time.monotonic()))):
                return True
        return False

    def start_another(self) -> None:
        """Have another thread do what has not begun."""
        OwnThread(f"qitos-mlflow-{self._name}", self._do_all).start()

    def _do_all(self) -> None:
        began_s = time.monotonic()
        while True:
            try:
                self._do_next(min(self._linger_s, LOOK_S))
                began_s = time.monotonic()
            except Empty:
                with self._lock:
                    waited = time.monotonic() - began_s >= self._linger_s
                    if waited and self._work.empty():
                        self._works = False
                        return

    def _do_next(self, wait_s: float) -> None:
        work = self._work.get(timeout=wait_s)
        check()
        with shield(self._name):
            work()
        self._done += 1
