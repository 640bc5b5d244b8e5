"""Decides whose tracing it is: the host's own `qitos.tracing` if it works, else ours.

The host's is judged by what it has, never by a version number. The search goes where Python's
would, past our own finder (`compat`), and imports nothing unless there is something to import.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from qitos_mlflow import _guard
from qitos_mlflow.tracing import models, processor, provider, redaction, span_data
from qitos_mlflow.tracing._search import HOST as HOST
from qitos_mlflow.tracing._search import SUBMODULES as SUBMODULES
from qitos_mlflow.tracing._search import find_spec as find_spec

OURS: dict[str, Any] = {
    name: value
    for module in (span_data, models, redaction, processor, provider)
    for name, value in vars(module).items()
    if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    if isinstance(value, type) or module is provider
}
"""The public names of `qitos.tracing` with our objects.

These are the classes of our modules, and the functions of `provider`. (`tracing` repeats the
modules for type checkers.)
"""

REQUIRED = frozenset({
    "Span", "SpanData", "SpanType", "Trace", "TraceProcessor", "TracingMode",
    "add_trace_processor", "create_trace", "get_tracing_provider",
})  # fmt: skip
"""A `qitos.tracing` without these is something else."""


@cache
def settled() -> dict[str, Any]:
    """The names of `OURS`, the host's if it has its own tracing, and whether it has.

    The first call settles it. Called by several threads at once, or again through what it
    imports, it has the same result, so that no lock is held over an import.
    """
    of_host = _load()
    # A name that the host lacks, such as a kind of span it does not know, is ours.
    return {**OURS, **of_host, "host_has_tracing": bool(of_host)}


def _load() -> dict[str, Any]:
    """The public names of the host's own `qitos.tracing`; empty if there is none that works.

    Imports the host's if there is one. If it cannot be imported, or lacks names of `REQUIRED`, a
    warning says so.
    """
    try:
        loaded = sys.modules.get(HOST)  # By whichever loader; not all have a path.
        ours = getattr(loaded, "__qitos_mlflow__", False)
        if ours or (loaded is None and find_spec() is None):
            return {}
        homes = [import_module(HOST)]
        for submodule in SUBMODULES:
            with suppress(ModuleNotFoundError):  # Another layout; the package may have the names.
                homes.append(import_module(f"{HOST}.{submodule}"))
        names = {
            name: getattr(home, name)
            for home in homes
            for name in OURS
            if getattr(home, name, None) is not None  # As after an import that failed there.
        }
        missing = sorted(REQUIRED - names.keys())
        why = f"it has no {', '.join(missing)}" if missing else None
    except BaseException as error:  # noqa: BLE001 - whatever the host's code may raise
        _guard.let_through(error)
        why = _guard.in_words(error)
    if why is None:
        return names
    _guard.warn(
        "tracing.host",
        "QitOS has a qitos.tracing that cannot be used (%s). qitos_mlflow.tracing is used instead: "
        "add processors there, those added to qitos.tracing get no events",
        why,
    )
    return {}
