"""For the tests of the contract: a processor at work, scripts in processes, runs read back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from qitos_mlflow import MlflowTraceProcessor, tracing
from tests.undo import stop_serving, uninstall

ROOT = Path(__file__).parents[2]
SCRIPT_TIMEOUT_S = 100.0
LONG_SCRIPT_TIMEOUT_S = 250.0
"""Of a script that does one after another what many tests read; their own limit is 300 s."""


@contextlib.contextmanager
def logged(uri: str | None, **options: Any) -> Iterator[MlflowTraceProcessor]:
    """A processor registered by hand, and undone at the end."""
    processor = MlflowTraceProcessor(tracking_uri=uri, **options)
    tracing.add_trace_processor(processor)
    try:
        yield processor
    finally:
        tracing.remove_trace_processor(processor)
        processor.shutdown()
        uninstall()
        stop_serving()


class LoggedRun:
    """A run as MLflow has it."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.name: str = run.info.run_name
        self.status: str = run.info.status
        self.metrics: dict[str, float] = run.data.metrics
        self.params: dict[str, str] = run.data.params
        self.tags: dict[str, str] = run.data.tags

    def history(self, key: str) -> list[Any]:
        """Every point of a metric, in the order of their steps."""
        points = self._client.get_metric_history(self.id, key)
        return sorted(points, key=lambda point: (point.step, point.timestamp))

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric."""
        return [(point.step, point.value) for point in self.history(key)]


def runs_of(client: MlflowClient, experiment_name: str) -> list[LoggedRun]:
    """The runs of an experiment, the first one first; none when there is no such experiment."""
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return []
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [LoggedRun(client, run) for run in found]


def only_run(client: MlflowClient, experiment_name: str) -> LoggedRun:
    """The one run of an experiment."""
    runs = runs_of(client, experiment_name)
    assert len(runs) == 1, [run.name for run in runs]
    return runs[0]


def found_in(directories: Sequence[Path], text: str) -> list[Path]:
    """The files below these directories that have `text` somewhere in their bytes."""
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


@dataclass(frozen=True)
class Done:
    """A script's process that has ended."""

    returncode: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit code {self.returncode}\n{self.stdout}\n{self.stderr}"


AGENT = """
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer, toolbox

usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
agent = ModelAgent(Model(answer(ADD, usage=usage), answer(FINAL, usage=usage)))
"""
"""A part of scripts: an agent of two steps that calls one tool and uses 30 tokens."""


def run_script(
    *parts: str,
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
    check: bool = True,
    timeout_s: float = SCRIPT_TIMEOUT_S,
    **environ: str | None,
) -> Done:
    """Run a script in a process of its own, in the test's directory.

    As on a user's machine: the start-up file is at work, ``QITOS_TRACE_PLUGINS`` is not set.

    Args:
        parts: the script in pieces; indentation common to a piece is taken away.
        options: the interpreter's.
        arguments: the script's.
        check: it must exit with 0.
        timeout_s: it is killed if it takes longer (seconds).
        environ: variables on top of the test's own; None takes one out.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "QITOS_TRACE_PLUGINS": None,
        "QITOS_MLFLOW_EXIT_TIMEOUT_S": "60",  # These tests are not about slow machines.
        **environ,
    }
    script = Path.cwd() / "script.py"
    script.write_text("\n".join(textwrap.dedent(part) for part in parts), "utf-8")
    done = subprocess.run(
        [sys.executable, *options, script.name, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    outcome = Done(done.returncode, done.stdout, done.stderr)
    assert not check or done.returncode == 0, str(outcome)
    return outcome
