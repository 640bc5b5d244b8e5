"""What the start-up line calls in every Python process: waits for `import qitos`, costs nothing.

Standard library only, and as little of it as possible: `install` must stay below 0.2 ms
(`benchmarks/startup.py`). Only when qitos is imported is anything else of the package loaded.
"""

import os
import sys

OFF = ("none", "off", "0", "")
"""Values of ``QITOS_TRACE_PLUGINS`` that load nothing at all."""


class QitosWatcher:
    """A finder that finds nothing itself: it turns logging on when qitos is first imported."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        """Pass on every name; at ``qitos`` step aside and arrange for `wiring.activate`."""
        if name != "qitos":
            return None
        remove()
        try:
            from importlib.util import find_spec

            from qitos_mlflow.wiring import activate_on_import

            activate_on_import()
            # Asked anew: the list of finders has just changed under the import system's feet.
            return find_spec(name)
        except Exception as error:  # noqa: BLE001 - an agent's import must not fail for us
            print(f"qitos-mlflow: not active: {error!r}", file=sys.stderr)  # noqa: T201
            return None


def install() -> None:
    """Watch for ``import qitos``, unless ``QITOS_TRACE_PLUGINS`` says none.

    Never raises; may be called any number of times.
    """
    if os.environ.get("QITOS_TRACE_PLUGINS", "unset").strip().lower() in OFF:
        return
    if "qitos" in sys.modules:
        try:
            from qitos_mlflow.wiring import activate_on_import

            activate_on_import()
        except Exception as error:  # noqa: BLE001
            print(f"qitos-mlflow: not active: {error!r}", file=sys.stderr)  # noqa: T201
    elif QitosWatcher not in sys.meta_path:  # type: ignore[comparison-overlap]
        sys.meta_path.insert(0, QitosWatcher)  # type: ignore[arg-type]


def remove() -> None:
    """Stop watching. Never raises."""
    if QitosWatcher in sys.meta_path:  # type: ignore[comparison-overlap]
        sys.meta_path.remove(QitosWatcher)  # type: ignore[arg-type]
