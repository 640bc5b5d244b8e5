"""What a forked child inherits and must not use: descriptors and, with gevent, threads.

The child closes its copies of our files and sockets at once. Python would close them later by their
numbers, which files of the program may have by then. With gevent, threads are greenlets and go on
in the child: ours end there after the wait that they are in.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Forked(BaseException):
    """Ends a thread in a forked child. Not an `Exception`: nothing handles it on the way."""


class OwnThread(threading.Thread):
    """A daemon that does its `work` in the process that made it, and ends in a forked child."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._pid = os.getpid()

    def work(self) -> None:
        """What the thread is for; calls `check`."""
        raise NotImplementedError

    def run(self) -> None:
        """Work; say nothing in a forked child."""
        _here.pid = self._pid
        try:
            check()
            self.work()
        except Forked:
            threading.current_thread()  # Has `threading` know it again, so that it can forget it.
        finally:
            _here.pid = None


def in_time(act: Callable[[], T], timeout_s: float) -> T | None:
    """What `act` returns, on a thread of its own; None if it raises or takes longer (seconds).

    A disk on a network that is gone answers no call, and nothing can end one. If no thread can be
    started (Python 3.12 while the interpreter ends), the calling thread does it.
    """
    done: list[T] = []

    class Act(OwnThread):
        def work(self) -> None:
            with suppress(Exception):
                done.append(act())

    thread = Act("qitos-mlflow-in-time")
    try:
        thread.start()
    except RuntimeError:
        thread.work()
    else:
        thread.join(timeout_s)
    return done[0] if done else None


_here = threading.local()
_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def check() -> None:
    """End a thread of the parent process. Called after all that waits, before anything is done."""
    if getattr(_here, "pid", None) not in (None, os.getpid()):
        raise Forked


def disown_in_child(owner: Any) -> None:
    """Have a forked child call `owner.disown`, which closes copies and takes no lock."""
    _owners.add(owner)


def _after_in_child() -> None:
    _here.pid = None  # A plugin that forks on a thread of ours goes on there.
    for owner in list(_owners):
        with suppress(Exception):  # Such as a descriptor that is closed already.
            owner.disown()
    _owners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
