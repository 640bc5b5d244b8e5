"""Decides whose tracing it is: the host's own `qitos.tracing` if it works, else ours.

The host's is judged by what it has, never by a version number. The search goes where Python's
would, past our own finder (`compat`), and imports nothing unless there is something to import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow.tracing import config, processor, provider, span, span_data, trace

HOST = "qitos.tracing"

ORIGIN = "qitos_mlflow"
"""The origin of what `compat` serves. Some finders, such as wrapt's, pass on what others find."""

_SOURCES: dict[str, tuple[ModuleType, ...]] = {
    "config": (config,),
    "models": (span_data, span, trace),
    "processor": (processor,),
    "provider": (provider,),
}
"""The submodules of `qitos.tracing`, with our modules that have their names."""


def _public(module: ModuleType, kind: type) -> dict[str, Any]:
    """What a module defines of this kind under a name without an underscore."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, kind) and value.__module__ == module.__name__ and name[0] != "_"
    }


OURS: dict[str, dict[str, Any]] = {
    **{
        submodule: {
            name: value for source in sources for name, value in _public(source, type).items()
        }
        for submodule, sources in _SOURCES.items()
    },
    "": _public(provider, FunctionType),
}
"""The public names of `qitos.tracing` by submodule, with our objects; "" is the package itself.

These are the classes of our modules, and the functions of `provider`. (`tracing` repeats the
modules for type checkers.)
"""

NAMES = frozenset(name for names in OURS.values() for name in names)

REQUIRED = frozenset(
    {
        "Span",
        "SpanData",
        "SpanType",
        "Trace",
        "TraceProcessor",
        "TracingMode",
        "add_trace_processor",
        "create_trace",
        "get_tracing_provider",
    }
)
"""A `qitos.tracing` without these is something else."""


def find_spec() -> ModuleSpec | None:
    """The spec that other finders have for the host's `qitos.tracing`; imports nothing."""
    host = sys.modules.get("qitos")
    if host is not None:
        path = getattr(host, "__path__", None)
    else:
        spec = spec_from(sys.meta_path, "qitos", None)
        path = None if spec is None else spec.submodule_search_locations
    return None if path is None else spec_from(sys.meta_path, HOST, path)


def spec_from(finders: list[Any], name: str, path: Any) -> ModuleSpec | None:
    """The first spec that one of `finders` has for `name`, our own finder left out."""
    for finder in list(finders):
        if getattr(finder, "serves_qitos_tracing", False) or not hasattr(finder, "find_spec"):
            continue
        spec: ModuleSpec | None = finder.find_spec(name, path)
        if spec is not None and spec.origin != ORIGIN:
            return spec
    return None


_settled: dict[str, Any] = {}


def settled() -> dict[str, Any]:
    """All of `NAMES`, the host's if it has its own tracing, and whether it has.

    The first call settles it. Called by several threads at once, or again through what it
    imports, it has the same result, so that no lock is held over an import.
    """
    if not _settled:
        of_host = load()
        # A name that the host lacks, such as a kind of span it does not know, is ours.
        ours = {name: value for names in OURS.values() for name, value in names.items()}
        _settled.update({**ours, **(of_host or {}), "host_has_tracing": of_host is not None})
    return _settled


def load() -> dict[str, Any] | None:
    """The public names of the host's own `qitos.tracing`; None if there is none that works.

    Imports the host's if there is one. If it cannot be imported, or lacks names of `REQUIRED`, a
    warning says so.
    """
    try:
        if not _exists():
            return None
        package = import_module(HOST)
        names = {name: found for name, found in _names(package) if found is not None}
        missing = sorted(REQUIRED - names.keys())
    except Exception as error:  # noqa: BLE001 - whatever the host's code may raise
        _warn(_guard.in_words(error))
        return None
    if missing:
        _warn(f"it has no {', '.join(missing)}")
        return None
    return names


def _exists() -> bool:
    loaded = sys.modules.get(HOST)
    if loaded is not None:  # By whichever loader; not all have a path.
        return not getattr(loaded, "__qitos_mlflow__", False)
    return find_spec() is not None


def _names(package: ModuleType) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for submodule, names in OURS.items():
        home = package
        if submodule:
            try:
                home = import_module(f"{HOST}.{submodule}")
            except ModuleNotFoundError:  # Another layout; the package may have the names.
                pass
        found += [(name, getattr(home, name, getattr(package, name, None))) for name in names]
    return found


def _warn(why: str) -> None:
    _guard.warn(
        "tracing.host",
        "QitOS has a qitos.tracing that cannot be used (%s). qitos_mlflow.tracing is used instead: "
        "add processors there, those added to qitos.tracing get no events",
        why,
    )
