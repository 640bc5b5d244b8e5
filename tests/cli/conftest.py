"""How the tests of the command line start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qitos_mlflow

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python() -> Run:
    """Runs `python args…` in the test's directory, the package importable."""

    def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        package = str(Path(qitos_mlflow.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *args],
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environ},
            check=False,
        )

    return run


@pytest.fixture
def cli(python: Run) -> Run:
    """Runs `qitos-mlflow args…` in the test's directory."""
    return lambda *args, **environ: python("-m", "qitos_mlflow.cli", *args, **environ)
