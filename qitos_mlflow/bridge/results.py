"""Which trace the host's results belong to. Nothing of a result is kept or changed.

A host's result is a dataclass and has no hash, so it is found by its identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

MAX_RUNS = 1024
"""Runs of the host whose traces are remembered: the latest ones."""

_results: dict[int, tuple[Callable[[], Any], str]] = {}
_runs: dict[str, str] = {}


def note(result: Any, run_id: Any, trace_id: str) -> None:
    """Remember the trace of a run that has ended, while its result lives. Any thread."""
    if isinstance(run_id, str) and run_id:
        _runs.pop(run_id, None)
        _runs[run_id] = trace_id
        while len(_runs) > MAX_RUNS:
            with suppress(StopIteration, RuntimeError):  # Another thread is at it, too.
                _runs.pop(next(iter(_runs)), None)
    with suppress(TypeError):  # Such as a text: nothing refers to it weakly.
        forget = partial(_forget, id(result))
        _results[id(result)] = weakref.ref(result, forget), trace_id


def trace_of(result: Any) -> str | None:
    """QitOS's id of the trace that a result of the host belongs to; None if it is not known."""
    found = _results.get(id(result))
    return found[1] if found is not None and found[0]() is result else None


def trace_of_run(run_id: str) -> str | None:
    """QitOS's id of the trace of a host's run, by the id of the run; None if it is not known."""
    return _runs.get(run_id)


def _forget(identity: int, gone: Any) -> None:
    found = _results.get(identity)
    if found is not None and found[0] is gone:
        _results.pop(identity, None)
