"""The test suite of QitOS 0.3.0 itself, run plain and with the bridge: nothing may change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import qitos_mlflow

HOST = "qitos==0.3.0"
PLUGIN_DIRECTORY = Path(__file__).parent / "upstream"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's source distribution, unpacked; its wheel has no tests."""
    directory = tmp_path_factory.mktemp("upstream")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-binary", "qitos", "--dest", str(directory)]
    done = subprocess.run([*pip, *options, HOST], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(directory, filter="data")
    (unpacked,) = (path for path in directory.iterdir() if path.is_dir())
    return unpacked


def watched(suite: Path, directory: Path, on: bool) -> dict[str, Any]:
    """What `bridge_watch` saw of the whole suite."""
    report = directory / f"{on}.json"
    path = [str(PLUGIN_DIRECTORY), str(Path(qitos_mlflow.__file__).parents[1])]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "tests", "-q", "-p", "bridge_watch"),
            *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
            *("--basetemp", str(directory / str(on))),
        ],
        cwd=suite,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "BRIDGE_WATCH_REPORT": str(report),
            "BRIDGE_WATCH_ON": "1" if on else "0",
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.timeout(300)
def test_not_one_outcome_of_the_hosts_own_tests_changes(suite: Path, tmp_path: Path) -> None:
    """Every test of the host ends as it does without the bridge, and every span is closed."""
    plain = watched(suite, tmp_path, on=False)
    bridged = watched(suite, tmp_path, on=True)
    assert bridged["outcomes"] == plain["outcomes"]
    passed = [name for name, phases in plain["outcomes"].items() if "call passed" in phases]
    assert len(passed) > 100
    assert plain["traces"] == 0
    assert bridged["traces"] > 20
    assert bridged["spans"] > 100
    assert (bridged["open"], bridged["wrong"], bridged["swallowed"]) == ([], [], [])
