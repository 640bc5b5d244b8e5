"""Wiring: settings -> processor -> provider.

Two of the three ways in meet here: the start-up line (`activate`) and `autolog`. The third, a
processor registered by hand, needs only `bridge.ensure_bridge`.

The start-up line's way has three moments, so that `import qitos` costs 2.6 ms, destination or not:

    import qitos                the Engine is wrapped, `qitos.tracing` served, threads are watched
    first use of the tracing    a processor without plugins is attached, before any other one
    first trace                 the plugins are found and imported

Each is on the thread that causes it; the others wait for the import or for the plugins.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qitos_mlflow._after_import import after_import

if TYPE_CHECKING:
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor

_lock = threading.RLock()
_adapter: PluginTraceProcessor | None = None
_autolog: MlflowTraceProcessor | None = None


def autolog(
    *,
    experiment_name: str | None = None,
    run_name: str | None = None,
    tracking_uri: str | None = None,
    tags: Mapping[str, Any] | None = None,
    disable: bool = False,
    **options: Any,
) -> None:
    """Log every QitOS agent run of this process to MLflow from now on.

    Call it before or after importing qitos. A later call replaces the settings of an earlier one.
    Nothing is logged twice: an automatically loaded MLflow plugin stands down for this, and this
    for a processor registered by hand.

    Args:
        experiment_name: MLflow experiment, created when missing.
        run_name: name of the runs; None: the trace's name, by default the agent's.
        tracking_uri: tracking server; None: MLflow's own default.
        tags: tags of every run.
        disable: stop logging to MLflow, also by the automatically loaded plugin. Runs that are
            open are logged to their end. A processor registered by hand stays.
        **options: any other field of `Settings`; they are listed in docs/settings.md.

    Raises:
        SettingsError: a value cannot be used.
        MissingMlflowError: mlflow is not installed.
    """
    global _autolog
    from qitos_mlflow import tracing
    from qitos_mlflow.mlflow_plugin.plugin import MlflowPlugin, Origin

    with _lock:
        new = None
        if not disable:
            from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor  # Needs mlflow.

            new = MlflowTraceProcessor(experiment_name, run_name, tracking_uri, tags, **options)
            new.mlflow_plugin.origin = Origin.AUTOLOG
        elif _adapter is not None:
            plugin: Any = _adapter.plugins.get("mlflow")
            if isinstance(plugin, MlflowPlugin):
                plugin.retire(partial(_adapter.unregister, "mlflow"))
        if _autolog is not None:
            same = new is not None and new.mlflow_plugin.settings == _autolog.mlflow_plugin.settings
            if same and _autolog in tracing.processors():
                return
            # Stop notifying it once its open runs have ended.
            _autolog.mlflow_plugin.retire(partial(tracing.remove_trace_processor, _autolog))
        _autolog = new
        if new is not None:
            tracing.add_trace_processor(new)


def activate() -> None:
    """Install the bridge, and have the installed trace plugins attached when tracing is used.

    The start-up line calls this after ``import qitos``. Which plugins: ``QITOS_TRACE_PLUGINS``.
    Imports none of them.
    """
    from qitos_mlflow._selection import Selection
    from qitos_mlflow.bridge import ensure_bridge

    ensure_bridge()
    selection = Selection.from_environ()
    if selection.wanted == ():
        return
    if selection.rank("mlflow", "qitos-mlflow") is not None:
        from qitos_mlflow.mlflow_plugin.watches import watch

        watch()
    atexit.register(_end)
    # Whichever is used: ours, or that of a host which has its own.
    after_import("qitos_mlflow.tracing._host", _when_used)
    after_import("qitos.tracing", _when_used)


def _when_used(module: ModuleType) -> None:
    """Attach a processor that loads the installed plugins when its first trace begins."""
    global _adapter
    if hasattr(module, "__qitos_mlflow__"):  # Ours is served, and not used yet.
        return
    from qitos_mlflow import tracing
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor

    with _lock:
        if _adapter is None:
            _adapter = PluginTraceProcessor(load=_load)
            tracing.add_trace_processor(_adapter)


def _load(adapter: PluginTraceProcessor) -> None:
    from qitos_mlflow import tracing
    from qitos_mlflow.plugins import loader

    if not any(info.state == "loaded" for info in loader.load(adapter)):
        tracing.remove_trace_processor(adapter)  # So that a run costs nothing.


def _end() -> None:
    """The process ends. For a first trace in an exit handler, when none can be registered."""
    process_exit: Any = sys.modules.get("qitos_mlflow.recording.process_exit")
    if process_exit is not None:
        process_exit.end()
