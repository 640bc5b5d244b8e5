"""Finds the installed trace plugins, selects some, and loads each of these into an adapter.

A plugin is an entry point of the group `GROUP`. `selection` says which are loaded; the others are
not imported. Nothing here raises but what interrupts it, such as Ctrl-C.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
from dataclasses import dataclass, replace
from functools import partial

import importlib_metadata

from qitos_mlflow import _guard
from qitos_mlflow._entry_points import entry_points
from qitos_mlflow._selection import VARIABLE, Selection, canonical
from qitos_mlflow.plugins.adapter import PluginTraceProcessor

GROUP = "qitos.trace_plugins"
"""The entry-point group."""

NOT_SELECTED = f"not selected by {VARIABLE}"
"""The `PluginInfo.error` that is no failure."""

_this_thread = threading.local()


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin.

    `state` is "loaded", "blocked" (not selected) or "failed"; for the last two `error` says why.
    `hooks` is empty unless it is loaded.
    """

    name: str
    distribution: str
    version: str
    value: str
    state: str = "blocked"
    error: str | None = None
    hooks: tuple[str, ...] = ()


def load(adapter: PluginTraceProcessor) -> list[PluginInfo]:
    """Load the selected plugins and register each with `adapter`, under its name.

    Returns all installed plugins in the order of loading, then the blocked ones. `adapter` calls
    the loaded ones from now on; a plugin that it has already is not loaded again.

    There is one warning for each plugin that cannot be loaded, and one for names that do not
    exist; the others load. Reads the metadata of every installed distribution, which takes tens of
    milliseconds, and blocks for the plugins' imports. If a plugin's import calls this again on the
    same thread, that call returns an empty list.
    """
    if getattr(_this_thread, "loading", False):
        return []
    _this_thread.loading = True
    try:
        selection = Selection.from_environ()
        found = _select(_installed(), selection)
        unknown = selection.unknown((info.name, info.distribution) for info in found)
        if unknown:
            _guard.warn(
                f"plugins.unknown.{unknown}",
                "%s: no trace plugin named %s is installed; installed are: %s",
                VARIABLE,
                " or ".join(unknown),
                ", ".join(sorted({info.name for info in found})) or "none",
            )
        outcome: list[PluginInfo] = []
        for info in found:
            if info.error is None:
                shared = any(info.name == other.name for other in outcome)
                name = f"{info.distribution}:{info.name}" if shared else info.name
                info = _load(info, name, adapter)
            if info.error not in (None, NOT_SELECTED):
                _guard.warn(
                    f"plugins.load.{info.distribution}:{info.name}",
                    "trace plugin %s of %s %s was not loaded: %s",
                    *(info.name, info.distribution, info.version, info.error),
                )
            outcome.append(info)
        return outcome
    finally:
        _this_thread.loading = False


def _load(info: PluginInfo, name: str, adapter: PluginTraceProcessor) -> PluginInfo:
    if name in adapter.plugins:
        return replace(info, state="loaded", hooks=adapter.hooks(name))
    try:
        found = importlib_metadata.EntryPoint(info.name, info.value, GROUP).load()
        # A class or a function is no plugin itself, but makes one.
        if inspect.isclass(found) or inspect.isroutine(found) or isinstance(found, partial):
            found = found()
        if found is None:
            raise TypeError("it, or what its factory returned, is None instead of a plugin")
        return replace(info, state="loaded", hooks=adapter.register(found, name))
    except BaseException as error:  # noqa: BLE001 - sys.exit() at import must not end the agent
        _guard.let_through(error)
        _guard.log(logging.DEBUG, "traceback of the failure to load %s", info.value, error=error)
        return replace(info, state="failed", error=_guard.in_words(error))


def _select(installed: list[PluginInfo], selection: Selection) -> list[PluginInfo]:
    """`installed`, the selected ones first, in the order of loading."""
    ranked: list[tuple[float, PluginInfo]] = []
    holders: dict[str, PluginInfo] = {}
    for info in installed:
        rank, error = selection.rank(info.name, info.distribution), None
        holder = info if rank is None else holders.setdefault(canonical(info.name), info)
        if rank is None:
            error = NOT_SELECTED
        elif holder is not info and not selection.singles_out(info.name, info.distribution):
            # One plugin for a name: two would most likely do everything twice.
            error = f"the name is taken by the plugin of {holder.distribution}; to load this one, "
            error += f"name it {info.distribution}:{info.name}"
        place = math.inf if rank is None or error else rank
        ranked.append((place, replace(info, error=error)))
    return [info for _, info in sorted(ranked, key=lambda item: item[0])]


def _installed() -> list[PluginInfo]:
    """The plugins of all distributions, by name."""
    found = {
        (canonical(one.name), canonical(one.distribution)): PluginInfo(
            one.name, one.distribution, one.version, one.value
        )
        for one in entry_points(GROUP)
    }
    return [found[key] for key in sorted(found)]
