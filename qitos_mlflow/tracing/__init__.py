"""The tracing API of the host (the QitOS that is installed): its own if it has one, else ours.

Receives what the bridge and the user's code trace, and hands it on to the processors. Whose API
it is, is decided when a name is first used; `host_has_tracing` says what was decided. A few helpers
of ours are here, too, the same on any host. Nothing here knows of plugins; of MLflow, `compat`
alone knows the name of the processor that it serves.

The decision may import qitos, and that may lead back here: the start-up line is active as soon as
qitos is imported. Importing this package therefore decides nothing, and loads nothing. The first
use of a name imports `_host`; whatever must be there before any other user waits for that import.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from qitos_mlflow._forks import importing

if TYPE_CHECKING:
    # At run time the names are found in `_host.OURS`, which has what these modules define.
    from qitos_mlflow.tracing.models import Span as Span
    from qitos_mlflow.tracing.models import Trace as Trace
    from qitos_mlflow.tracing.models import TraceProcessor as TraceProcessor
    from qitos_mlflow.tracing.models import TracingMode as TracingMode
    from qitos_mlflow.tracing.processor import *  # noqa: F403
    from qitos_mlflow.tracing.provider import *  # noqa: F403
    from qitos_mlflow.tracing.redaction import RedactingSpanData as RedactingSpanData
    from qitos_mlflow.tracing.span_data import *  # noqa: F403

    host_has_tracing: bool
    """Whether these names are the host's own."""
else:

    def __getattr__(name: str) -> Any:
        if name[0] != "_" and name not in MODULES:
            known = settled()
            if name in known:
                globals().update(known)
                return known[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


MODULES = ("compat", "models", "processor", "provider", "redaction", "span_data")
"""Those of this package; an import looks for an attribute of that name first."""


def __dir__() -> list[str]:
    return sorted({*globals(), *settled()})


_known: dict[str, Any] | None = None

_deciding = threading.RLock()
_inside = False
"""Whether the thread that holds `_deciding` is in its first call."""

DECIDE_WAIT_S = 2.0
"""Longest wait for another thread's first call (seconds): it may wait for an import of this one."""


def settled() -> dict[str, Any]:
    """As in `_host`. The first call imports that, and calls who waits for the import.

    Other threads wait until that is done, and so does a fork.
    """
    global _known, _inside
    if _known is not None:
        return _known
    with importing():
        locked, outermost = _deciding.acquire(timeout=DECIDE_WAIT_S), not _inside
        try:
            _inside = True
            from qitos_mlflow.tracing import _host

            known = _host.settled()
            if outermost:
                _known = known
            return known
        finally:
            if outermost:
                _inside = False
            if locked:
                _deciding.release()


def processors(trace: Trace | None = None) -> tuple[TraceProcessor, ...]:
    """What gets the events of `trace`, in order; None, or one that hides it: of the global traces.

    Any thread; never blocks.
    """
    through = getattr(trace, "_processor", None)
    through = getattr(through, "_delegate", through)  # Of what takes the content out.
    found: Any = getattr(through, "processors", None)
    if found is None:
        provider = settled()["get_tracing_provider"]()
        found = getattr(getattr(provider, "_multi_processor", provider), "processors", ())
    return tuple(found)


def remove_trace_processor(processor: TraceProcessor) -> None:
    """Stop notifying `processor`, also of open traces; the others stay.

    One that is not attached is no error. Any thread; never blocks.
    """
    provider = settled()["get_tracing_provider"]()
    if hasattr(provider, "remove_processor"):
        provider.remove_processor(processor)
        return
    holder = getattr(provider, "_multi_processor", None)
    old = getattr(holder, "_processors", None)
    if holder is None or not isinstance(old, list):
        return
    # A new list: another thread may be iterating over the old one, and would skip a processor.
    length = len(old)
    new = [other for other in old if other is not processor]
    holder._processors = new
    new.extend(old[length:])  # Added by another thread meanwhile.


def content_allowed(trace_or_span: Trace | Span) -> bool:
    """False when the trace was made under `ENABLED_WITHOUT_DATA`. Any thread; never blocks.

    A host does not store the mode in its traces. There it is inferred from what they do have, and
    if that says nothing (an object built by hand), the provider's present mode decides.
    """
    mode = getattr(trace_or_span, "mode", None)
    of_host = settled()
    if mode is None:
        spans = getattr(trace_or_span, "_spans", None) or [trace_or_span]
        redacting = of_host["RedactingSpanData"]
        if any(isinstance(getattr(span, "data", None), redacting) for span in spans):
            return False
        # What its events go through.
        through = getattr(trace_or_span, "_processor", None)
        if isinstance(through, of_host["SynchronousMultiTraceProcessor"]):
            return True
        if "redact" in type(through).__name__.lower():
            return False
        mode = of_host["get_tracing_provider"]().mode
    return bool(mode != of_host["TracingMode"].ENABLED_WITHOUT_DATA)
