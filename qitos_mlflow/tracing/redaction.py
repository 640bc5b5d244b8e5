"""Takes the content out of traces: what stays is structure and numbers, no text anyone wrote.

(Credentials are another matter: the package `redaction`.)

Allow-lists, not block-lists: an unknown field is content. A field that is on a list but holds
something else than a name or a number (a dict under ``name``, a page of text under
``tool_name``) is content as well. Pure functions; the arguments are not changed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qitos_mlflow._guard import let_through

REDACTED = "__redacted__"
"""Stands where content was. None stays None: absent and redacted values differ."""

STRUCTURAL_FIELDS = frozenset({
    "type", "name", "model", "tools", "output_type", "step_number", "token_usage", "action_name",
    "tool_name", "server_name", "input_count", "critic_name", "score", "from_agent", "to_agent",
    "context_strategy", "messages_passed",
})  # fmt: skip
"""Fields of span data that carry structure: names, kinds, counts, token usage, score."""

STRUCTURAL_METADATA = frozenset({
    "agent_name", "benchmark_name", "benchmark_split", "linked_span_id", "linked_trace_id",
    "max_steps", "model_family", "model_name", "parser", "protocol", "qitos_run_id",
    "qitos_version", "seed", "status", "stop_reason", "success", "task_id",
})  # fmt: skip
"""Keys of a trace's metadata that carry structure."""

NAME_CHARS = 256
"""A longer text, or one of several lines, is no name. Longest names seen in the wild: about 100."""


def redacted_export(exported: Mapping[str, Any]) -> dict[str, Any]:
    """`exported` (of any span data, on any host) with everything but structure redacted."""
    return {
        name: _structure(value) if name in STRUCTURAL_FIELDS else _content(value)
        for name, value in exported.items()
    }


def redacted_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` (of a trace) with every value redacted but those of `STRUCTURAL_METADATA`."""
    return {
        key: _structure(value, nested=False) if key in STRUCTURAL_METADATA else _content(value)
        for key, value in metadata.items()
    }


def redacted_exception(error: BaseException) -> BaseException:
    """A stand-in of the same class without message, arguments, cause or traceback.

    If the class cannot be made that way, its nearest base that can: KeyboardInterrupt stays one,
    so that a processor can still distinguish interrupted from failed.
    """
    for base in type(error).__mro__:
        if not issubclass(base, BaseException):
            continue
        try:
            stand_in = base.__new__(base, REDACTED)
            str(stand_in), repr(stand_in)  # A class may need what its __init__ would have set.
        except BaseException as own:  # noqa: BLE001 - a class of the user's; the next may do
            let_through(own)
            continue
        return stand_in
    return Exception(REDACTED)


def _content(value: Any) -> Any:
    return None if value is None else REDACTED


def _structure(value: Any, *, nested: bool = True) -> Any:
    """`value` when it is a name or a number, or (`nested`) a list of names, a dict of numbers."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= NAME_CHARS and value.isprintable() else REDACTED
    if nested and isinstance(value, (list, tuple)):
        return [
            item if isinstance(item, str) and _structure(item) == item else REDACTED
            for item in value
        ]
    if nested and isinstance(value, Mapping):
        return {
            str(key): number if isinstance(number, (int, float)) else _content(number)
            for key, number in value.items()
        }
    return REDACTED


class RedactingSpanData:
    """`RedactingSpanData(data)`: a copy of `data`, of its own class, without its content.

    The copy is an instance of both this class and `data`'s class. Its attributes and its `export`
    have structure only, and nothing in it refers to the original.
    """

    _type: str

    def __new__(cls, span_data: Any) -> RedactingSpanData:
        """An instance of a class derived from this one and from that of `span_data`."""
        base: Any = type(span_data)  # If this cannot export, it is no span data but a dict, say.
        with suppress(Exception):  # The user's own, such as a tuple, may not be derived from.
            return object.__new__(_redacting(base) if hasattr(base, "export") else cls)
        return object.__new__(RedactingSpanData)

    def __init__(self, span_data: Any) -> None:
        # object.__setattr__: span data of the user's own may be frozen.
        for name, value in redacted_export(_attributes(span_data)).items():
            object.__setattr__(self, name, value)
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
        except BaseException as error:  # noqa: BLE001 - it computes with what is redacted
            let_through(error)
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
