"""Modes, and redaction as leaky as the real thing's: only `export` hides anything."""

from enum import Enum

HIDDEN = {"tool_args", "input_content", "output_content", "model_response"}
SECRETS = {"api_key", "password", "secret", "token", "authorization"}


class TracingMode(str, Enum):
    ENABLED = "enabled"
    ENABLED_WITHOUT_DATA = "enabled_without_data"
    DISABLED = "disabled"


class RedactingSpanData:
    """Wraps span data without being an instance of its class; attributes go straight through."""

    def __init__(self, span_data):
        self.__dict__["wrapped"] = span_data

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    @property
    def type(self):
        return self.wrapped.type

    def export(self):
        return hide(self.wrapped.export())


def hide(value):
    if isinstance(value, list):
        return [hide(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: "__redacted__" if key in HIDDEN | SECRETS else hide(item)
        for key, item in value.items()
    }
