"""The first runs in an empty directory: the local store is made, whatever ends the processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from qitos_mlflow.cli import main
from tests.integration.logged import AGENT, ROOT, runs_of
from tests.integration.made_store import make_store

RUN = 'agent.run("sum", render=False, trace=False)\n'

MLFLOW = """
import mlflow
while not (BEGINS): time.sleep(0.01)
found = mlflow.MlflowClient(f"sqlite:///{os.getcwd()}/mlflow.db").search_experiments()
print(len(found), "experiment")
"""

MIGRATIONS = """
# A shell that starts the tests in the background has them ignore SIGINT, and so this process.
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import os, sys, time
from alembic.runtime.migration import HeadMaintainer

update_to_step = HeadMaintainer.update_to_step

def noted(self, step, done=[]):
    update_to_step(self, step)
    done.append(step)
    with open("migrations", "a") as file:
        print(step.to_revisions_no_deps[0], file=file, flush=True)
    if len(done) == KILL_AFTER:
        os.kill(os.getpid(), signal.SIGKILL)
    while len(done) == HALT_AFTER and not os.path.exists("go"):
        time.sleep(0.01)
    if not os.path.exists("hurry"):
        time.sleep(PAUSE_S)

HeadMaintainer.update_to_step = noted
"""
"""A slow machine: each of MLflow's migrations is noted in a file, and takes `PAUSE_S` more.

Until there is a file `hurry`; after `HALT_AFTER` of them it waits for a file `go`.
"""

EXIT_S = 2.0
"""The exit deadline here: the migrations alone take twice as long on the slow machine."""
PATIENT = {"QITOS_MLFLOW_EXIT_TIMEOUT_S": "100", "QITOS_MLFLOW_LOCAL_EXIT_TIMEOUT_S": "150"}
"""For a process that is halted: it makes no progress for as long as the test needs."""

WAITS = "for the local store, while it makes progress"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ``QITOS_TRACE_PLUGINS=mlflow python script.py`` in the test's directory."""
    started = []

    def begin(
        script: str = AGENT + RUN,
        *,
        pause_s: float = 0.0,
        kill_after: int = 0,
        halt_after: int = 0,
        **environ: str,
    ) -> subprocess.Popen[str]:
        slow = MIGRATIONS.replace("PAUSE_S", f"{pause_s}").replace("KILL_AFTER", f"{kill_after}")
        slow = slow.replace("HALT_AFTER", f"{halt_after}")
        path = Path(f"script{len(started)}.py")
        path.write_text(slow + script)
        process = subprocess.Popen(
            [sys.executable, path],
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
    return Path("migrations").read_text().split() if Path("migrations").exists() else []


def names() -> list[str]:
    """The runs in the default store of this directory."""
    return [
        run.status for run in runs_of(MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db"), "qitos")
    ]


@pytest.mark.timeout(400)
def test_two_first_starts_on_a_slow_machine_make_one_store(start: Start, tmp_path: Path) -> None:
    """One makes the store, the other waits for that; both say so in one line, and deliver."""
    processes = [start(pause_s=0.04), start(pause_s=0.04)]
    for process in processes:
        said = process.communicate(timeout=170)[1]
        [line] = [line for line in said.splitlines() if line.startswith("qitos-mlflow: ")]
        assert WAITS in line
        assert "Ctrl-C" in line
    made = migrations()
    assert len(made) == len(set(made))
    assert names() == ["FINISHED"] * 2
    assert not list(tmp_path.glob(".mlflow-new-*"))


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform == "win32", reason="kills processes")
def test_a_creation_that_is_killed_or_interrupted_goes_on(start: Start, tmp_path: Path) -> None:
    """Each process goes on where the one before it ended, by SIGKILL or by Ctrl-C.

    After Ctrl-C the last line says what is left, and the status is that of Ctrl-C.
    """
    assert start(kill_after=25).wait(170) == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    interrupted = start(pause_s=0.2)
    assert interrupted.stderr is not None
    assert any(WAITS in line for line in interrupted.stderr)
    interrupted.send_signal(signal.SIGINT)
    [line] = ours(interrupted)
    assert "kept but not delivered yet; deliver with: qitos-mlflow sync" in line
    assert interrupted.returncode == -signal.SIGINT
    assert not (tmp_path / "mlflow.db").exists()
    assert ours(start()) == []
    # The last one of the process that was killed was not committed, so it was made twice; so was
    # perhaps that which was under way at Ctrl-C.
    made = migrations()
    assert 1 <= len(made) - len(set(made)) <= 2
    # The runs of the other two are delivered as those of any dead processes.
    done = CliRunner().invoke(main, ["sync"])
    assert done.exit_code == 0, done.output
    assert names() == ["FINISHED"] * 3
    assert not list(tmp_path.glob(".mlflow-new-*"))


LOOKED = """
from qitos_mlflow.mlflow_plugin.server import sqlite_store
is_finished = sqlite_store._is_finished
def looked(target):
    open("go", "w").close()
    return is_finished(target)
sqlite_store._is_finished = looked
"""


@pytest.mark.timeout(400)
def test_a_store_that_mlflow_creates_at_the_same_time_is_waited_for(start: Start) -> None:
    """MLflow makes its tables in place; what it has made so far is no store to open."""
    mlflows = start(MLFLOW.replace("BEGINS", "True"), halt_after=10)
    begins = 'while not os.path.exists("migrations"): time.sleep(0.01)\n'
    agent = start(LOOKED + AGENT + begins + RUN)
    assert ours(agent) == []
    assert mlflows.communicate(timeout=170)[0] == "1 experiment\n"
    assert names() == ["FINISHED"]


@pytest.mark.timeout(400)
def test_mlflow_that_begins_meanwhile_and_is_faster_wins(start: Start, tmp_path: Path) -> None:
    """Our half is thrown away once MLflow's is finished."""
    agent = start(halt_after=3, **PATIENT)
    begins = 'os.path.exists("migrations") and len(open("migrations").readlines()) == 3'
    mlflows = start(MLFLOW.replace("BEGINS", begins))
    said, errors = mlflows.communicate(timeout=170)
    assert said == "1 experiment\n", errors
    assert agent.poll() is None
    Path("go").touch()
    assert ours(agent) == []
    assert names() == ["FINISHED"]
    assert not list(tmp_path.glob(".mlflow-new-*"))


@pytest.mark.timeout(400)
def test_mlflow_of_the_same_process_creates_it(start: Start) -> None:
    """A thread of the program is creating the store as the agent begins."""
    script = f"""
import threading
def first():
{textwrap.indent(MLFLOW.replace("BEGINS", "True"), "    ")}
thread = threading.Thread(target=first)
thread.start()
while not os.path.exists("migrations"):
    time.sleep(0.02)
{LOOKED}{AGENT}{RUN}
thread.join()
"""
    process = start(script, halt_after=10)
    assert ours(process) == []
    assert names() == ["FINISHED"]
    made = migrations()
    assert len(made) == len(set(made))


FORKS = """
done = []
while len(done) < 5:
    seen = len(open("migrations").readlines()) if os.path.exists("migrations") else 0
    if seen > len(done):
        child = os.fork()
        if child == 0:
            HeadMaintainer.update_to_step = update_to_step
            if len(done) == 0:
                agent.run("sum", render=False, trace=False)
                sys.exit(0)
            import mlflow
            other = mlflow.MlflowClient(f"sqlite:///{os.getpid()}.db") if len(done) == 4 else None
            os._exit(other is not None and len(other.search_experiments()) != 1)
        done.append((child, os.path.exists("mlflow.db")))
    time.sleep(0.005)  # The sending thread imports mlflow meanwhile.
open("hurry", "w").close()
print([os.waitpid(child, 0)[1] or finished for child, finished in done], flush=True)
"""


@pytest.mark.timeout(400)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_does_not_wait_for_the_store(start: Start) -> None:
    """Forks happen between two migrations; the children can create stores, and log to this one."""
    process = start(AGENT + RUN + FORKS, pause_s=0.08)
    said, errors = process.communicate(timeout=170)
    assert said == "[False, False, False, False, False]\n"
    assert "kept but not delivered" not in errors
    assert names() == ["FINISHED"] * 2
    made = migrations()
    assert len(made) == len(set(made))


SLOW_WRITES = """
import threading
from sqlalchemy import event
from sqlalchemy.engine import Engine
writes = threading.Event()

@event.listens_for(Engine, "after_cursor_execute")
def slow(connection, cursor, statement, *_):
    if statement.startswith("INSERT INTO runs"):
        writes.set()
        time.sleep(0.5)
"""

FORK_AMID_A_WRITE = """
writes.wait(60)
child = os.fork()
if child == 0:
    agent.run("sum", render=False, trace=False)
    sys.exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.timeout(400)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_that_is_forked_amid_a_write_logs_too(start: Start) -> None:
    """SQLite in the child must not find its parent's lock among its own."""
    make_store(Path("mlflow.db"))
    process = start(SLOW_WRITES + AGENT + RUN + FORK_AMID_A_WRITE)
    assert ours(process) == []
    assert names() == ["FINISHED"] * 2


@pytest.mark.timeout(400)
def test_a_store_that_is_locked_for_ever_ends_the_wait(start: Start) -> None:
    """Without progress the time of a local store is that of a server, and nothing is lost."""
    make_store(Path("mlflow.db"))
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        os.utime(
            "mlflow.db", (1, 1)
        )  # Not what another process may be creating: it waits for that.
        # If it waited to the end of its time, the test would not see it end.
        said = ours(start(QITOS_MLFLOW_LOCAL_EXIT_TIMEOUT_S="3600"))
    assert "kept but not delivered yet" in said[-1]


@pytest.mark.timeout(400)
def test_the_time_of_a_local_store_is_a_setting(start: Start) -> None:
    """With 0 a local store has the exit deadline of a server."""
    deadlines = {"EXIT_TIMEOUT_S": "1", "LOCAL_EXIT_TIMEOUT_S": "0"}
    [line] = ours(start(**{f"QITOS_MLFLOW_{name}": text for name, text in deadlines.items()}))
    assert "kept but not delivered yet" in line
    assert not Path("mlflow.db").exists()
