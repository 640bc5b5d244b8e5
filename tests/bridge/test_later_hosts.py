"""Capabilities that QitOS 0.3.0 lacks, on a stand-in host with tracing of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.hosts import BUILTIN_TRACING, ROOT


def test_later_hosts(tmp_path: Path) -> None:
    """Hand-offs, parallel tools, delegates, fan-out, sessions, cancel and interrupt are traced."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(Path(__file__).with_name("standin_host.py"))),
            *("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "setup.cfg")),
            *("--rootdir", str(ROOT), "--basetemp", str(tmp_path / "inner")),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BUILTIN_TRACING), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
