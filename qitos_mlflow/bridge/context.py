"""Where a piece of work stands: which agent run, below which span, on whatever thread.

A `Place` is immutable, so a copied context (a pool, ``asyncio``) keeps the parent it was copied
with. Pool threads start with an empty context; the pools here hand them ours. Nothing else of
the context is carried except OpenTelemetry's current one, so that provider instrumentation nests:
the host keeps variables of its own in there, and handing those over would change what it does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from qitos_mlflow._guard import report

if TYPE_CHECKING:
    from qitos_mlflow.bridge.run import AgentRun

__all__ = ["BackgroundPool", "ContextPool", "Place", "here"]


class Place(NamedTuple):
    """A position in a trace: new spans and nested agents go below `span`."""

    run: AgentRun
    span: Any
    """The host's `Span`, or one of ours."""
    tool: bool = False
    """Whether `span` stands for a tool call."""
    detached: bool = False
    """Work started here outlives the run by intention."""

    @property
    def starts_trace(self) -> bool:
        """Whether an agent started here gets a linked trace of its own."""
        return self.detached or self.run.live.closed


here: ContextVar[Place | None] = ContextVar("qitos_mlflow_place", default=None)
"""The current place; None outside of any traced run."""


class ContextPool(ThreadPoolExecutor):
    """A thread pool whose tasks stand where they were submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit as the base class does; outside of a traced run there is no difference."""
        place = here.get()
        if place is None:
            return super().submit(fn, *args, **kwargs)
        return super().submit(_standing_at(place, fn), *args, **kwargs)


class BackgroundPool(ThreadPoolExecutor):
    """A thread pool for work that outlives the run it was submitted in."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit as the base class does; agents started there get a linked trace of their own."""
        place = here.get()
        if place is None:
            return super().submit(fn, *args, **kwargs)
        return super().submit(_standing_at(place._replace(detached=True), fn), *args, **kwargs)


def _standing_at(place: Place, fn: Callable[..., Any]) -> Callable[..., Any]:
    otel = None if place.detached else _otel_context()
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


def _otel_context() -> Any:
    """OpenTelemetry's contexts; None where they are not imported, or about to be by a thread."""
    module = sys.modules.get("opentelemetry.context")
    spec = getattr(module, "__spec__", None)
    return None if spec is None or getattr(spec, "_initializing", False) else module


def _try(otel: Any, name: str, *args: Any) -> Any:
    """What this function of OpenTelemetry's returns; None without it. Never raises."""
    try:
        return None if otel is None else getattr(otel, name)(*args)
    except Exception as error:  # noqa: BLE001 - in the agent's pool, around the agent's call
        report("bridge.context", error)
        return None
