"""The context that agents are started in, carried to threads and to the tasks of thread pools.

Tasks of asyncio and `asyncio.to_thread` copy it by themselves, as they do with each context
variable. A plain thread and a task of a `ThreadPoolExecutor` begin without, so what starts them is
wrapped. Outside of a `qitos_mlflow.context` the wrappers read one variable and do no more.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qitos_mlflow._inheritance import OwnThread

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

current: ContextVar[Any] = ContextVar("qitos_mlflow_context", default=None)
"""The innermost `context` here; None outside of any."""

WRAPPED = "_qitos_mlflow_carries"
"""Attribute of what is wrapped already."""


def into_thread(thread: threading.Thread) -> None:
    """Have a thread that is about to start begin in the context of the thread that starts it."""
    given = current.get()
    if given is None or isinstance(thread, OwnThread):
        return
    run = thread.run

    def run_inside() -> None:
        # In the thread's own context, not in a variable of the thread: a worker that runs each of
        # its tasks in the context of the task (anyio, asyncio) is then never in a stranger's.
        vars(thread).pop("run", None)
        current.set(given)
        run()

    thread.run = run_inside  # type: ignore[method-assign]


def into_pools(module: ModuleType) -> None:
    """Have tasks of thread pools begin in the context that they are submitted in. Once."""
    pool: type[ThreadPoolExecutor] = module.ThreadPoolExecutor
    submit: Callable[..., Any] = pool.submit
    if hasattr(submit, WRAPPED):
        return

    @functools.wraps(submit)
    def carrying_submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = current.get()
        if given is None:
            return submit(self, fn, *args, **kwargs)
        # Outside: a worker that this starts goes on to serve others.
        token = current.set(None)
        try:
            return submit(self, functools.partial(_inside, given, fn), *args, **kwargs)
        finally:
            current.reset(token)

    setattr(carrying_submit, WRAPPED, True)
    pool.submit = carrying_submit  # type: ignore[method-assign]


def _inside(given: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    token = current.set(given)
    try:
        return fn(*args, **kwargs)
    finally:
        current.reset(token)
