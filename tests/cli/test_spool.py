"""`sync`, `status` and `spool purge` on real spools, of agents that are alive, done and killed."""

from __future__ import annotations

import io
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.filesize import decimal

from qitos_mlflow.cli import main
from qitos_mlflow.delivery.spool.locks import FileLock
from qitos_mlflow.delivery.spool.paths import Paths, new_stem
from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header
from tests.cli.conftest import Done, Run, environment, runs_in
from tests.fakes.sink import make_pipeline
from tests.waiting import eventually

NOWHERE = "http://127.0.0.1:9"
DEADLINE_S = 60.0

AGENT = """\
import sys
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, act, answer
from qitos_mlflow.tracing import add_trace_processor

def ask():
    "Wait for an answer on stdin."
    print("waiting", flush=True)
    return sys.stdin.readline().strip()

experiment, uri = sys.argv[1:]
processor = MlflowTraceProcessor(experiment_name=experiment, tracking_uri=uri, offline=True)
add_trace_processor(processor)
model = ScriptedModel("scripted-small", [act("Ask.", ("ask", {})), answer("Told.", "thanks")])
agent = DeskAgent("asker", model, [ask])
agent.run(task="Ask.", trace=False, render=False)
"""


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """The experiment of this test."""
    return str(request.node.name)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `qitos-mlflow args…` as `cli` does, without the seconds that another process takes.

    Those are for importing mlflow, as all deliveries to a local store do.
    """

    def run(*args: str, **environ: str) -> Done:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "stdin", io.StringIO())
            for name, value in {"COLUMNS": "200", **environ}.items():
                patch.setenv(name, value)
            capsys.readouterr()
            main(args)
        return Done(args, ended.value.code, *capsys.readouterr())

    return run


Agent = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path, store: str, experiment: str) -> Iterator[Callable[..., Agent]]:
    """Starts an offline agent, which is inside its only tool call when this returns."""
    (tmp_path / "agent.py").write_text(AGENT)
    started: list[Agent] = []

    def start_agent(uri: str = store) -> Agent:
        process = subprocess.Popen(
            [sys.executable, "agent.py", experiment, uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        return process

    yield start_agent
    for process in started:
        process.kill()
        process.communicate()


def finish(agent: Agent) -> None:
    """Let the agent go on to its end."""
    agent.communicate("go on\n", timeout=DEADLINE_S)
    assert agent.returncode == 0


def status() -> dict[str, Any]:
    """What `qitos-mlflow status --json` says."""
    done = CliRunner().invoke(main, ["status", "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def write_segment(tmp_path: Path, uri: str, *records: bytes) -> Path:
    """Leave a segment with these records behind, as a process that is gone."""
    pipeline = make_pipeline(tmp_path / "spool", None, header=segment_header(Destination.of(uri)))
    for record in records:
        assert pipeline.offer(record, keep=True)
    pipeline.close(DEADLINE_S)
    [(_, part)] = pipeline.paths.parts()
    return part


def trace(experiment: str, **end: Any) -> tuple[bytes, bytes]:
    """The two records of a trace without spans."""
    start = {
        "kind": "trace_start",
        "trace_id": str(uuid.uuid4()),
        "name": "bare",
        "group_id": None,
        "metadata": {},
        "time_ns": time.time_ns(),
        "parent_run_id": None,
        "content": True,
        "settings": {"experiment_name": experiment},
    }
    rest = {"kind": "trace_end", "metadata": {}, "status": "FINISHED", "error": None}
    rest |= {"time_ns": time.time_ns(), "recorded": 0, "dropped": {}}
    return json.dumps(start).encode(), json.dumps({**start, **rest, **end}).encode()


def test_what_an_offline_agent_left_is_shown_and_delivered(
    start: Callable[..., Agent], cli: Run, store: str, experiment: str
) -> None:
    """Status names what waits and where it is to go; sync brings it there; nothing is left."""
    agent = start()
    finish(agent)
    found = status()
    (segment,) = found["segments"]
    assert (segment["pid"], segment["owner"], segment["offline"]) == (agent.pid, "dead", True)
    assert (segment["destination"], segment["experiment"]) == (store, experiment)
    assert segment["waiting"] == found["waiting"] > 5
    done = cli("sync")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{found['waiting']} records delivered, 1 segment finished"
    (run,) = runs_in(store, experiment)
    assert (run.name, run.status, run.tags["stop_reason"]) == ("asker", "FINISHED", "final")
    assert run.metrics["total_steps"] == 2
    found = status()
    assert (found["segments"], found["waiting"]) == ([], 0)
    assert cli("sync").stdout.strip() == "0 records delivered, 0 segments finished"


def test_a_run_whose_process_was_killed_is_closed(
    start: Callable[..., Agent], call: Run, store: str, experiment: str
) -> None:
    """After kill -9 in mid-run, sync delivers what there is and ends the run as KILLED."""
    agent = start()
    eventually(lambda: status()["waiting"] > 0)
    agent.kill()
    agent.communicate()
    assert call("sync").returncode == 0
    (run,) = runs_in(store, experiment)
    assert (run.name, run.status) == ("asker", "KILLED")
    assert status()["segments"] == []


def test_sync_beside_a_living_agent_does_no_harm(
    start: Callable[..., Agent], call: Run, store: str, experiment: str
) -> None:
    """A living offline agent is delivered so far, goes on undisturbed, and ends as one run."""
    agent = start()
    eventually(lambda: status()["waiting"] > 0)
    assert status()["segments"][0]["owner"] == "alive"
    assert call("sync").returncode == 0
    (run,) = runs_in(store, experiment)
    assert run.status == "RUNNING"
    finish(agent)
    assert call("sync").returncode == 0
    (run,) = runs_in(store, experiment)
    assert (run.status, run.metrics["total_steps"]) == ("FINISHED", 2)


def test_several_syncs_at_once_do_no_harm(
    start: Callable[..., Agent], store: str, experiment: str
) -> None:
    """Three syncs at once end well, and each run is there once."""
    for agent in [start(), start()]:
        finish(agent)
    at_once = [
        subprocess.Popen(
            [sys.executable, "-m", "qitos_mlflow.cli", "sync"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for _ in range(3)
    ]
    for process in at_once:
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
    eventually(lambda: status()["segments"] == [])
    ended = [(run.status, run.metrics["total_steps"]) for run in runs_in(store, experiment)]
    assert ended == [("FINISHED", 2)] * 2


def test_a_server_that_is_away_is_named_and_another_one_may_be_given(
    tmp_path: Path, call: Run, store: str, experiment: str
) -> None:
    """Sync gives up on a dead server, says so and keeps all; --tracking-uri delivers elsewhere."""
    write_segment(tmp_path, NOWHERE, *trace(experiment))
    done = call("sync", "--patience", "0")
    assert done.returncode == 1
    assert f"qitos-mlflow: {NOWHERE} does not work: " in done.stderr
    assert (
        "qitos-mlflow: 1 segment not delivered; run it again later: qitos-mlflow sync"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    (server,) = (s for s in status()["servers"] if s["uri"] == NOWHERE)
    assert server["reachable"] is False
    assert call("sync", "--tracking-uri", store).returncode == 0
    assert [(run.name, run.status) for run in runs_in(store, experiment)] == [("bare", "FINISHED")]


@pytest.mark.parametrize("left", [(".ack", ".own", ".ship"), (".ack",), (".ack.tmp", ".own")])
def test_sync_ends_a_deletion_that_was_cut_short(tmp_path: Path, left: tuple[str, ...]) -> None:
    """What is left of a delivered segment goes; not what is kept aside, nor of a living process."""
    spool = tmp_path / "spool"
    spool.mkdir()
    dead, alive = Paths(spool, new_stem()), Paths(spool, new_stem())
    for suffix in (*left, ".dead"):
        for paths in (dead, alive):
            (spool / f"{paths.stem}{suffix}").touch()
    owner = FileLock(alive.own)
    assert owner.acquire()
    try:
        done = CliRunner().invoke(main, ["sync"])
        assert (done.exit_code, done.output) == (0, "0 records delivered, 0 segments finished\n")
        kept = {path.name for path in spool.iterdir()}
        assert {name for name in kept if name.startswith(dead.stem)} == {dead.dead.name}
        assert kept >= {alive.own.name, *(f"{alive.stem}{suffix}" for suffix in left)}
    finally:
        owner.release()


def test_sync_delivers_where_warnings_are_errors(tmp_path: Path, experiment: str, cli: Run) -> None:
    """MLflow and its database library give some; the user's variable is for the user's programs."""
    store = f"sqlite:///{tmp_path}/new.db"
    write_segment(tmp_path, store, *trace(experiment))
    done = cli("sync", PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    assert [run.status for run in runs_in(store, experiment)] == ["FINISHED"]


def test_sync_in_a_terminal_without_utf8(
    tmp_path: Path, cli: Run, store: str, experiment: str
) -> None:
    """How far it is, is shown in ASCII."""
    write_segment(tmp_path, store, *trace(experiment))
    done = cli("sync", FORCE_COLOR="1", TERM="xterm", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "2 records delivered, 1 segment finished" in done.stdout


@pytest.mark.parametrize("patience", ["soon", "-1"])
def test_patience_is_a_number_of_seconds(call: Run, patience: str) -> None:
    """Anything else is refused."""
    done = call("sync", "--patience", patience)
    assert done.returncode == 2
    assert "--patience" in done.stderr


@pytest.mark.parametrize("name", ["spool", "elsewhere", "with a blank", "it's"])
def test_the_command_that_status_names_delivers_what_it_shows(
    tmp_path: Path, call: Run, store: str, experiment: str, name: str
) -> None:
    """Pasted into a shell, it delivers the records of the directories that status was given."""
    (tmp_path / name).mkdir(exist_ok=True)
    part = write_segment(tmp_path, store, *trace(experiment))
    for file in part.parent.glob(f"{part.name.split('.')[0]}*"):
        file.rename(tmp_path / name / file.name)
    shown = call("status", str(tmp_path / name)).stdout
    size = sum(file.stat().st_size for file in (tmp_path / name).glob("*.seg"))
    assert f"2 records in 1 segment ({decimal(size)}) wait in {tmp_path / name}" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("Deliver ")]
    program, *args = shlex.split(line.partition(": ")[2])
    assert program == "qitos-mlflow"
    trust = [] if name == "spool" else ["--trust"]  # Another directory may be another user's.
    assert args == ["sync", *trust, str(tmp_path / name)]
    assert call(*args).stdout.startswith("2 records delivered")


def test_losses_and_dead_letters_are_counted_by_reason(
    tmp_path: Path, call: Run, store: str, experiment: str
) -> None:
    """Dropped records and records that the server refuses for good are counted by reason."""
    dropped = {"queue_full": 3, "spool_full": 1}
    write_segment(tmp_path, store, *trace(experiment, dropped=dropped, recorded=4), b"no record")
    assert status()["lost"] == dropped
    assert "3 lost: queue_full" in call("status").stdout
    done = call("sync")
    assert done.returncode == 0
    assert "1 record refused by the server or damaged" in done.stdout
    (reason,) = status()["dead_letters"]
    assert reason.startswith("not a record")
    assert f"1 refused, put off or damaged: {reason}" in call("status").stdout


def test_status_changes_nothing(tmp_path: Path, call: Run, store: str, experiment: str) -> None:
    """Neither a file of the spool, damaged ones included, nor when it was changed."""
    part = write_segment(tmp_path, store, *trace(experiment), b"no record")
    part.write_bytes(part.read_bytes() + b"1r torn")
    stem = part.name.split(".")[0]
    for name, content in ((".ack", b"damaged"), (".dead", b"{}\n"), (".lost", b"damaged")):
        part.with_name(stem + name).write_bytes(content)

    def content() -> dict[str, tuple[bytes, int]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in part.parent.iterdir()}

    before = content()
    assert call("status").returncode == 0
    assert content() == before


def test_losses_of_a_dead_process_are_shown(
    tmp_path: Path, call: Run, store: str, experiment: str
) -> None:
    """Losses outlive the segment they are of, each counted once, until they are purged."""
    part = write_segment(tmp_path, store, *trace(experiment, dropped={"disk_full": 2}, recorded=2))
    lost = {"disk_full": 2, "closed": 1}
    part.with_name(part.name.split(".")[0] + ".lost").write_text(json.dumps(lost))
    assert status()["lost"] == lost
    assert call("sync").returncode == 0
    assert status()["lost"] == lost
    assert call("spool", "purge", "--yes").returncode == 0
    assert status()["segments"] == []
    assert list(part.parent.iterdir()) == []


def test_a_segment_with_a_damaged_header_goes_where_the_option_says(
    tmp_path: Path, call: Run, store: str, experiment: str
) -> None:
    """Without a header sync asks for the destination; given one, it delivers."""
    part = write_segment(tmp_path, store, *trace(experiment))
    part.write_bytes(part.read_bytes().replace(b"tracking_uri", b"Eracking_uri"))
    assert status()["segments"][0]["destination"] == "unknown"
    done = call("sync")
    assert done.returncode == 1
    assert f"qitos-mlflow sync --tracking-uri URI {part}" in done.stderr
    done = call(
        *("sync", "--tracking-uri", store, str(part)), QITOS_MLFLOW_EXPERIMENT_NAME=experiment
    )
    assert done.returncode == 0, done.stderr
    assert [run.status for run in runs_in(store, experiment)] == ["FINISHED"]


def test_follow_delivers_what_comes_until_a_signal_ends_it(
    start: Callable[..., Agent], store: str, experiment: str
) -> None:
    """As a sidecar, sync delivers agents that start later; SIGTERM ends it with exit code 0."""
    sidecar = subprocess.Popen(
        [sys.executable, "-m", "qitos_mlflow.cli", "sync", "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        finish(start())
        eventually(lambda: [run.status for run in runs_in(store, experiment)] == ["FINISHED"])
        sidecar.send_signal(signal.SIGTERM)
        output, errors = sidecar.communicate(timeout=DEADLINE_S)
    finally:
        sidecar.kill()
    assert sidecar.returncode == 0, errors
    assert output.endswith("records delivered\n")


def test_purge_asks_and_spares_the_living(
    tmp_path: Path, start: Callable[..., Agent], call: Run, store: str, experiment: str
) -> None:
    """Purge deletes nothing unasked, and nothing of a process that lives."""
    part = write_segment(tmp_path, store, *trace(experiment))
    start()
    eventually(lambda: len(status()["segments"]) == 2)
    done = call("spool", "purge")  # Its stdin is at its end.
    assert done.returncode == 1
    assert "1 segment with 2 records not delivered yet" in done.stdout
    assert part.exists()
    done = call("spool", "purge", "--yes")
    assert done.returncode == 0
    assert done.stdout.endswith("1 segment deleted; 1 segment in use\n")
    assert not part.exists()
    assert [s["owner"] for s in status()["segments"]] == ["alive"]


def test_a_server_that_answers_is_shown_with_its_version(call: Run) -> None:
    """Status asks the configured server for its version."""

    class Version(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"3.17.2")

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Version) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            uri = f"http://127.0.0.1:{server.server_port}"
            shown = call("status", MLFLOW_TRACKING_URI=uri).stdout
        finally:
            server.shutdown()
            thread.join()
    assert f"{uri} answers: MLflow 3.17.2" in shown


@pytest.mark.parametrize("command", [("sync",), ("status",), ("spool", "purge")])
def test_a_path_that_is_no_spool_is_named(call: Run, command: tuple[str, ...]) -> None:
    """A wrong path exits with 2 and says which directory would be meant."""
    done = call(*command, "no-such-thing")
    assert done.returncode == 2
    assert "'no-such-thing' is neither a spool directory nor a file in one" in done.stderr
    assert "Traceback" not in done.stderr


def test_where_there_is_no_spool_there_is_nothing_to_do(call: Run) -> None:
    """Without a spool all three commands say so and succeed."""
    assert call("sync").stdout.strip() == "0 records delivered, 0 segments finished"
    assert call("status").stdout.startswith("0 records in 0 segments wait in ")
    assert call("spool", "purge").stdout == "Nothing to delete\n"
