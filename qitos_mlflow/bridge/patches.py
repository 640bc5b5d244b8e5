"""Replaces methods and thread pools of the host.

Each replacement is decided on its own by what the host has, never by a version number. One that
does not fit is left out, with one line in the log.

Pool threads start with an empty context, so that an agent's place (`run.here`) is not known there.
The pools here hand it over. Nothing else of the context is handed over except OpenTelemetry's
current one, so that provider instrumentation nests: the host keeps variables of its own in the
context, and handing those over would change what it does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qitos_mlflow._after_import import imported
from qitos_mlflow._guard import report, warn
from qitos_mlflow.bridge.run import Place, here


def wrap(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper` around a method that `owner` itself defines, if it takes arguments.

    Args:
        owner: the host's class.
        name: of the method.
        wrapper: called instead, with the bound original, the object it is bound to, and the
            arguments as a tuple and a dict.
    """
    original: Any = vars(owner).get(name)
    function = getattr(original, "__func__", original)  # a class method is not callable itself
    try:
        fits = len(inspect.signature(function).parameters) > 1
    except (TypeError, ValueError):  # Not a function, or one without a signature.
        fits = False
    if not fits:
        warn(f"bridge.{name}", "cannot trace %s.%s of this QitOS", owner.__name__, name)
        return

    of_class = isinstance(original, classmethod)

    # A plain function: bound to an Engine, it can be pickled (a process pool's
    # `submit(engine.run)`), copied, and be in a `weakref.WeakMethod`.
    @functools.wraps(function)
    def method(bound_to: Any, /, *args: Any, **kwargs: Any) -> Any:
        at = (None, bound_to) if of_class else (bound_to, type(bound_to))
        return wrapper(original.__get__(*at), bound_to, args, kwargs)

    setattr(owner, name, classmethod(method) if of_class else method)


class ContextPool(ThreadPoolExecutor):
    """A thread pool whose tasks have the place at which they were submitted."""

    detached = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit as the base class does; outside of a traced run there is no difference."""
        place = here.get()
        if place is not None:
            fn = _at(place._replace(detached=True) if self.detached else place, fn)
        return super().submit(fn, *args, **kwargs)


class BackgroundPool(ContextPool):
    """The same for tasks that outlive the run: agents started there get a linked trace."""

    detached = True


def _at(place: Place, fn: Callable[..., Any]) -> Callable[..., Any]:
    otel = None if place.detached else imported("opentelemetry.context")
    carried = _try(otel, "get_current")

    def call(*args: Any, **kwargs: Any) -> Any:
        before = here.get()
        here.set(place)
        token = None if carried is None else _try(otel, "attach", carried)
        try:
            return fn(*args, **kwargs)
        finally:
            if token is not None:
                _try(otel, "detach", token)
            here.set(before)

    return call


def _try(otel: Any, name: str, *args: Any) -> Any:
    """What this function of OpenTelemetry's returns; None without OpenTelemetry. Never raises."""
    try:
        return None if otel is None else getattr(otel, name)(*args)
    except Exception as error:  # noqa: BLE001 - in the agent's pool, around the agent's call
        report("bridge.pools", error)
        return None
