"""One `TraceProcessor` for all plugins: each event becomes one hook call for each plugin.

pluggy stops at the first implementation that raises, so every plugin has a plugin manager to
itself: what it raises, wraps or registers wrongly affects no other plugin.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import pluggy

from qitos_mlflow import _guard
from qitos_mlflow._forks import importing
from qitos_mlflow.plugins import hookspecs
from qitos_mlflow.tracing import TraceProcessor

HOOKS: tuple[str, ...] = tuple(name for name in vars(hookspecs) if name.startswith("qitos_"))
"""The names of all hooks."""


_Call = tuple[str, Callable[..., Any]]
"""One plugin's implementations of one hook, after how a log line names them.

A hook has one argument at most, which is given by position: on the agent's thread it counts.
"""

EVENTS = frozenset({"qitos_trace_start", "qitos_trace_end", "qitos_span_start", "qitos_span_end"})
"""Hooks that return nothing."""

LOAD_WAIT_S = 2.0
"""Longest wait for another thread that loads the plugins (seconds), once. It may itself be waiting
for an import of the thread that waits."""

_loading_ones: weakref.WeakSet[PluginTraceProcessor] = weakref.WeakSet()
"""Those that have plugins to load."""


def _pass_on(hook: str) -> Any:
    """A method that calls this hook of each plugin.

    It does nothing if this call with this very object was the last on this thread.
    """

    def method(self: PluginTraceProcessor, item: Any) -> None:
        try:
            last_hook, last_item = self._last.event
            if last_hook == hook and last_item() is item:
                return
        except (AttributeError, MemoryError):  # The first event on this thread.
            pass
        try:
            # Weakly: what an agent said must not stay in memory after its run, and an id may be
            # that of a new object by then.
            self._last.event = (hook, weakref.ref(item))
        except (TypeError, MemoryError):  # A host's object that knows no weak references.
            self._last.__dict__.clear()
        calls, at = self._calls[hook], 0
        while at < len(calls):  # An iterator takes memory, and there may be none.
            where, call = calls[at]
            at += 1
            try:
                call(item)
            except BaseException as error:  # noqa: BLE001 - a plugin's; the agent goes on
                _guard.contain(where, error)

    method.__doc__ = f"Call ``{hook}`` of each plugin."
    return method


class PluginTraceProcessor(TraceProcessor):
    """Passes every event on to each of its plugins, whatever the others do.

    An event that arrives twice in a row on a thread, because the processor was added twice, is
    passed on once.

    Callbacks may come on any thread and at the same time; they take no lock, except to load.
    Plugins may be registered on any thread, and get the events that begin after that.

    Args:
        plugins: by name, in order.
        load: called with this before the first use of its plugins, on the thread of that use, to
            register more. Other threads wait for it. May be called again after an exception.
    """

    def __init__(
        self,
        plugins: Mapping[str, object] | None = None,
        load: Callable[[PluginTraceProcessor], object] | None = None,
    ) -> None:
        self._managers: dict[str, pluggy.PluginManager] = {}
        self._changing = threading.RLock()
        self._calls: dict[str, tuple[_Call, ...]] = dict.fromkeys(HOOKS, ())
        self._only_add = 0
        self._last = threading.local()
        self._unloaded: Callable[[PluginTraceProcessor], object] | None = None
        self._loading = False
        for name, plugin in (plugins or {}).items():
            self.register(plugin, name)
        self._unloaded, self._wait_s = load, LOAD_WAIT_S
        if load is not None:
            _loading_ones.add(self)
        self._arrange(self._managers)

    @property
    def plugins(self) -> dict[str, object]:
        """A new dict of the plugins by name, in order."""
        self._load()
        return {name: manager.get_plugin(name) for name, manager in self._managers.items()}

    def register(self, plugin: object, name: str) -> tuple[str, ...]:
        """Call `plugin`'s hooks from now on; returns the names of those it implements.

        An implementation of a ``qitos_`` hook that does not exist is never called; one warning
        names it.

        Raises:
            ValueError: the name, or this very plugin, is registered already.
            pluggy.PluginValidationError: an implementation asks for arguments that its hook does
                not have. Nothing of the plugin is registered then.
        """
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, name)
        with self._changing:
            for other, registered in self.plugins.items():
                if other == name or registered is plugin:
                    raise ValueError(f"{name!r} or its plugin is registered already, as {other!r}")
            self._arrange({**self._managers, name: manager})
        _warn_of_uncalled(name, manager.get_hookcallers(plugin) or [])
        return self.hooks(name)

    def hooks(self, name: str) -> tuple[str, ...]:
        """The names of the hooks that the plugin of that name implements; empty without one."""
        manager = self._managers.get(name)
        if manager is None:
            return ()
        return tuple(hook for hook in HOOKS if getattr(manager.hook, hook).get_hookimpls())

    def unregister(self, name: str) -> object | None:
        """Stop calling the plugin of that name, and return it; None when there is none."""
        with self._changing:
            remaining = dict(self._managers)
            manager = remaining.pop(name, None)
            self._arrange(remaining)
        return manager.get_plugin(name) if manager is not None else None

    def wants_trace(self) -> bool:
        """Whether any plugin wants a trace that would begin now; False when there are none.

        A plugin that implements `qitos_record` alone adds to others' records and wants no trace.
        """
        self._load()
        unwilling = self._only_add
        for where, call in self._calls["qitos_wants_trace"]:
            with _guard.shield(where):
                unwilling += False in call()
        return unwilling < len(self._managers)

    on_trace_start = _pass_on("qitos_trace_start")
    on_trace_end = _pass_on("qitos_trace_end")
    on_span_start = _pass_on("qitos_span_start")
    on_span_end = _pass_on("qitos_span_end")

    @property
    def wants_records(self) -> bool:
        """Whether any plugin looks at records."""
        return bool(self._calls["qitos_record"])

    def on_record(self, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """What each plugin's ``qitos_record`` returns for a copy of `record`, with its name."""
        returned: list[tuple[str, Any]] = []
        for where, call in self._calls["qitos_record"]:
            with _guard.shield(where):
                returned += [(where, one) for one in call(deepcopy(record))]
        return returned

    def force_flush(self, timeout_s: float | None = None) -> bool:
        """Flush each plugin, also after one failed; True when none said otherwise.

        Blocks as long as the plugins do, one after another. Each gets what is left of `timeout_s`
        (seconds); with None each has its own deadline.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        flushed = True
        for where, call in self._calls["qitos_force_flush"]:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            done = False
            with _guard.shield(where):
                done = False not in call(left_s)
            flushed = done and flushed
        return flushed

    def shutdown(self) -> None:
        """Shut each plugin down; blocks as long as they do, one after another."""
        if self._unloaded is not None and not self._loading:  # They have nothing to deliver.
            self._arrange(self._managers, loaded=True)
        for where, call in self._calls["qitos_shutdown"]:
            with _guard.shield(where):
                call()

    def _load(self) -> None:
        """Load the plugins that are still to be loaded, once. See `load` of the class."""
        if self._unloaded is None:
            return
        with importing():
            if not self._changing.acquire(timeout=self._wait_s):
                self._wait_s = 0.0  # What hangs must not hold up every event.
                _guard.warn("plugins.loading", "trace plugins take long to load; runs go untraced")
                return
            try:
                if self._unloaded is None or self._loading:  # An import that uses this.
                    return
                self._loading = True
                try:
                    with _guard.shield("plugins.load"):
                        self._unloaded(self)
                    self._arrange(self._managers, loaded=True)
                finally:
                    self._loading = False
            finally:
                self._changing.release()

    def _load_for(self, hook: str, item: Any) -> None:
        """Load the plugins, then call this hook of each. Stands for them until then."""
        self._load()
        if self._unloaded is None:
            for where, call in self._calls[hook]:
                with _guard.shield(where):
                    call(item)

    def _arrange(self, managers: dict[str, pluggy.PluginManager], *, loaded: bool = False) -> None:
        """Set `_managers` and `_calls`: which plugins are called for which hook, in order.

        Both are replaced, never changed: other threads may be iterating over them.
        """
        calls: dict[str, tuple[_Call, ...]] = {}
        for hook in HOOKS:
            callers = [(name, getattr(m.hook, hook)) for name, m in managers.items()]
            found = [(name, caller) for name, caller in callers if caller.get_hookimpls()]
            # Stable: else as registered.
            found.sort(key=lambda one: min(i.trylast - i.tryfirst for i in one[1].get_hookimpls()))
            calls[hook] = tuple(
                (f"trace plugin {name}, hook {hook}", _quick(caller)) for name, caller in found
            )
        if self._unloaded is not None and not loaded:
            calls |= {hook: (("plugins.load", partial(self._load_for, hook)),) for hook in EVENTS}
        self._managers, self._calls = managers, calls
        self._only_add = sum(self.hooks(name) == ("qitos_record",) for name in managers)
        if loaded:  # Not before: from now on other threads do not wait.
            self._unloaded = None


def _after_fork() -> None:
    """The thread that loads is the parent's."""
    for processor in _loading_ones:
        processor._changing, processor._loading = threading.RLock(), False
        processor._wait_s = LOAD_WAIT_S


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _quick(caller: pluggy.HookCaller) -> Callable[..., Any]:
    """What calls the implementations; their one implementation directly if it takes all arguments.

    pluggy's own way costs the agent's thread 1.7 µs an event.
    """
    implementations, spec = caller.get_hookimpls(), caller.spec
    assert spec is not None  # `caller` is of one of `HOOKS`.
    function, takes = implementations[0].function, implementations[0].argnames
    wraps = implementations[0].hookwrapper or implementations[0].wrapper
    if wraps or len(implementations) > 1 or set(takes) != set(spec.argnames):
        return lambda *event: caller(**dict(zip(spec.argnames, event, strict=True)))

    if caller.name in EVENTS:
        return function

    def call(*event: Any) -> list[Any]:
        result = function(*event)
        return [] if result is None else [result]

    return call


def _warn_of_uncalled(name: str, callers: list[pluggy.HookCaller]) -> None:
    unknown = [
        caller.name
        for caller in callers
        if not (caller.has_spec() or all(impl.optionalhook for impl in caller.get_hookimpls()))
    ]
    if unknown:
        what = f"{', '.join(unknown)}, which this version does not call; the hooks are: "
        what += ", ".join(HOOKS)
    elif not callers:
        what = f'no hook; mark its functions with pluggy.HookimplMarker("{hookspecs.PROJECT}")'
    else:
        return
    _guard.warn(f"plugins.uncalled.{name}", "trace plugin %s implements %s", name, what)
