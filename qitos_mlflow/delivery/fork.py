"""What a fork needs: no import under way when it happens.

A module that a thread is importing during a fork stays locked in the child for ever: the child's
own import of mlflow would hang. So a fork waits for the imports that delivery knows of.
"""

from __future__ import annotations

import os
import threading

FORK_WAIT_S = 10.0
"""Longest time a fork waits for an import (seconds). `import mlflow` and the creation of a local
store take five; a sink for a server, 0.2."""

_importing = threading.RLock()
_held = threading.local()


def importing() -> threading.RLock:
    """The lock to hold while a sink is opened, or imports much later on."""
    return _importing


def _before() -> None:
    # The wait is bounded, so that it cannot deadlock.
    _held.acquired = _importing.acquire(timeout=FORK_WAIT_S)


def _after_in_parent() -> None:
    if _held.acquired:
        _importing.release()


def _after_in_child() -> None:
    global _importing
    _importing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
