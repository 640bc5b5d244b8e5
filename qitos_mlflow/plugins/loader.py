"""Finds the installed trace plugins, selects some, and loads each of these into an adapter.

A plugin is an entry point of the group `GROUP`. `selection` says which are loaded; the others are
not imported. Nothing here raises but KeyboardInterrupt.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

import importlib_metadata

from qitos_mlflow import _guard
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.plugins.selection import VARIABLE, Selection, canonical

GROUP = "qitos.trace_plugins"
"""The entry-point group."""

NOT_SELECTED = f"not selected by {VARIABLE}"
"""The `PluginInfo.error` that is no failure."""

_this_thread = threading.local()


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin.

    `state` is "found" (selected, not loaded yet), "loaded", "blocked" (not selected) or "failed";
    for the last two `error` says why. `hooks` is empty unless it is loaded.
    """

    name: str
    distribution: str
    version: str
    value: str
    state: str = "found"
    error: str | None = None
    hooks: tuple[str, ...] = ()


def discover() -> list[PluginInfo]:
    """The installed plugins in the order in which they would be loaded, then the blocked ones.

    Imports no plugin and logs nothing. Reads the metadata of every installed distribution, which
    takes tens of milliseconds.
    """
    return _select(_installed(), Selection.from_environ())


def load(adapter: PluginTraceProcessor) -> list[PluginInfo]:
    """Load the selected plugins and register each with `adapter`, under its name.

    Returns all installed plugins, with their state. `adapter` calls the loaded ones from now on;
    a plugin that it has already is not loaded again.

    There is one warning for each plugin that cannot be loaded, and one for names that do not
    exist; the others load. Blocks for the plugins' imports. If a plugin's import calls this again
    on the same thread, that call returns an empty list.
    """
    if getattr(_this_thread, "loading", False):
        return []
    _this_thread.loading = True
    try:
        selection = Selection.from_environ()
        if selection.nothing:
            return []  # Not even the metadata is read.
        found = _select(_installed(), selection)
        _warn_of_unknown(selection, found)
        outcome: list[PluginInfo] = []
        for info in found:
            if info.state == "found":
                shared = any(info.name == other.name for other in outcome)
                name = f"{info.distribution}:{info.name}" if shared else info.name
                info = _load(info, name, adapter)
            if info.error is not None and info.error != NOT_SELECTED:
                _warn_of_failure(info)
            outcome.append(info)
        return outcome
    finally:
        _this_thread.loading = False


def _load(info: PluginInfo, name: str, adapter: PluginTraceProcessor) -> PluginInfo:
    try:
        if name in adapter.plugins:
            return replace(info, state="loaded", hooks=adapter.hooks(name))
        entry_point = importlib_metadata.EntryPoint(info.name, info.value, GROUP)
        hooks = adapter.register(_plugin(entry_point.load()), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - sys.exit() at import must not end the agent
        _guard.log(logging.DEBUG, "traceback of the failure to load %s", info.value, error=error)
        return replace(info, state="failed", error=_guard.in_words(error))
    return replace(info, state="loaded", hooks=hooks)


def _plugin(found: object) -> object:
    """`found`, or what it returns: a class or a function is no plugin itself, but makes one."""
    if inspect.isclass(found) or inspect.isroutine(found) or isinstance(found, functools.partial):
        found = found()
    if found is None:
        raise TypeError("it, or what its factory returned, is None instead of a plugin")
    return found


def _select(installed: Iterable[PluginInfo], selection: Selection) -> list[PluginInfo]:
    """`installed`, the selected ones first, in the order of loading."""
    found: list[tuple[int, PluginInfo]] = []
    blocked: list[PluginInfo] = []
    holders: dict[str, str] = {}
    for info in installed:
        rank = selection.rank(info.name, info.distribution)
        holder = holders.get(canonical(info.name))
        if rank is None:
            blocked.append(replace(info, state="blocked", error=NOT_SELECTED))
        elif holder is not None and not selection.singles_out(info.name, info.distribution):
            # One plugin for a name: two would most likely do everything twice.
            why = f"the name is taken by the plugin of {holder}; to load this one, name it "
            why += f"{info.distribution}:{info.name}"
            blocked.append(replace(info, state="blocked", error=why))
        else:
            holders[canonical(info.name)] = info.distribution
            found.append((rank, info))
    return [info for _, info in sorted(found, key=lambda item: item[0])] + blocked


def _installed() -> list[PluginInfo]:
    """The plugins of all distributions, by name; metadata that cannot be read is skipped."""
    found: list[PluginInfo] = []
    for name in _distributions():
        try:
            # By name, so that of two versions on sys.path the first one counts, as in an import.
            distribution = importlib_metadata.distribution(name)
            found += [
                PluginInfo(entry.name, distribution.name, distribution.version or "", entry.value)
                for entry in distribution.entry_points
                if entry.group == GROUP
            ]
        except Exception as error:  # noqa: BLE001 - site-packages may hold anything
            _skipped(name, error)
    return sorted(found, key=lambda info: (canonical(info.name), canonical(info.distribution)))


def _distributions() -> list[str]:
    """The names of the distributions whose entry points mention our group, each once."""
    names: dict[str, None] = {}
    for distribution in importlib_metadata.distributions():
        try:
            # The text first: parsing the entry points of everything installed takes ten times as
            # long, and entry points that cannot be parsed matter only if they are a plugin's.
            if GROUP in (distribution.read_text("entry_points.txt") or ""):
                names[distribution.name] = None
        except Exception as error:  # noqa: BLE001
            _skipped(str(distribution.locate_file("")), error)
    return list(names)


def _skipped(what: str, error: Exception) -> None:
    message = "trace plugins of %s are left out: unreadable metadata"
    _guard.log(logging.DEBUG, message, what, error=error)


def _warn_of_unknown(selection: Selection, found: list[PluginInfo]) -> None:
    unknown = selection.unknown((info.name, info.distribution) for info in found)
    if unknown:
        _guard.warn(
            f"plugins.unknown.{unknown}",
            "%s: no trace plugin named %s is installed; installed are: %s",
            VARIABLE,
            " or ".join(unknown),
            ", ".join(sorted({info.name for info in found})) or "none",
        )


def _warn_of_failure(info: PluginInfo) -> None:
    _guard.warn(
        f"plugins.load.{info.distribution}:{info.name}",
        "trace plugin %s of %s %s was not loaded: %s",
        info.name,
        info.distribution,
        info.version,
        info.error,
    )
