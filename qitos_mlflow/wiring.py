"""Wiring: settings -> processor -> provider, with the bridge installed; all of it undoable.

Three ways in meet here: the start-up line (`activate_on_import`), `autolog` by hand, and a
processor registered by hand, which only needs `ensure_bridge`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import wrapt

from qitos_mlflow._guard import report

if TYPE_CHECKING:
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor

_lock = threading.RLock()
_adapter: PluginTraceProcessor | None = None
_autolog: MlflowTraceProcessor | None = None
_waiting_for_qitos: set[str] = set()


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

    Call it before or after importing qitos; called again it replaces what the earlier call
    configured. Nothing is logged twice: an automatically loaded MLflow plugin stands down for
    this, and this for a processor registered by hand.

    Args:
        experiment_name: MLflow experiment, created when missing.
        run_name: name of the runs; None: the trace's name, by default the agent's.
        tracking_uri: tracking server; None: MLflow's own default.
        tags: tags of every run.
        disable: stop logging to MLflow, also by the automatically loaded plugin; runs that are
            going are logged to their end. A processor registered by hand stays.
        **options: any other field of `Settings`; they are listed in docs/settings.md.

    Raises:
        SettingsError: a value cannot be used.
        MissingMlflowError: mlflow is not installed.
    """
    global _autolog
    from qitos_mlflow import tracing
    from qitos_mlflow.mlflow_plugin.plugin import MlflowPlugin

    with _lock:
        if disable:
            if _adapter is not None:
                plugin: Any = _adapter.plugins.get("mlflow")
                if isinstance(plugin, MlflowPlugin):
                    plugin.retire(partial(_adapter.unregister, "mlflow"))
            if _autolog is not None:
                _retire(_autolog)
                _autolog = None
            return
        from qitos_mlflow.mlflow_plugin.precedence import Origin
        from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
        from qitos_mlflow.settings import Settings

        settings = Settings.resolve(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=tracking_uri,
            tags=tags,
            **options,
        )
        if _autolog is not None:
            unchanged = _autolog.mlflow_plugin.settings == settings
            if unchanged and _autolog in tracing.processors():
                return
            _retire(_autolog)
        _autolog = MlflowTraceProcessor(**vars(settings))
        _autolog.mlflow_plugin.origin = Origin.AUTOLOG
        tracing.add_trace_processor(_autolog)


def activate() -> None:
    """Load the installed trace plugins and attach them to the global provider, once.

    What the start-up line does after ``import qitos``. Which plugins: ``QITOS_TRACE_PLUGINS``.
    """
    global _adapter
    from qitos_mlflow import tracing
    from qitos_mlflow.plugins import loader
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor

    with _lock:
        if _adapter is not None:
            return
        ensure_bridge()
        adapter = PluginTraceProcessor()
        loader.load(adapter)
        _adapter = adapter
        if adapter.plugins:
            tracing.add_trace_processor(adapter)


def deactivate() -> None:
    """Undo everything: detach our processors, unwrap the Engine, stop watching for imports."""
    global _adapter
    from qitos_mlflow import _startup, bridge, tracing

    with _lock:
        autolog(disable=True)
        if _adapter is not None:
            tracing.remove_trace_processor(_adapter)
            _adapter = None
        bridge.uninstall()
        _startup.remove()


def _retire(processor: MlflowTraceProcessor) -> None:
    """Have it hear no more once the runs that it is logging have ended."""
    from qitos_mlflow import tracing

    processor.mlflow_plugin.retire(partial(tracing.remove_trace_processor, processor))


def activate_on_import() -> None:
    """Call `activate` once qitos is imported; at once if it is already."""
    _after_qitos("activate")


def ensure_bridge() -> None:
    """Have Engine runs become traces: now if qitos is imported, else as soon as it is."""
    _after_qitos("install_bridge")


def _after_qitos(what: str) -> None:
    with _lock:
        if "qitos" in sys.modules:
            _ACTIONS[what](sys.modules["qitos"])
        elif what not in _waiting_for_qitos:
            _waiting_for_qitos.add(what)
            wrapt.register_post_import_hook(_ACTIONS[what], "qitos")


def _activate(_module: Any) -> None:
    try:
        _serve_tracing()
        activate()
    except Exception as error:  # noqa: BLE001 - the agent's import goes on without us
        report("wiring.activate", error)


def _install_bridge(_module: Any) -> None:
    try:
        _serve_tracing()
        from qitos_mlflow import bridge

        bridge.install()
    except Exception as error:  # noqa: BLE001
        report("wiring.install_bridge", error)


def _serve_tracing() -> None:
    """Have `qitos.tracing` on hosts without it. Only after qitos is imported: it looks there."""
    from qitos_mlflow.tracing import compat

    compat.install()


_ACTIONS = {"activate": _activate, "install_bridge": _install_bridge}
