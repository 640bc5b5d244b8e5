"""Undoes in a process what the package never undoes by itself. For tests; scripts of theirs too."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qitos_mlflow import bridge, tracing, wiring
from qitos_mlflow.bridge import calls, patches
from qitos_mlflow.tracing import compat

WRAPPED = {
    ("qitos.engine.engine", "Engine"): ("run", "init_session", "step"),
    ("qitos.engine.action_executor", "ActionExecutor"): ("_execute_one", "_call_tool"),
    ("qitos.engine.critic_result", "CriticResult"): ("from_dict",),
}
"""What the bridge replaces: methods of these classes."""
OURS = [const for const in patches.wrap.__code__.co_consts if hasattr(const, "co_code")]
"""The code of what it puts there."""


def deactivate() -> None:
    """Detach our processors, unwrap the Engine, and stop serving `qitos.tracing`."""
    wiring.autolog(disable=True)
    if wiring._adapter is not None:
        tracing.remove_trace_processor(wiring._adapter)
        wiring._adapter = None
    uninstall()
    stop_serving()


def uninstall() -> None:
    """Put the host's own methods and thread pools back, as before `bridge.install`."""
    bridge.installed = calls._fitted = False
    for (module, owner_name), names in WRAPPED.items():
        owner: Any = getattr(sys.modules.get(module), owner_name, None)
        for name in names:
            method = vars(owner).get(name) if owner is not None else None
            function = getattr(method, "__func__", method)
            if getattr(function, "__code__", None) in OURS:
                of_class = isinstance(method, classmethod)
                original = function.__wrapped__  # type: ignore[union-attr]
                setattr(owner, name, classmethod(original) if of_class else original)
    for module in calls.POOLS:
        if module in sys.modules:
            vars(sys.modules[module])["ThreadPoolExecutor"] = ThreadPoolExecutor


def stop_serving() -> None:
    """Stop serving `qitos.tracing`. Modules that were served stay with those who imported them."""
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "serves_qitos_tracing", False)]
    for name in [*compat.SERVED, compat.PROCESSOR_MODULE]:
        if getattr(sys.modules.get(name), "__qitos_mlflow__", False):
            del sys.modules[name]
    host = sys.modules.get("qitos")
    if getattr(getattr(host, "tracing", None), "__qitos_mlflow__", False):
        del host.tracing  # type: ignore[union-attr]
