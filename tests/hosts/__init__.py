"""Runs a script in a process of its own, with a host of the test's choice in front."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import qitos_mlflow

ROOT = Path(__file__).parents[2]
BUILTIN_TRACING = Path(__file__).parent / "builtin_tracing"


def run_on(host: Path | None, script: str, *options: str, **environ: str) -> str:
    """What `script` prints on `host` (None: whatever QitOS is installed); it must succeed."""
    path = [str(ROOT)] if host is None else [str(host), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_without_host(directory: Path, script: str) -> str:
    """What `script` prints where our package is importable and QitOS is not, nor anything else.

    Args:
        directory: an empty one, for a link to the package.
        script: Python; it must succeed.
    """
    (directory / "qitos_mlflow").symlink_to(Path(qitos_mlflow.__file__).parent)
    path = f"import sys; sys.path.insert(0, {str(directory)!r})\n"
    return run_on(None, path + textwrap.dedent(script), "-S", PYTHONPATH="")
