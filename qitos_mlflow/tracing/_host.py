"""Finds the host's own `qitos.tracing`, by what it can do, never by a version number.

Looks where Python would look, past our own finder (`compat`), and imports nothing unless there is
something to import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from qitos_mlflow import _guard

HOST = "qitos.tracing"

ORIGIN = "qitos_mlflow"
"""The origin of what `compat` serves: some finders (wrapt's) only pass on what others find."""

SURFACE: dict[str, tuple[str, ...]] = {
    "config": ("TracingMode", "RedactingSpanData"),
    "models": (
        "SpanType",
        "SpanData",
        "AgentSpanData",
        "StepSpanData",
        "DecideSpanData",
        "GenerationSpanData",
        "ActSpanData",
        "ToolSpanData",
        "ReduceSpanData",
        "CriticSpanData",
        "HandoffSpanData",
        "MCPSpanData",
        "CustomSpanData",
        "Span",
        "NoOpSpan",
        "Trace",
        "NoOpTrace",
    ),
    "processor": ("TraceProcessor", "SynchronousMultiTraceProcessor", "NoOpTraceProcessor"),
    "provider": ("TracingProvider",),
    "": (
        "add_trace_processor",
        "set_trace_processors",
        "set_tracing_disabled",
        "set_tracing_mode",
        "get_tracing_provider",
        "create_trace",
    ),
}
"""The public names of `qitos.tracing`, by submodule; the last are the package's own."""

NAMES = frozenset(name for names in SURFACE.values() for name in names)

REQUIRED = frozenset(
    {
        "Span",
        "SpanData",
        "SpanType",
        "Trace",
        "TraceProcessor",
        "TracingMode",
        "get_tracing_provider",
    }
    | {"add_trace_processor", "create_trace"}
)
"""Without these a `qitos.tracing` is something else than the one we know."""


def find_spec(name: str) -> ModuleSpec | None:
    """The spec that everyone but us finds for `name`, which is `HOST` or below; imports nothing."""
    path = _search_path(name.rpartition(".")[0])
    return None if path is None else spec_from(sys.meta_path, name, path)


def spec_from(finders: list[Any], name: str, path: Any) -> ModuleSpec | None:
    """The first spec that one of `finders` has for `name`, our own finder left out."""
    for finder in list(finders):
        if getattr(finder, "serves_qitos_tracing", False) or not hasattr(finder, "find_spec"):
            continue
        spec: ModuleSpec | None = finder.find_spec(name, path)
        if spec is not None and spec.origin != ORIGIN:
            return spec
    return None


def _search_path(package: str) -> Any:
    """Where the submodules of `package` are looked for; None when there is no such package."""
    module = sys.modules.get(package)
    if module is not None:
        return getattr(module, "__path__", None)
    parent = package.rpartition(".")[0]
    parent_path = _search_path(parent) if parent else None
    if parent and parent_path is None:
        return None
    spec = spec_from(sys.meta_path, package, parent_path)
    return None if spec is None else spec.submodule_search_locations


def settle() -> dict[str, Any]:
    """All of `NAMES`, the host's where it has its own tracing, and whether it has.

    Called by several threads at once, or by itself through what it imports, it comes to the same
    result, so there is no lock to be held over an import.
    """
    of_host = load()
    settled: dict[str, Any] = {"host_has_tracing": of_host is not None}
    for submodule, names in SURFACE.items():
        # A name that the host lacks, such as a kind of span it does not know, is ours.
        ours = import_module(f"qitos_mlflow.tracing.{submodule or 'provider'}")
        settled.update({name: getattr(ours, name) for name in names})
    return {**settled, **(of_host or {})}


def load() -> dict[str, Any] | None:
    """The public names of the host's own `qitos.tracing`; None where there is none that works.

    Imports the host where it has one. One that cannot be imported, or lacks what we need, is told
    of in one warning.
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
    if loaded is not None:  # However it came there: a loader may know no path.
        return not getattr(loaded, "__qitos_mlflow__", False)
    return find_spec(HOST) is not None


def _names(package: ModuleType) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for submodule, names in SURFACE.items():
        home = package
        if submodule:
            try:
                home = import_module(f"{HOST}.{submodule}")
            except ModuleNotFoundError:  # Laid out in another way; the package may have it all.
                pass
        found += [(name, getattr(home, name, getattr(package, name, None))) for name in names]
    return found


def _warn(why: str) -> None:
    _guard.warn(
        "tracing.host",
        "QitOS has a qitos.tracing that cannot be used (%s); qitos_mlflow.tracing stands in, "
        "and processors added to qitos.tracing hear nothing",
        why,
    )
