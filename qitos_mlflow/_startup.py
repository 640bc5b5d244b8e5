"""What runs when Python starts: waits for `import qitos`, and costs nothing until then.

The line in `qitos_mlflow.pth` is a finder that finds nothing itself. When qitos is imported for
the first time it calls `arrived`. Python compiles the line at every start (0.1 ms); importing
even this file would take ten times as long, because the first import from a directory lists it.
`install` is for `qitos_mlflow.start` (PEP 829) and `qitos_mlflow.auto`. Standard library only.
"""

import os
import sys

OFF = ("none", "off", "0", "")
"""Values of ``QITOS_TRACE_PLUGINS`` that load nothing at all."""


def arrived() -> object:
    """``import qitos`` has begun: arrange for `wiring.activate`; returns qitos's own spec.

    Takes the start-up line's finder out, however often it is there. Never raises.
    """
    try:
        sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "qitos_watcher", False)]
        install()
        from importlib.util import find_spec

        # This asks all finders anew, since their list has just changed during the search.
        return find_spec("qitos")
    except Exception as error:  # noqa: BLE001 - an agent's import must not fail for us
        _say_inactive(error)
        return None


def install() -> None:
    """Call `wiring.activate` once qitos is imported, unless ``QITOS_TRACE_PLUGINS`` says none.

    May be called any number of times, before and after qitos is imported.
    """
    if os.environ.get("QITOS_TRACE_PLUGINS", "unset").strip().lower() in OFF:
        return
    from qitos_mlflow._after_import import after_import

    after_import("qitos", _activate)


def _activate(_qitos: object) -> None:
    try:
        from qitos_mlflow.wiring import activate
    except Exception as error:  # noqa: BLE001 - too little of the package is there to log it
        _say_inactive(error)
    else:
        activate()


def _say_inactive(error: Exception) -> None:
    try:
        from qitos_mlflow._guard import in_words, say

        say(f"not active: {in_words(error)}")
    except Exception:  # noqa: BLE001 - too little of the package is there
        print(f"qitos-mlflow: not active: {type(error).__name__}", file=sys.stderr)  # noqa: T201
