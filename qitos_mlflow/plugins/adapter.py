"""One `TraceProcessor` for all plugins: each event becomes one hook call for each plugin.

pluggy stops at the first implementation that raises, so every plugin has a plugin manager to
itself: what it raises, wraps or registers wrongly affects no other plugin.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import pluggy

from qitos_mlflow import _guard
from qitos_mlflow.plugins import hookspecs
from qitos_mlflow.tracing import Span, Trace, TraceProcessor

HOOKS: tuple[str, ...] = tuple(
    name for name in vars(hookspecs) if name.startswith(hookspecs.PREFIX)
)
"""The names of all hooks."""


class _Call(NamedTuple):
    """One plugin's implementations of one hook, and how a log line names them.

    A hook has one argument at most, which is given by position: on the agent's thread it counts.
    """

    hook: Callable[..., list[Any]]
    where: str


class PluginTraceProcessor(TraceProcessor):
    """Passes every event on to each of its plugins, whatever the others do.

    An event that arrives twice in a row on a thread, because the processor was added twice, is
    passed on once.

    Callbacks may come on any thread and at the same time; they take no lock. Plugins may be
    registered on any thread, and get the events that begin after that.
    """

    def __init__(self, plugins: Mapping[str, object] | None = None) -> None:
        self._managers: dict[str, pluggy.PluginManager] = {}
        self._changing = threading.RLock()
        self._calls: dict[str, tuple[_Call, ...]] = dict.fromkeys(HOOKS, ())
        self._only_add = 0
        self._last = threading.local()
        for name, plugin in (plugins or {}).items():
            self.register(plugin, name)

    @property
    def plugins(self) -> dict[str, object]:
        """A new dict of the plugins by name, in order."""
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
            if name in self._managers:
                raise ValueError(f"a plugin named {name!r} is registered already")
            for other, registered in self.plugins.items():
                if registered is plugin:
                    raise ValueError(f"plugin {name!r} is registered already, as {other!r}")
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
        unwilling = self._only_add
        for call in self._calls["qitos_wants_trace"]:
            with _guard.shield(call.where):
                unwilling += False in call.hook()
        return unwilling < len(self._managers)

    def on_trace_start(self, trace: Trace) -> None:
        """Call ``qitos_trace_start`` of each plugin."""
        self._pass_on("qitos_trace_start", trace)

    def on_trace_end(self, trace: Trace) -> None:
        """Call ``qitos_trace_end`` of each plugin."""
        self._pass_on("qitos_trace_end", trace)

    def on_span_start(self, span: Span) -> None:
        """Call ``qitos_span_start`` of each plugin."""
        self._pass_on("qitos_span_start", span)

    def on_span_end(self, span: Span) -> None:
        """Call ``qitos_span_end`` of each plugin."""
        self._pass_on("qitos_span_end", span)

    def on_record(self, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """What each plugin's ``qitos_record`` returns for a copy of `record`, with its name."""
        returned: list[tuple[str, Any]] = []
        for call in self._calls["qitos_record"]:
            with _guard.shield(call.where):
                returned += [(call.where, one) for one in call.hook(deepcopy(record))]
        return returned

    def force_flush(self, timeout_s: float | None = None) -> bool:
        """Flush each plugin, also after one failed; True when none said otherwise.

        Blocks as long as the plugins do, one after another. Each gets what is left of `timeout_s`
        (seconds); with None each has its own deadline.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        flushed = True
        for call in self._calls["qitos_force_flush"]:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            done = False
            with _guard.shield(call.where):
                done = False not in call.hook(left_s)
            flushed = done and flushed
        return flushed

    def shutdown(self) -> None:
        """Shut each plugin down; blocks as long as they do, one after another."""
        for call in self._calls["qitos_shutdown"]:
            with _guard.shield(call.where):
                call.hook()

    def _pass_on(self, hook: str, item: Trace | Span) -> None:
        """Call each plugin, unless this call with this very object was the last on this thread."""
        try:
            last_hook, last_item = self._last.event
            if last_hook == hook and last_item() is item:
                return
        except AttributeError:  # The first event on this thread.
            pass
        try:
            # Weakly: what an agent said must not stay in memory after its run, and an id may be
            # that of a new object by then.
            self._last.event = (hook, weakref.ref(item))
        except TypeError:  # A host's object that knows no weak references.
            self._last.__dict__.clear()
        for call in self._calls[hook]:
            try:
                call.hook(item)
            except Exception as error:  # noqa: BLE001 - a plugin's; the agent goes on
                _guard.report(call.where, error)

    def _arrange(self, managers: dict[str, pluggy.PluginManager]) -> None:
        """Set `_managers` and `_calls`: which plugins are called for which hook, in order.

        Both are replaced, never changed: other threads may be iterating over them.
        """
        calls: dict[str, tuple[_Call, ...]] = {}
        for hook in HOOKS:
            callers = [(name, getattr(m.hook, hook)) for name, m in managers.items()]
            implementing = [(name, caller) for name, caller in callers if caller.get_hookimpls()]
            implementing.sort(key=lambda item: _rank(item[1]))  # Stable: else as registered.
            calls[hook] = tuple(
                _Call(_quick(caller), f"trace plugin {name}, hook {hook}")
                for name, caller in implementing
            )
        self._managers, self._calls = managers, calls
        self._only_add = sum(self.hooks(name) == ("qitos_record",) for name in managers)


def _quick(caller: pluggy.HookCaller) -> Callable[..., list[Any]]:
    """What calls the implementations; their one implementation directly if it takes all arguments.

    pluggy's own way costs the agent's thread 1.7 µs an event.
    """
    implementations, spec = caller.get_hookimpls(), caller.spec
    assert spec is not None  # `caller` is of one of `HOOKS`.
    function, takes = implementations[0].function, implementations[0].argnames
    wraps = implementations[0].hookwrapper or implementations[0].wrapper
    if wraps or len(implementations) > 1 or set(takes) != set(spec.argnames):
        return lambda *event: caller(**dict(zip(spec.argnames, event, strict=True)))

    def call(*event: Any) -> list[Any]:
        result = function(*event)
        return [] if result is None else [result]

    return call


def _rank(caller: pluggy.HookCaller) -> int:
    return min(impl.trylast - impl.tryfirst for impl in caller.get_hookimpls())


def _warn_of_uncalled(name: str, callers: list[pluggy.HookCaller]) -> None:
    unknown = [
        caller.name
        for caller in callers
        if not (caller.has_spec() or all(impl.optionalhook for impl in caller.get_hookimpls()))
    ]
    if unknown:
        _guard.warn(
            f"plugins.unknown_hook.{name}",
            "trace plugin %s implements %s, which this version does not call; the hooks are: %s",
            name,
            ", ".join(unknown),
            ", ".join(HOOKS),
        )
    elif not callers:
        _guard.warn(
            f"plugins.no_hook.{name}",
            "trace plugin %s implements no hook; mark its functions with "
            'pluggy.HookimplMarker("%s")',
            name,
            hookspecs.PROJECT,
        )
