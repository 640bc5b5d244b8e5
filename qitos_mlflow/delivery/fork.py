"""What a fork needs: no import under way when it happens, and a new beginning in the child.

A module that a thread is importing during a fork stays locked in the child for ever: the child's
own import of mlflow would hang. So a fork waits for the imports that delivery knows of.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Protocol

FORK_WAIT_S = 10.0
"""Longest time a fork waits for an import (seconds). `import mlflow` and the creation of a local
store take five; a sink for a server, 0.2."""


class Forked(Protocol):
    """What lives in each process anew."""

    opening: threading.RLock
    """Held while a sink is opened, which may import much."""

    def after_fork(self) -> None:
        """Begin anew, in the child; no other thread runs yet."""
        ...


_watched: weakref.WeakSet[Forked] = weakref.WeakSet()
_importing = threading.RLock()
_forking = threading.local()


def watch(what: Forked) -> None:
    """Take care of `what` in forks from now on, for as long as it lives."""
    _watched.add(what)


def importing() -> threading.RLock:
    """The lock to hold while a sink that is open already imports much."""
    return _importing


def _before() -> None:
    # The wait is bounded, so that it cannot deadlock.
    deadline = time.monotonic() + FORK_WAIT_S
    locks = [_importing, *(what.opening for what in list(_watched))]
    _forking.locks = [
        lock for lock in locks if lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
    ]


def _after_in_parent() -> None:
    for lock in getattr(_forking, "locks", ()):
        lock.release()


def _after_in_child() -> None:
    global _importing
    _importing = threading.RLock()
    for what in list(_watched):
        what.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
