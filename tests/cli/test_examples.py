"""Each example runs offline, as it is, and does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, runs_in
from tests.integration.made_store import make_store

EXAMPLES = Path(__file__).parents[2] / "examples"
SLOW = {"QITOS_MLFLOW_FLUSH_TIMEOUT_S": "90", "QITOS_MLFLOW_EXIT_TIMEOUT_S": "90"}
"""The machine that tests run on may be busy with others."""

EXPECTED = {
    "by_hand.py": (["answer: 42", "delivered: True"], ["by-hand"]),
    "autolog_example.py": (
        ["Good day, Ada.", "Good day, Grace.", "Good day, nobody who is logged."],
        ["greeter", "greeter"],
    ),
    "concurrent_agents.py": (
        [" ".join(str(number**2) for number in range(16)), "delivered: True"],
        [f"squarer-{number:02}" for number in range(16)],
    ),
    "custom_plugin.py": (["runner: search_almanac took"], []),
    "more_in_mlflow.py": (["delivered: True"], ["runner"]),
}


def test_no_example_is_left_out() -> None:
    """Every file in examples/ is run by the test below."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(tmp_path: Path, python: Run, name: str) -> None:
    """The example prints what it promises, and its runs are in MLflow, all finished."""
    lines, runs = EXPECTED[name]
    store = f"sqlite:///{tmp_path}/examples.db"
    make_store(tmp_path / "examples.db")
    got = python(str(EXAMPLES / name), MLFLOW_TRACKING_URI=store, QITOS_TRACE_PLUGINS="all", **SLOW)
    assert got.returncode == 0, got.stderr
    printed = got.stdout.splitlines()
    assert len(printed) == len(lines)
    assert all(seen.startswith(line) for seen, line in zip(printed, lines, strict=True))
    logged = runs_in(store, "qitos-examples")
    assert sorted(run.name for run in logged) == runs
    assert {run.status for run in logged} <= {"FINISHED"}
