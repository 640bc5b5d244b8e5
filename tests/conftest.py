"""Fixtures for every test: nothing swallowed, nothing leaked, nothing of the user's touched."""

from __future__ import annotations

import os

# Before anything imports mlflow: no telemetry, and no settings of the person running the tests.
for _name in list(os.environ):
    if _name.startswith(("MLFLOW_", "QITOS_")):
        del os.environ[_name]
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_MODEL_CATALOG_URI"] = ""  # No look at the internet for model prices.
os.environ["QITOS_TRACE_PLUGINS"] = "none"

import itertools
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from qitos_mlflow import _guard

settings.register_profile("any machine", settings.default, deadline=None)  # Cores are shared.
settings.load_profile("any machine")

if TYPE_CHECKING:
    from tests.integration.server import MlflowServer

_numbers = itertools.count()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Spare each test 40 ms.

    Beside pytest-xdist, pytest-rerunfailures asks its first process over TCP how often a test has
    failed, in two small packets: the second one waits until the first one is acknowledged.
    """
    database = getattr(config, "failures_db", None)
    if hasattr(database, "sock"):
        database.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@pytest.fixture(autouse=True)
def _nothing_swallowed(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, BaseException]]]:
    """Fail the test if the package caught an exception it did not expect.

    A test about such failures takes the fixture `swallowed` and clears the list.
    """
    seen: list[tuple[str, BaseException]] = []
    _guard.watchers.append(watcher := lambda where, error: seen.append((where, error)))
    yield seen
    _guard.watchers.remove(watcher)
    assert not seen, f"swallowed: {seen}"


@pytest.fixture
def swallowed(
    _nothing_swallowed: list[tuple[str, BaseException]],
) -> list[tuple[str, BaseException]]:
    """What the package caught so far; a test that expects something clears it."""
    return _nothing_swallowed


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory of the test's own.

    In place of pytest's, which costs 4 ms more for each of 5,000 tests: it also keeps a symbolic
    link to the newest one. pytest deletes it with all others of the session.
    """
    name = re.sub(r"\W", "_", request.node.name)[:30]
    path = tmp_path_factory.getbasetemp() / f"{name}{next(_numbers)}" / "qitos-mlflow"
    path.mkdir(parents=True, mode=0o700)
    return path


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own working and state directory; `spool` in it is this user's own spool."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QITOS_MLFLOW_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path.parent))  # Whose `qitos-mlflow` it is.


@pytest.fixture
def made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sqlite store that this process makes is a copy of one, without its 2 s of migrations."""
    from tests.integration.made_store import copy_tables

    monkeypatch.setattr("mlflow.store.db.utils._initialize_tables", copy_tables)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server for all tests of this process; a start takes 6 s.

    With pytest-xdist each worker has its own. Each test logs to an experiment of its own.
    """
    from tests.integration.server import MlflowServer

    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"))
    server.start()
    yield server
    server.kill()
