"""What a pool's thread is given of the context: where it stands, and nothing that can fail."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from opentelemetry import context as otel

from qitos_mlflow.bridge.pools import BackgroundPool, ContextPool
from qitos_mlflow.bridge.run import Place, here

WAIT_S = 20.0
PLACE: Any = Place(None, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _standing_somewhere() -> Any:
    """Inside of a run."""
    token = here.set(PLACE)
    yield
    here.reset(token)


def seen(pool_class: Any) -> tuple[Any, Any]:
    """OpenTelemetry's mark and our place, as a thread of the pool sees them."""
    with pool_class(1) as pool:
        assert pool.submit(divmod, 7, 2).result(WAIT_S) == (3, 1)
        return pool.submit(lambda: (otel.get_value("mark"), here.get())).result(WAIT_S)  # type: ignore[no-any-return]


def test_opentelemetrys_context_is_carried_except_to_the_background() -> None:
    """Spans of instrumented providers nest; work that outlives the run is not part of it."""
    token = otel.attach(otel.set_value("mark", 1))
    try:
        assert seen(ContextPool) == (1, PLACE)
        assert seen(BackgroundPool) == (None, PLACE._replace(detached=True))
    finally:
        otel.detach(token)


def test_an_import_of_opentelemetry_under_way_is_none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread imports it the module is there, and its functions are not."""
    half = ModuleType("opentelemetry.context")
    half.__spec__ = ModuleSpec("opentelemetry.context", None)
    half.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opentelemetry.context", half)
    assert seen(ContextPool) == (None, PLACE)
    half.__spec__ = None
    assert seen(ContextPool) == (None, PLACE)


@pytest.mark.parametrize("broken", ["get_current", "attach", "detach"])
def test_a_failing_opentelemetry_costs_the_agent_nothing(
    broken: str, monkeypatch: pytest.MonkeyPatch, swallowed: list[Any]
) -> None:
    """Neither the submission nor the call fails."""

    def fail(*args: Any) -> Any:
        raise LookupError(broken)

    monkeypatch.setattr(otel, broken, fail)
    with ContextPool(1) as pool:
        assert pool.submit(divmod, 7, 2).result(WAIT_S) == (3, 1)
    assert {where for where, _ in swallowed} == {"bridge.pools"}
    swallowed.clear()
