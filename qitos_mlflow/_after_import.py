"""Calls a function once a module is imported: at once, or right after an import still to come.

The import system sets ``_initializing`` on a module's spec while it executes the module. For that
time the spec gets a class that notices the change (`_WatchedSpec`). This works for an import that
another thread is in the middle of, too, and puts no loader of ours in front of the module's own.

No locks, because an import must not wait for us: what must happen once is a `dict.pop`, which is
atomic. `_startup` imports this when Python starts, so it imports as little as possible.
"""

import sys

TYPE_CHECKING = False  # `typing` costs 10 ms; type checkers know this name without it.

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any
else:
    ModuleSpec = type(sys.__spec__)

_waiting: "dict[str, dict[Callable[[ModuleType], object], None]]" = {}
"""Functions to be called, by the name of the module. An entry stays when all were called."""


def after_import(name: str, callback: "Callable[[ModuleType], object]") -> None:
    """Call `callback` with the module `name` at once if it is fully imported, else right after.

    It is called once, on the thread that imports the module, while the import system still holds
    that module's lock. An import that fails leaves it waiting for the next one. A callback that
    is waiting for this module already is not added again. What it raises is logged
    and not raised into the import.

    Any thread; never blocks and never imports the module.
    """
    callbacks = _waiting.setdefault(name, {})
    callbacks.setdefault(callback)
    _look(name)
    if callbacks and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
        _look(name)  # The import may have begun in between.


def imported(name: str) -> "ModuleType | None":
    """The module `name` if it is fully imported; None while some thread is importing it.

    None for a module without a spec, too: it is not the one that an import would have given.
    """
    module: Any = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return None if spec is None or getattr(spec, "_initializing", False) else module


def _initializing(module: "ModuleType") -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _look(name: str) -> None:
    """Call what waits for this module if it is imported; watch its import if that has begun."""
    module = sys.modules.get(name)
    if module is None:
        return
    if _initializing(module):
        _watch(module.__spec__)
        if _initializing(module):  # Else another thread finished it before it was watched.
            return
    callbacks = _waiting.get(name, {})
    for callback in list(callbacks):
        if callbacks.pop(callback, "taken by another thread") is None:
            try:
                callback(module)
            except BaseException as error:  # noqa: BLE001 - the program's import goes on
                from qitos_mlflow import _guard

                _guard.contain(f"after the import of {name}", error)


def _watch(spec: "ModuleSpec | None") -> None:
    if type(spec) is ModuleSpec:
        spec.__class__ = _WatchedSpec


class _WatchedSpec(ModuleSpec):
    """The spec of a module that something waits for, until its import has ended."""

    def __setattr__(self, attribute: str, value: "Any") -> None:
        super().__setattr__(attribute, value)
        if attribute == "_initializing" and not value:
            super().__setattr__("__class__", ModuleSpec)
            _look(self.name)  # Not in `sys.modules` if the import failed.


class _Finder:
    """A finder in front of all others, which finds what they find.

    It stays there: another thread may be going through `sys.meta_path`, and would skip a finder
    if one before it went away.
    """

    @classmethod
    def find_spec(cls, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        """The spec that the other finders have for a module that something waits for."""
        # A module whose spec was looked for just before `after_import` was called, or was found by
        # a finder in front of this one, is noticed at the next import of anything.
        for waited_for, callbacks in list(_waiting.items()):
            if callbacks:
                _look(waited_for)
        if not _waiting.get(name):
            return None
        for finder in list(sys.meta_path):
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _watch(spec)
                return spec
        return None
