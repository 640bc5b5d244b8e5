"""Serves `qitos.tracing` on hosts without it: the same objects under the host's names.

A finder at the end of `sys.meta_path` that answers only when every other finder, also one added
later, has none: the day the host ships its own, the host's is found and this does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow.tracing import _host

PROCESSOR = "MlflowTraceProcessor"
PROCESSOR_MODULE = f"{_host.HOST}.mlflow_processor"
SERVED = frozenset(
    {_host.HOST, PROCESSOR_MODULE}
    | {f"{_host.HOST}.{submodule}" for submodule in _host.SURFACE if submodule}
)


def install() -> None:
    """Serve `qitos.tracing` where the host has none, from now on; idempotent, never raises.

    Works before `qitos` is imported and after. Where it is imported already, `qitos.tracing` is
    set as its attribute too. Any thread; imports nothing of the host.
    """
    try:
        if not any(getattr(finder, "serves_qitos_tracing", False) for finder in sys.meta_path):
            sys.meta_path.append(_Finder())
        host = sys.modules.get("qitos")
        if (
            host is not None
            and not hasattr(host, "tracing")
            and _host.find_spec(_host.HOST) is None
        ):
            import_module(_host.HOST)
    except Exception as error:  # noqa: BLE001 - runs while the user's program starts
        _guard.report("tracing.compat", error)


def uninstall() -> None:
    """Stop serving. Modules that were served stay with those who imported them."""
    for finder in [f for f in sys.meta_path if getattr(f, "serves_qitos_tracing", False)]:
        sys.meta_path.remove(finder)
    for name in SERVED:
        if getattr(sys.modules.get(name), "__qitos_mlflow__", False):
            del sys.modules[name]
    host = sys.modules.get("qitos")
    if getattr(getattr(host, "tracing", None), "__qitos_mlflow__", False):
        del host.tracing  # type: ignore[union-attr]


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `SERVED`, and is their loader."""

    serves_qitos_tracing = True  # How another copy of this module knows it.

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SERVED:
            return None
        # Those before us had their turn; those behind us were added later, and come first too.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        found = _host.spec_from(behind, name, path)
        if found is not None:
            return found
        parent = sys.modules.get(_host.HOST)
        if name not in (_host.HOST, PROCESSOR_MODULE) and not getattr(
            parent, "__qitos_mlflow__", False
        ):
            return None  # Part of a host's own package that it lacks: not ours to make up.
        return ModuleSpec(name, self, origin=_host.ORIGIN, is_package=name == _host.HOST)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__qitos_mlflow__"] = True
        module.__doc__ = "Served by qitos_mlflow, because this QitOS has no tracing of its own."
        if module.__name__ in (_host.HOST, PROCESSOR_MODULE):
            module.__dict__["__getattr__"] = _processor_of(module)
        if module.__name__ == PROCESSOR_MODULE:
            return
        ours = import_module("qitos_mlflow.tracing")
        submodule = module.__name__[len(_host.HOST) + 1 :]
        names = _host.SURFACE[submodule] if submodule else sum(_host.SURFACE.values(), ())
        module.__dict__.update({name: getattr(ours, name) for name in names}, __all__=list(names))
        if not submodule:
            for name in _host.SURFACE:
                if name:
                    import_module(f"{_host.HOST}.{name}")


def _processor_of(module: ModuleType) -> Any:
    """A module's ``__getattr__``: the processor on first use, as it is slow to import."""

    def find(name: str) -> Any:
        if name != PROCESSOR:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        found = getattr(import_module("qitos_mlflow.mlflow_plugin.processor"), name)
        setattr(module, name, found)
        return found

    return find
