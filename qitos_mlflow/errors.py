"""The errors this package raises on purpose. None of them is ever raised into an agent's run."""

from __future__ import annotations


class QitosMlflowError(Exception):
    """Base of all errors raised on purpose; its text says what to do next."""


class SettingsError(QitosMlflowError, ValueError):
    """A setting has a value that cannot be used; the text names setting, value and source."""


class MissingMlflowError(QitosMlflowError, ImportError):
    """mlflow is not installed; the text has the command that installs it."""
