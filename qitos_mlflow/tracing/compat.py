"""Serves `qitos.tracing` on hosts without it: the same objects under the host's names.

A finder at the end of `sys.meta_path` answers only if no other finder does, one added later
included. A host that has `qitos.tracing` is therefore found, and this does nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow.tracing import _host

SERVED = frozenset({_host.HOST, *(f"{_host.HOST}.{name}" for name in _host.SUBMODULES)})

PROCESSOR = "MlflowTraceProcessor"
"""Served by `qitos.tracing`, too. `qitos_mlflow` has it, and is imported when it is first used."""

PROCESSOR_MODULE = f"{_host.HOST}.mlflow_processor"
"""Has `PROCESSOR`. A host with tracing of its own, but without this submodule, gets it."""

_installing = threading.Lock()  # Held for microseconds, never over an import.


def install() -> None:
    """Serve `qitos.tracing` if the host has none, from now on; idempotent, never raises.

    Works before `qitos` is imported and after. If it is imported already, `qitos.tracing` is
    set as its attribute, too. Any thread; imports nothing of the host.
    """
    try:
        with _installing:
            if not any(getattr(f, "serves_qitos_tracing", False) for f in sys.meta_path):
                sys.meta_path.append(_Finder())
        host = sys.modules.get("qitos")
        if host is not None and not hasattr(host, "tracing") and _host.find_spec() is None:
            import_module(_host.HOST)
    except Exception as error:  # noqa: BLE001 - runs while the user's program starts
        _guard.report("tracing.compat", error)


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `SERVED` and `PROCESSOR_MODULE`, and is their loader."""

    serves_qitos_tracing = True  # How another copy of this module knows it.

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SERVED and name != PROCESSOR_MODULE:
            return None
        # Finders before this one have been asked; those added after it come first, too.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        found = _host.spec_from(behind, name, path)
        if found is not None:
            return found
        part = name in SERVED and name != _host.HOST
        if part and not getattr(sys.modules.get(_host.HOST), "__qitos_mlflow__", False):
            return None  # A part that the host's own package lacks is not made up.
        return ModuleSpec(name, self, origin=_host.ORIGIN, is_package=name == _host.HOST)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__qitos_mlflow__"] = True
        module.__doc__ = "Served by qitos_mlflow, because this QitOS has no tracing of its own."
        name = module.__name__
        if name in SERVED:  # Each has all names.
            settled = _host.settled()
            ours = {name: settled[name] for name in _host.OURS}
            module.__dict__.update(ours, __all__=list(ours))
        if name in (_host.HOST, PROCESSOR_MODULE):
            module.__dict__["__getattr__"] = partial(_processor, name)
        if name == _host.HOST:
            for submodule in _host.SUBMODULES:
                import_module(f"{name}.{submodule}")


def _processor(module: str, name: str) -> Any:
    """The ``__getattr__`` of `module`: imports the processor when it is used."""
    if name != PROCESSOR:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(import_module("qitos_mlflow"), name)
