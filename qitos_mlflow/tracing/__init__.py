"""The tracing API of the host (the QitOS that is installed): its own if it has one, else ours.

Receives what the bridge and the user's code trace, and hands it on to the processors. Whose API
it is, is decided when a name is first used; `host_has_tracing` says what was decided. A few helpers
of ours are here, too, the same on any host. Nothing here knows of MLflow or of plugins.

The decision may import qitos, and that may lead back here: the start-up line loads plugins as
soon as qitos is imported. Importing this package therefore decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qitos_mlflow.tracing import _host
from qitos_mlflow.tracing.access import content_allowed as content_allowed
from qitos_mlflow.tracing.access import processors as processors
from qitos_mlflow.tracing.access import remove_trace_processor as remove_trace_processor

if TYPE_CHECKING:
    # At run time the names are found in `_host.OURS`, which has what these modules define.
    from qitos_mlflow.tracing.config import *  # noqa: F403
    from qitos_mlflow.tracing.processor import *  # noqa: F403
    from qitos_mlflow.tracing.provider import *  # noqa: F403
    from qitos_mlflow.tracing.span import NoOpSpan as NoOpSpan
    from qitos_mlflow.tracing.span import Span as Span
    from qitos_mlflow.tracing.span_data import *  # noqa: F403
    from qitos_mlflow.tracing.trace import *  # noqa: F403

    host_has_tracing: bool
    """Whether these names are the host's own."""
else:

    def __getattr__(name: str) -> Any:
        if name != "host_has_tracing" and name not in _host.NAMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        settled = _host.settled()
        globals().update(settled)
        return settled[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_host.NAMES, "host_has_tracing"})
