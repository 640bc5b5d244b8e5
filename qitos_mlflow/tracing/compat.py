"""Serves `qitos.tracing` on hosts without it: the same objects under the host's names.

A finder at the end of `sys.meta_path` answers only if no other finder does, one added later
included. A host that has `qitos.tracing` is therefore found, and this does nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow.tracing import _host

SERVED = frozenset(
    {_host.HOST} | {f"{_host.HOST}.{submodule}" for submodule in _host.OURS if submodule}
)

_installing = threading.Lock()  # Held for microseconds, never over an import.
_lazy: dict[str, tuple[str, str]] = {}
"""Modules served beside `SERVED`: by name, the attribute they have and the module it is from."""


def serve_lazily(submodule: str, name: str, home: str) -> None:
    """Serve `qitos.tracing.<submodule>` too, with one `name`, which `qitos.tracing` has as well.

    The module `home` has it, and is imported when it is first used. A host with tracing of its own
    but without this submodule gets the submodule. Idempotent; any thread.
    """
    _lazy[f"{_host.HOST}.{submodule}"] = (name, home)


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
    """Finds the modules of `SERVED` and of `_lazy`, and is their loader."""

    serves_qitos_tracing = True  # How another copy of this module knows it.

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SERVED and name not in _lazy:
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

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__qitos_mlflow__"] = True
        module.__doc__ = "Served by qitos_mlflow, because this QitOS has no tracing of its own."
        if module.__name__ in _lazy:
            module.__dict__["__getattr__"] = _getattr_of(module, [_lazy[module.__name__]])
            return
        submodule = module.__name__[len(_host.HOST) + 1 :]
        names = list(_host.OURS[submodule] if submodule else _host.NAMES)
        settled = _host.settled()
        module.__dict__.update({name: settled[name] for name in names}, __all__=names)
        if not submodule:
            module.__dict__["__getattr__"] = _getattr_of(module, _lazy.values())
            for name in _host.OURS:
                if name:
                    import_module(f"{_host.HOST}.{name}")


def _getattr_of(module: ModuleType, lazy: Iterable[tuple[str, str]]) -> Callable[[str], Any]:
    """A module's ``__getattr__``, which imports the homes of these names when they are used."""

    def find(name: str) -> Any:
        home = dict(lazy).get(name)
        if home is None:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        found = getattr(import_module(home), name)
        setattr(module, name, found)
        return found

    return find
