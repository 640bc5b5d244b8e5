"""Stopping for a human, with context variables of the host's own."""

import contextvars

answers = contextvars.ContextVar("answers", default=None)


class EngineInterrupt(Exception):
    def __init__(self, value=None):
        super().__init__(str(value))
        self.value = value


def interrupt(value=None):
    """The human's answer, if this context has one; else stop."""
    if answers.get() is not None:
        return answers.get()
    raise EngineInterrupt(value)
