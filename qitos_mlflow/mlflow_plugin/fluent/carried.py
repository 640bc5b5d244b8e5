"""Where threads and tasks of thread pools come from, and what is carried to them from there.

Tasks of asyncio and `asyncio.to_thread` copy what is carried by themselves, as they do with each
context variable. A plain thread and a task of a `ThreadPoolExecutor` do not, so what starts them is
wrapped. A pool's thread serves many: it comes from where its task was submitted. Nothing is carried
to a process: one of a pool is forked by the first task, and serves others, too.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

current: ContextVar[Any] = ContextVar("qitos_mlflow_context", default=None)
"""The innermost `context` here; None outside of any."""

here: ContextVar[Any] = ContextVar("qitos_mlflow_evaluation", default=None)
"""The innermost evaluation, or task of one, here; None outside of any."""

CARRIED = (current, here)

STARTER = "_qitos_mlflow_starter"
"""Attribute of a thread: a weak reference to the one that has started it, or its task."""

WRAPPED = "_qitos_mlflow_carries"
"""Attribute of what is wrapped already."""


def threads_around() -> Iterator[threading.Thread]:
    """This thread, the one that has started it or its task, and so on."""
    thread: threading.Thread | None = threading.current_thread()
    seen: list[int | None] = []
    while thread is not None and thread.ident not in seen:  # Pools may start each other's tasks.
        yield thread
        seen.append(thread.ident)
        starter: threading.Thread | None = vars(thread).get(STARTER, _nobody)()
        # Not one that has ended: another thread may have its number.
        thread = starter if starter is not None and starter.is_alive() else None


def _nobody() -> None:
    return None


def into_thread(thread: threading.Thread) -> None:
    """Have a thread that is about to start know this one, and begin in what this one is in."""
    vars(thread)[STARTER] = weakref.ref(threading.current_thread())
    given = _given()
    if not given or getattr(thread, "serves_all", False):  # A thread of ours.
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
    """Have tasks of thread pools know the thread that submits them, and begin in what it is in."""
    pool: type[ThreadPoolExecutor] = module.ThreadPoolExecutor
    submit: Callable[..., Any] = pool.submit
    if hasattr(submit, WRAPPED):
        return

    @functools.wraps(submit)
    def carrying_submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = _given()
        task = functools.partial(_inside, weakref.ref(threading.current_thread()), given, fn)
        if not given:
            return submit(self, task, *args, **kwargs)
        with _in(dict.fromkeys(given)):  # A worker that this starts goes on to serve others.
            return submit(self, task, *args, **kwargs)

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
    starter: Callable[[], Any],
    given: Mapping[ContextVar[Any], Any],
    fn: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    thread = threading.current_thread()
    before = vars(thread).get(STARTER, _nobody)
    if starter() is not thread:  # Else it comes from where this thread does.
        vars(thread)[STARTER] = starter
    try:
        with _in(given):
            return fn(*args, **kwargs)
    finally:
        vars(thread)[STARTER] = before


def _forked() -> None:
    for variable in CARRIED:
        variable.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
