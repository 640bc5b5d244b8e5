"""One way out for log lines: each says whose it is, and a warning is not repeated at once."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from qitos_mlflow import _guard


def test_every_line_begins_with_the_package(caplog: pytest.LogCaptureFixture) -> None:
    """Log lines begin with `qitos-mlflow: `, of any level; tracebacks are apart, as text."""
    error = ValueError("why")
    with caplog.at_level(logging.DEBUG, "qitos_mlflow"):
        _guard.log(logging.INFO, "it is %s", "so")
        _guard.log(logging.DEBUG, "traceback", error=error)
    assert caplog.messages == ["qitos-mlflow: it is so", "qitos-mlflow: traceback"]
    assert (caplog.records[1].exc_info, caplog.records[1].exc_text) == (None, "ValueError: why")


def test_a_warning_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under one key there is one warning a minute; other keys have theirs."""
    now_s = 1000.0
    monkeypatch.setattr(_guard, "_last_logged", {})
    monkeypatch.setattr(_guard.time, "monotonic", lambda: now_s)
    for now_s in (1000.0, 1059.0, 1061.0):
        _guard.warn("one", "at %s", now_s)
    _guard.warn("another", "too")
    assert [message[14:] for message in caplog.messages] == ["at 1000.0", "at 1061.0", "too"]


def test_what_was_warned_of_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key may be of a run, and a process may log a million of them."""
    monkeypatch.setattr(_guard, "_last_logged", {})
    monkeypatch.setattr(_guard, "log", lambda *args: None)
    for number in range(3 * _guard.MAX_KEYS):
        _guard.warn(f"run {number}", "is deleted")
    assert 0 < len(_guard._last_logged) <= _guard.MAX_KEYS


def test_a_line_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a line of another thread's log comes to stand in the middle of it."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, closed=False))
    _guard.say("what is left")
    assert written == ["qitos-mlflow: what is left\n"]
