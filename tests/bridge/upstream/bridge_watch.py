"""A pytest plugin for the host's own test suite: notes every outcome, with or without the bridge.

Set by the environment: BRIDGE_WATCH_REPORT is the file to write, BRIDGE_WATCH_ON turns the bridge
on, with a processor that keeps account of what is open.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow import _guard, bridge, tracing

outcomes: dict[str, list[str]] = {}
swallowed: list[str] = []


class Account(tracing.TraceProcessor):
    """Counts what was started, keeps what is not ended, notes what ended without a start."""

    def __init__(self) -> None:
        self.traces = self.spans = 0
        self.open: dict[str, str] = {}
        self.wrong: list[str] = []

    def on_trace_start(self, trace: Any) -> None:
        self.traces += 1
        self.open[trace.trace_id] = trace.name

    def on_trace_end(self, trace: Any) -> None:
        self._close(trace.trace_id)

    def on_span_start(self, span: Any) -> None:
        self.spans += 1
        self.open[span.span_id] = span.data.type

    def on_span_end(self, span: Any) -> None:
        self._close(span.span_id)

    def _close(self, identity: str) -> None:
        if self.open.pop(identity, None) is None:
            self.wrong.append(identity)


account = Account()


def pytest_configure(config: pytest.Config) -> None:
    tracing.set_trace_processors([])
    if os.environ["BRIDGE_WATCH_ON"] == "1":
        _guard.watchers.append(lambda where, error: swallowed.append(f"{where}: {error!r}"))
        tracing.add_trace_processor(account)
        bridge.install()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcomes.setdefault(report.nodeid, []).append(f"{report.when} {report.outcome}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        outcomes.setdefault(report.nodeid, []).append(f"collect {report.outcome}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    watched = {
        "outcomes": outcomes,
        "swallowed": swallowed,
        "traces": account.traces,
        "spans": account.spans,
        "open": sorted(account.open.values()),
        "wrong": account.wrong,
    }
    Path(os.environ["BRIDGE_WATCH_REPORT"]).write_text(json.dumps(watched))
