"""How much is traced: the mode, and what stands for span data in a trace without content."""

from __future__ import annotations

import functools
from enum import Enum
from typing import Any

from qitos_mlflow.tracing.redaction import redacted_export, redacted_field


class TracingMode(str, Enum):
    """Everything, structure and numbers without content, or nothing at all."""

    ENABLED = "enabled"
    ENABLED_WITHOUT_DATA = "enabled_without_data"
    DISABLED = "disabled"


class RedactingSpanData:
    """`RedactingSpanData(data)`: a copy of `data`, of its own class, without its content.

    The copy is an instance of both this class and `data`'s class. Its attributes and its `export`
    have structure only, and nothing in it refers to the original.
    """

    _type: str

    def __new__(cls, span_data: Any) -> RedactingSpanData:
        """An instance of a class derived from this one and from that of `span_data`."""
        base: Any = type(span_data)  # If this cannot export, it is no span data but a dict, say.
        return object.__new__(_redacting(base) if hasattr(base, "export") else cls)

    def __init__(self, span_data: Any) -> None:
        # object.__setattr__: span data of the user's own may be frozen.
        for name, value in _attributes(span_data).items():
            object.__setattr__(self, name, redacted_field(name, value))
        object.__setattr__(self, "_type", str(getattr(span_data, "type", "custom")))

    @property
    def type(self) -> str:
        """The kind of span, as the original says."""
        return self._type

    def export(self) -> dict[str, Any]:
        """The fields, content redacted; ``type`` alone if the class cannot export without it."""
        try:
            exported = super().export()  # type: ignore[misc]
            return {**redacted_export(exported), "type": self._type}
        except Exception:  # noqa: BLE001 - an export that computes with what is now redacted
            return {"type": self._type}


@functools.lru_cache(maxsize=256)
def _redacting(base: Any) -> type[RedactingSpanData]:
    # type(base): span data is abstract, so the metaclass is ABCMeta, or one of the user's own.
    kind: Any = type(base)
    bases = (base,) if issubclass(base, RedactingSpanData) else (RedactingSpanData, base)
    derived: type[RedactingSpanData] = kind(base.__name__, bases, {"__module__": base.__module__})
    return derived


def _attributes(data: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in type(data).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(data, name):
                found[name] = getattr(data, name)
    return {**found, **getattr(data, "__dict__", {})}
