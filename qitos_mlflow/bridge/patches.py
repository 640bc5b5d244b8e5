"""Replaces methods and thread pools of the host, and puts the originals back.

Each replacement is decided on its own by what the host has, never by a version number. One that
does not fit is left out, with one line in the log.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qitos_mlflow._guard import shield, warn
from qitos_mlflow.bridge.pools import BackgroundPool, ContextPool

POOLS: dict[str, type[ThreadPoolExecutor]] = {
    "qitos.engine.action_executor": ContextPool,  # parallel tools, tools with a time limit
    "qitos.kit.tool.fanout": ContextPool,
    "qitos.kit.tool.agent.agent_tool": BackgroundPool,
}
"""Host modules whose thread pools start tools or agents, and what replaces the pool."""


class Patches:
    """The replacements of one installation. Any thread."""

    def __init__(self) -> None:
        self.active = False
        self.lock = threading.RLock()
        self._made: list[tuple[Any, str, Any, Any]] = []  # (owner, name, original, ours)
        self.before_first_run: Callable[[], None] | None = None
        """Makes the replacements that the first run to be traced needs. Called once."""

    def wrap(self, owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
        """Put `wrapper` around a method that `owner` itself defines, if it takes arguments.

        Args:
            owner: the host's class.
            name: of the method.
            wrapper: called instead, with the bound original, the object it is bound to, and the
                arguments as a tuple and a dict.
        """
        original: Any = vars(owner).get(name)
        function = getattr(original, "__func__", original)  # a class method is not callable itself
        if not _takes_arguments(function):
            warn(f"bridge.{name}", "cannot trace %s.%s of this QitOS", owner.__name__, name)
            return

        of_class = isinstance(original, classmethod)

        # A plain function: bound to an Engine, it can be pickled (a process pool's
        # `submit(engine.run)`), copied, and be in a `weakref.WeakMethod`.
        @functools.wraps(function)
        def method(bound_to: Any, /, *args: Any, **kwargs: Any) -> Any:
            at = (None, bound_to) if of_class else (bound_to, type(bound_to))
            return wrapper(original.__get__(*at), bound_to, args, kwargs)

        ours: Any = classmethod(method) if of_class else method
        setattr(owner, name, ours)
        self._made.append((owner, name, original, ours))

    def fit(self) -> None:
        """Before a run that is traced: call `before_first_run`, replace pools imported by now."""
        if self.before_first_run is not None:
            with self.lock, shield("bridge.fit"):  # Runs are traced without what is missing.
                try:
                    if self.before_first_run is not None:
                        self.before_first_run()
                finally:  # Nothing may be replaced once more.
                    self.before_first_run = None
        for module_name, pool in POOLS.items():
            module = sys.modules.get(module_name)
            if getattr(module, "ThreadPoolExecutor", None) is not ThreadPoolExecutor:
                continue
            with self.lock:
                if self.active and vars(module)["ThreadPoolExecutor"] is ThreadPoolExecutor:
                    vars(module)["ThreadPoolExecutor"] = pool
                    self._made.append((module, "ThreadPoolExecutor", ThreadPoolExecutor, pool))

    def undo(self) -> None:
        """Put every original back, except under a wrapper of other code around ours."""
        with self.lock:
            self.active = False
            self.before_first_run = None
            while self._made:
                owner, name, original, ours = self._made.pop()
                if vars(owner).get(name) is ours:
                    setattr(owner, name, original)


def _takes_arguments(function: Any) -> bool:
    try:
        return len(inspect.signature(function).parameters) > 1
    except (TypeError, ValueError):  # Not a function, or one without a signature.
        return False
