"""Serves `qitos.tracing` on hosts without it: the same objects under the host's names.

A finder at the end of `sys.meta_path` answers only if no other finder does, one added later
included. A host that has `qitos.tracing` is therefore found, and this does nothing. A module that
is served gets its names when the first of them is used: until then it costs nothing.
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

from qitos_mlflow.tracing._search import HOST, ORIGIN, SUBMODULES, find_spec, spec_from

SERVED = frozenset({HOST, *(f"{HOST}.{name}" for name in SUBMODULES)})

PROCESSOR = "MlflowTraceProcessor"
"""Served by `qitos.tracing`, too. `qitos_mlflow` has it, and is imported when it is first used."""

PROCESSOR_MODULE = f"{HOST}.mlflow_processor"
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
        if host is not None and not hasattr(host, "tracing") and find_spec() is None:
            import_module(HOST)
    except Exception as error:  # noqa: BLE001 - runs while the user's program starts
        from qitos_mlflow import _guard

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
        found = spec_from(behind, name, path)
        if found is not None:
            return found
        part = name in SERVED and name != HOST
        if part and not getattr(sys.modules.get(HOST), "__qitos_mlflow__", False):
            return None  # A part that the host's own package lacks is not made up.
        return ModuleSpec(name, self, origin=ORIGIN, is_package=name == HOST)

    def exec_module(self, module: ModuleType) -> None:
        names = module.__dict__
        names["__qitos_mlflow__"] = True
        names["__doc__"] = "Served by qitos_mlflow, because this QitOS has no tracing of its own."
        names["__getattr__"] = partial(_first_use, module)
        if module.__name__ in SERVED:
            names["__dir__"] = partial(_names, module)


def _first_use(module: ModuleType, name: str) -> Any:
    """The ``__getattr__`` of a module that is served."""
    of_package = module.__name__ == HOST
    if name == PROCESSOR and (of_package or module.__name__ == PROCESSOR_MODULE):
        return getattr(import_module("qitos_mlflow"), name)
    if of_package and name in SUBMODULES:
        return import_module(f"{HOST}.{name}")
    if module.__name__ in SERVED and (name == "__all__" or name[:2] != "__"):
        _names(module)
        if name in module.__dict__:
            return module.__dict__[name]
    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")


def _names(module: ModuleType) -> list[str]:
    """Give a module of `SERVED` its names; each module has all. Returns what it has."""
    from qitos_mlflow.tracing import settled

    known = settled()
    from qitos_mlflow.tracing import _host

    ours = {name: known[name] for name in _host.OURS}
    module.__dict__.update(ours, __all__=list(ours))
    more = SUBMODULES if module.__name__ == HOST else ()
    return sorted({*module.__dict__, *more})
