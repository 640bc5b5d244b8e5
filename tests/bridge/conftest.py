"""Installs the bridge for a test, with a recorder attached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qitos_mlflow import bridge, tracing
from tests.fakes.recorder import Recorder
from tests.undo import uninstall


@pytest.fixture
def installed() -> Iterator[None]:
    """The bridge, with no processor attached."""
    bridge.install()
    yield
    uninstall()


@pytest.fixture
def recorder(installed: None) -> Iterator[Recorder]:
    """The bridge, with a recorder attached; everything it heard must have ended well."""
    recorder = Recorder()
    tracing.add_trace_processor(recorder)
    yield recorder
    tracing.remove_trace_processor(recorder)
    recorder.check()
