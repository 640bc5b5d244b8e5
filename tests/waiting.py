"""Waiting for what gives no signal when it is done: other processes, servers, idle threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

EVENTUALLY_S = 60.0
"""Longest wait, for a busy machine; the usual wait is milliseconds."""

POLL_S = 0.02


def eventually(look: Callable[[], T]) -> T:
    """Call `look` until what it returns is true, and return that."""
    deadline = time.monotonic() + EVENTUALLY_S
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not true within {EVENTUALLY_S:.0f} s"
        time.sleep(POLL_S)
    return seen
