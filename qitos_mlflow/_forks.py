"""What a fork needs: no import of ours, and no call of a local store, under way when it happens.

A module that a thread is importing during a fork stays locked in the child for ever: the child's
own import of mlflow would hang. So does a file that SQLite has locked. A fork waits for the imports
and the calls that are in a block of `importing`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

FORK_WAIT_S = 10.0
"""Longest time a fork waits for all of them together (seconds). `import mlflow` takes one to two; a
sink for a server, 0.2."""

_beginning = threading.RLock()
"""Held while a block begins, and by a fork: none begins in the midst of it."""
_under_way: set[threading.RLock] = set()
"""A lock for each block, held until its end."""
_forking = threading.local()
_importing = threading.local()
"""Its `lock` is what this thread holds."""


@contextmanager
def importing() -> Iterator[None]:
    """Delay forks while the block must not be cut in two, such as an import. Other blocks go on."""
    if getattr(_importing, "lock", None) is not None:
        yield  # A fork waits for the block around this one, and would wait for ever for this one.
        return
    with (mine := threading.RLock()):
        try:
            _importing.lock = mine
            with _beginning:
                _under_way.add(mine)
            yield
        finally:
            _under_way.discard(mine)
            _importing.lock = None


def let_forks_happen() -> None:
    """Let a fork that waits happen now. Called inside `importing`, where no import is under way."""
    mine = getattr(_importing, "lock", None)
    if mine is not None:
        mine.release()
        with _beginning:  # The fork holds it until it has happened.
            mine.acquire()


def _before() -> None:
    # The wait is bounded, so that it cannot deadlock.
    deadline = time.monotonic() + FORK_WAIT_S
    _forking.alone = _beginning.acquire(timeout=FORK_WAIT_S)
    for lock in list(_under_way):
        if lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            lock.release()


def _after_in_parent() -> None:
    if _forking.alone:
        _beginning.release()


def _after_in_child() -> None:
    global _beginning
    _beginning = threading.RLock()
    _under_way.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
