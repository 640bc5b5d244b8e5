"""What agents are started in, carried to threads and to the tasks of thread pools.

Tasks of asyncio and `asyncio.to_thread` copy it by themselves, as they do with each context
variable. A plain thread and a task of a `ThreadPoolExecutor` begin without, so what starts them is
wrapped. Outside of a `qitos_mlflow.context` and of an evaluation the wrappers read two variables
and do no more. A process begins without: a pool's is forked by its first task, and serves others.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qitos_mlflow._inheritance import OwnThread

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

current: ContextVar[Any] = ContextVar("qitos_mlflow_context", default=None)
"""The innermost `context` here; None outside of any."""

here: ContextVar[Any] = ContextVar("qitos_mlflow_evaluation", default=None)
"""The innermost evaluation, or task of one, here; None outside of any."""

CARRIED = (current, here)

WRAPPED = "_qitos_mlflow_carries"
"""Attribute of what is wrapped already."""


def into_thread(thread: threading.Thread) -> None:
    """Have a thread that is about to start begin in what the thread that starts it is in."""
    given = _given()
    if not given or isinstance(thread, OwnThread):
        return
    run = thread.run

    def run_inside() -> None:
        # In the thread's own context, not in a variable of the thread: a worker that runs each of
        # its tasks in the context of the task (anyio, asyncio) is then never in a stranger's.
        vars(thread).pop("run", None)
        for variable, value in given.items():
            variable.set(value)
        run()

    thread.run = run_inside  # type: ignore[method-assign]


def into_pools(module: ModuleType) -> None:
    """Have tasks of thread pools begin in what they are submitted in. Once."""
    pool: type[ThreadPoolExecutor] = module.ThreadPoolExecutor
    submit: Callable[..., Any] = pool.submit
    if hasattr(submit, WRAPPED):
        return

    @functools.wraps(submit)
    def carrying_submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = _given()
        if not given:
            return submit(self, fn, *args, **kwargs)
        with _in(dict.fromkeys(given)):  # A worker that this starts goes on to serve others.
            return submit(self, functools.partial(_inside, given, fn), *args, **kwargs)

    setattr(carrying_submit, WRAPPED, True)
    pool.submit = carrying_submit  # type: ignore[method-assign]


def _given() -> dict[ContextVar[Any], Any]:
    return {one: value for one in CARRIED if (value := one.get()) is not None}


@contextmanager
def _in(given: Mapping[ContextVar[Any], Any]) -> Iterator[None]:
    tokens = [(variable, variable.set(value)) for variable, value in given.items()]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def _inside(
    given: Mapping[ContextVar[Any], Any], fn: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    with _in(given):
        return fn(*args, **kwargs)


def _forked() -> None:
    for variable in CARRIED:
        variable.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
