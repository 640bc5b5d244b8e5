"""Thread pools in place of the host's: their tasks know the place of the agent that submits them.

Pool threads start with an empty context, so that an agent's place (`run.here`) is not known there.
The pools here hand it over. Nothing else of the context is handed over except OpenTelemetry's
current one, so that provider instrumentation nests: the host keeps variables of its own in the
context, and handing those over would change what it does.

Imported once the host has such a pool. After the main thread has ended, Python has none any more.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Any

from qitos_mlflow._after_import import imported
from qitos_mlflow._guard import contain
from qitos_mlflow.bridge.run import Place, here


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
    except BaseException as error:  # noqa: BLE001 - in the agent's pool, around the agent's call
        contain("bridge.pools", error)
        return None


def replace(module: ModuleType, *, detached: bool) -> None:
    """Have a module of the host use a pool of ours, unless it has one of its own already."""
    if vars(module).get("ThreadPoolExecutor") is ThreadPoolExecutor:
        vars(module)["ThreadPoolExecutor"] = BackgroundPool if detached else ContextPool
