"""Waiting for what tells nobody when it is done: other processes, servers, threads at rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 60.0
"""So long on a machine that is busy with others; the usual wait is milliseconds."""

POLL_S = 0.02


def eventually(look: Callable[[], T]) -> T:
    """What `look` returns once that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := look()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(POLL_S)
    return seen
