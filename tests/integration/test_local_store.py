"""The first runs in an empty directory: the local store is made, whatever ends the processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.integration.logged import AGENT, ROOT, runs_of

RUN = 'agent.run("sum", render=False, trace=False)\n'

MIGRATIONS = """
# A shell that starts the tests in the background has them ignore SIGINT, and so this process.
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import os, sys, time
from alembic.runtime.migration import HeadMaintainer

def noted(self, step, update=HeadMaintainer.update_to_step, done=[]):
    update(self, step)
    done.append(step)
    with open("migrations", "a") as file:
        print(step.to_revisions_no_deps[0], file=file, flush=True)
    if len(done) == KILL_AFTER:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PAUSE_S)

HeadMaintainer.update_to_step = noted
"""
"""A slow machine: each of MLflow's migrations is noted in a file, and takes `PAUSE_S` more."""

EXIT_S = 5.0
"""The exit deadline here: the migrations alone take twice as long on the slow machine."""

WAITS = "for the local store, while it makes progress"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ``QITOS_TRACE_PLUGINS=mlflow python script.py`` in the test's directory."""
    started = []

    def begin(pause_s: float = 0.15, kill_after: int = 0, **environ: str) -> subprocess.Popen[str]:
        slow = MIGRATIONS.replace("PAUSE_S", f"{pause_s}").replace("KILL_AFTER", f"{kill_after}")
        Path("script.py").write_text(slow + AGENT + RUN)
        process = subprocess.Popen(
            [sys.executable, "script.py"],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "QITOS_TRACE_PLUGINS": "mlflow",
                "QITOS_MLFLOW_EXIT_TIMEOUT_S": f"{EXIT_S}",
                **environ,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ours(process: subprocess.Popen[str]) -> list[str]:
    """What we wrote on stderr once the process has ended, but for the line about the wait."""
    said = process.communicate(timeout=170)[1]
    return [
        line
        for line in said.splitlines()
        if line.startswith("qitos-mlflow: ") and WAITS not in line
    ]


def migrations() -> list[str]:
    """The revisions that were made here, by whatever process."""
    return Path("migrations").read_text().split()


def names() -> list[str]:
    """The runs in the default store of this directory."""
    return [
        run.status for run in runs_of(MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db"), "qitos")
    ]


@pytest.mark.timeout(400)
def test_a_slow_machine_has_all_of_three_starts(start: Start, tmp_path: Path) -> None:
    """The first start makes the store, says in one line what it waits for, and delivers."""
    said = start().communicate(timeout=170)[1]
    [line] = [line for line in said.splitlines() if line.startswith("qitos-mlflow: ")]
    assert WAITS in line
    assert "Ctrl-C" in line
    for _ in range(2):
        assert ours(start()) == []
    assert names() == ["FINISHED"] * 3
    assert not list(tmp_path.glob(".mlflow-new-*"))


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform == "win32", reason="kills processes")
def test_a_creation_that_is_killed_goes_on_at_the_next_start(start: Start, tmp_path: Path) -> None:
    """Three kills amid the migrations: each process goes on where the last one ended."""
    for _ in range(2):
        assert start(kill_after=25, pause_s=0).wait(170) == -signal.SIGKILL
        assert not (tmp_path / "mlflow.db").exists()
    assert ours(start(pause_s=0)) == []
    # The last one of a process that was killed was not committed, so it was made twice.
    made = migrations()
    assert len(made) == len(set(made)) + 2
    # The runs of the killed processes are delivered as those of any dead process.
    sync = [sys.executable, "-m", "qitos_mlflow.cli", "sync"]
    subprocess.run(sync, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=100)
    assert sorted(names()) == ["FINISHED"] * 3
    assert not list(tmp_path.glob(".mlflow-new-*"))


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_the_wait_for_the_store_and_keeps_what_is_made(start: Start) -> None:
    """The last line says what is left, the status is that of Ctrl-C, the next start goes on."""
    process = start(pause_s=0.2)
    assert process.stderr is not None
    assert WAITS in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    [line] = ours(process)
    assert "kept but not delivered yet; deliver with: qitos-mlflow sync" in line
    assert process.returncode == -signal.SIGINT
    ours(start(pause_s=0))
    made = migrations()
    assert len(made) <= len(set(made)) + 1  # The one that was under way.
    assert "FINISHED" in names()


@pytest.mark.timeout(400)
def test_two_first_starts_at_once_make_one_store(start: Start) -> None:
    """The second process waits for the first one, and both deliver."""
    processes = [start(), start()]
    for process in processes:
        assert ours(process) == []
    made = migrations()
    assert len(made) == len(set(made))
    assert names() == ["FINISHED"] * 2


@pytest.mark.timeout(400)
def test_a_store_that_is_locked_for_ever_ends_the_wait(start: Start) -> None:
    """Without progress the time of a local store is that of a server, and nothing is lost."""
    assert ours(start(pause_s=0)) == []
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        # If it waited to the end of its time, the test would not see it end.
        said = ours(start(pause_s=0, QITOS_MLFLOW_LOCAL_EXIT_TIMEOUT_S="3600"))
    assert "kept but not delivered yet" in said[-1]


@pytest.mark.timeout(400)
def test_the_time_of_a_local_store_is_a_setting(start: Start) -> None:
    """With 0 a local store has the exit deadline of a server."""
    [line] = ours(start(pause_s=0.5, QITOS_MLFLOW_LOCAL_EXIT_TIMEOUT_S="0"))
    assert "kept but not delivered yet" in line
    assert not Path("mlflow.db").exists()
