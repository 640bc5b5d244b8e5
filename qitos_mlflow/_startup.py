"""What Python's start sets up: waits for `import qitos`, and costs nothing until then.

The line in `qitos_mlflow.pth` is a watcher like the one below, but short: Python compiles it at
every start (0.1 ms), and importing even this file would take ten times as long (the first import
from a directory lists it). Once qitos is imported it calls `arrived`. `install` is for
`qitos_mlflow.start` (PEP 829) and `qitos_mlflow.auto`. Standard library only.
"""

import os
import sys

OFF = ("none", "off", "0", "")
"""Values of ``QITOS_TRACE_PLUGINS`` that load nothing at all."""


class QitosWatcher:
    """A finder that finds nothing itself: it turns logging on when qitos is first imported."""

    qitos_watcher = True
    """How a watcher is told from other finders, this one and the start-up line's alike."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        """Pass on every name but ``qitos``."""
        return arrived() if name == "qitos" else None


def arrived() -> object:
    """``import qitos`` has begun: arrange for `wiring.activate`; returns qitos's own spec.

    Never raises. Does nothing where ``QITOS_TRACE_PLUGINS`` says so.
    """
    remove()
    try:
        from importlib.util import find_spec

        if not off():
            from qitos_mlflow.wiring import activate_on_import

            activate_on_import()
        # Asked anew: the list of finders has just changed under the import system's feet.
        return find_spec("qitos")
    except Exception as error:  # noqa: BLE001 - an agent's import must not fail for us
        print(f"qitos-mlflow: not active: {error!r}", file=sys.stderr)  # noqa: T201
        return None


def off() -> bool:
    """Whether ``QITOS_TRACE_PLUGINS`` says that nothing is to be loaded."""
    return os.environ.get("QITOS_TRACE_PLUGINS", "unset").strip().lower() in OFF


def install() -> None:
    """Watch for ``import qitos``, unless ``QITOS_TRACE_PLUGINS`` says none.

    Never raises; may be called any number of times, also after qitos was imported.
    """
    if off():
        return
    if "qitos" in sys.modules:
        arrived()
    elif not any(_is_watcher(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, QitosWatcher)  # type: ignore[arg-type]


def remove() -> None:
    """Stop watching. Never raises."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_watcher(finder)]


def _is_watcher(finder: object) -> bool:
    return getattr(finder, "qitos_watcher", False) is True
