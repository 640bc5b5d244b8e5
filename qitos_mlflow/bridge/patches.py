"""What was replaced in the host, and how to put it back.

Each replacement is fitted on its own after looking at what is there, never at a version: one that
does not fit is left out with one line in the log.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qitos_mlflow._guard import report, warn
from qitos_mlflow.bridge.pools import BackgroundPool, ContextPool

__all__ = ["Patches"]

POOLS: dict[str, type[ThreadPoolExecutor]] = {
    "qitos.engine.action_executor": ContextPool,  # parallel tools, tools with a time limit
    "qitos.kit.tool.fanout": ContextPool,
    "qitos.kit.tool.agent.agent_tool": BackgroundPool,
}
"""Host modules whose thread pools start tools or agents, and what stands in for their pool."""


class Patches:
    """The replacements of one installation. Any thread."""

    def __init__(self) -> None:
        self.active = False
        self.lock = threading.RLock()
        self._made: list[tuple[Any, str, Any, Any]] = []  # (owner, name, original, ours)
        self._postponed: list[Callable[[], None]] = []

    def wrap(self, owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
        """Put `wrapper` around a method that `owner` itself defines, if it is as expected.

        Args:
            owner: the host's class.
            name: of the method.
            wrapper: called in its place, with the bound original, what that is bound to, and the
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

    def postpone(self, fitting: Callable[[], None]) -> None:
        """Call `fitting` before the first run that is traced, and never if there is none."""
        self._postponed.append(fitting)

    def fit(self) -> None:
        """Make the postponed replacements, and replace the pools imported by now."""
        if self._postponed:
            with self.lock:
                try:
                    for fitting in self._postponed:
                        fitting()
                except Exception as error:  # noqa: BLE001 - runs are traced without what is missing
                    report("bridge.fit", error)
                finally:  # What was made must not be made once more.
                    self._postponed.clear()
        for module_name, pool in POOLS.items():
            module = sys.modules.get(module_name)
            if getattr(module, "ThreadPoolExecutor", None) is not ThreadPoolExecutor:
                continue
            with self.lock:
                if self.active and vars(module)["ThreadPoolExecutor"] is ThreadPoolExecutor:
                    vars(module)["ThreadPoolExecutor"] = pool
                    self._made.append((module, "ThreadPoolExecutor", ThreadPoolExecutor, pool))

    def undo(self) -> None:
        """Put every original back, except below a wrapper that somebody else put around ours."""
        with self.lock:
            self.active = False
            self._postponed.clear()
            while self._made:
                owner, name, original, ours = self._made.pop()
                if vars(owner).get(name) is ours:
                    setattr(owner, name, original)


def _takes_arguments(function: Any) -> bool:
    try:
        return len(inspect.signature(function).parameters) > 1
    except (TypeError, ValueError):  # not a function, or one that tells nothing
        return False
