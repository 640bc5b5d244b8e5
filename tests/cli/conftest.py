"""How the tests of the command line start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

import qitos_mlflow
from tests.integration.logged import LoggedRun, runs_of
from tests.integration.made_store import make_store

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def environment(**environ: str) -> dict[str, str]:
    """The environment of every process started here: the package is importable in it."""
    package = str(Path(qitos_mlflow.__file__).parents[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), package]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environ}


def run_python(*args: str, cwd: Path | None = None, **environ: str) -> Done:
    """Run `python args…`, with nothing on its stdin."""
    return subprocess.run(
        [sys.executable, *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env=environment(**environ),
        check=False,
    )


def run_cli(*args: str, cwd: Path | None = None, **environ: str) -> Done:
    """Run `qitos-mlflow args…`."""
    return run_python("-m", "qitos_mlflow.cli", *args, cwd=cwd, **environ)


def runs_in(store: str, experiment_name: str) -> list[LoggedRun]:
    """The runs that a store or server has; creates the store if it is missing."""
    return runs_of(MlflowClient(tracking_uri=store), experiment_name)


@pytest.fixture
def python() -> Run:
    """Runs `python args…` in the test's directory."""
    return run_python


@pytest.fixture
def cli() -> Run:
    """Runs `qitos-mlflow args…` in the test's directory."""
    return run_cli


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local store shared by the tests of a module, each of which has an experiment of its own."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_store(database)
    return f"sqlite:///{database}"
