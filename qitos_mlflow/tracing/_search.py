"""Searches for the host's own `qitos.tracing`, past our finder (`compat`); imports nothing."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

HOST = "qitos.tracing"

ORIGIN = "qitos_mlflow"
"""The origin of what `compat` serves. Some finders, such as wrapt's, pass on what others find."""

SUBMODULES = ("config", "models", "processor", "provider")
"""Those of `qitos.tracing`."""


def find_spec() -> ModuleSpec | None:
    """The spec that other finders have for the host's `qitos.tracing`."""
    host = sys.modules.get("qitos") or spec_from(sys.meta_path, "qitos", None)
    path = getattr(host, "__path__", None) or getattr(host, "submodule_search_locations", None)
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
