"""The end of a process: one deadline and one line, however many processors it has."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qitos_mlflow.delivery import Counts, Paths, find_segments, inspect_segment
from qitos_mlflow.recording import process_exit
from tests.fakes.sink import left_behind

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.tracing import SpanType, StepSpanData, add_trace_processor, create_trace

uri, count, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for number in range(count):
    add_trace_processor(
        MlflowTraceProcessor(
            f"e{number}",
            tracking_uri=f"{uri or 'http://127.0.0.1:9'}/{number}",
            exit_timeout_s=timeout_s,
            offline=not uri,
        )
    )
with create_trace("x") as trace:
    trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
"""


def run(*args: object, code: str = SCRIPT) -> tuple[float, str]:
    """How long `code` was held up at its end (seconds), and what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(time.monotonic(), flush=True)", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return time.monotonic() - float(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def hanging() -> Iterator[str]:
    """A server that takes every request and answers none."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.skipif(sys.platform == "win32", reason="compares the clocks of two processes")
def test_the_deadline_is_the_processs(hanging: str) -> None:
    """Five processors hold the process up no longer than one does, and one line counts all."""
    held_s, said = run(hanging, 5, 1.0)
    assert held_s < 3.0
    [line] = said.splitlines()
    match = re.search(r": (\d+) records of 1 trace are kept .*: qitos-mlflow sync (.*)$", line)
    assert match, line
    assert int(match[1]) == 15
    assert Path(match[2]).name == "spool"


PLANTING = """
import glob, os
from qitos_mlflow.delivery import living
from qitos_mlflow.settings import Settings

spool, what = Settings.resolve().spool_dir, sys.argv[4]
while not glob.glob(f"{spool}/*.seg"):
    time.sleep(0.01)
for path in glob.glob(f"{spool}/*"):
    if path.endswith((".seg", ".ack") if what == "some" else ("",)):
        os.unlink(path)
        os.mkfifo(path)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has FIFOs")
@pytest.mark.parametrize("what", ["some", "all"])
@pytest.mark.parametrize("offline", [False, True])
def test_fifos_in_place_of_its_files_do_not_hold_the_process(
    hanging: str, what: str, offline: bool
) -> None:
    """It ends within its deadline, whatever is in the place of its own segment."""
    held_s, _ = run("" if offline else hanging, 1, 1.0, what, code=SCRIPT + PLANTING)
    assert held_s < 30.0


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="starts no thread at its end")
def test_a_disk_that_hangs_does_not_hold_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line comes without the number of records that cannot be read in time."""
    left_behind(tmp_path, [b'{"trace_id": "one"}'] * 2)
    [paths] = find_segments(tmp_path)
    answers = threading.Event()

    def hangs(paths: Paths) -> Iterator[bytes]:
        answers.wait(100)
        yield b"{}"

    monkeypatch.setattr(process_exit, "waiting_records", hangs)
    command = "qitos-mlflow sync", str(tmp_path)
    kept = SimpleNamespace(sync_command=command, paths=paths, unsaved=0)
    process_exit._say_what_is_left([kept])  # type: ignore[list-item]
    answers.set()
    assert f"deliver with: qitos-mlflow sync {tmp_path}" in capsys.readouterr().err


def test_what_is_put_off_is_in_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All else may be delivered; a file that is too large for a proxy is not."""

    class Delivered:
        exit_timeout_s = local_exit_timeout_s = 0.0
        hopeless = None
        traces = ()
        sync_command = ("qitos-mlflow sync", str(tmp_path))
        stats = Counts()
        unsaved = 0

        def refuse(self) -> None: ...

        def close(self, timeout_s: float) -> bool:
            return True

    process_exit._end_all([Delivered()])  # type: ignore[list-item]
    assert capsys.readouterr().err == ""
    Delivered.stats.add(dead_letters=2, put_off=1)
    process_exit._end_all([Delivered()])  # type: ignore[list-item]
    assert capsys.readouterr().err == (
        "qitos-mlflow: 1 record is put off, such as a file that cannot be stored; once that is "
        f"mended, deliver with: qitos-mlflow sync {tmp_path}\n"
    )


def test_only_directories_with_records_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A spool that could not be written has nothing to deliver, and may not even be there."""
    left_behind(tmp_path, [b'{"trace_id": "one"}'] * 2)
    [paths] = find_segments(tmp_path)
    command = "qitos-mlflow sync", str(tmp_path)
    good = SimpleNamespace(sync_command=command, paths=paths, unsaved=0)
    bad = SimpleNamespace(
        sync_command=command, paths=Paths(tmp_path / "file" / "spool", "stem"), unsaved=3
    )
    process_exit._say_what_is_lost([good, bad])  # type: ignore[list-item]
    process_exit._say_what_is_left([good, bad])  # type: ignore[list-item]
    lost, kept = capsys.readouterr().err.splitlines()
    assert lost.startswith("qitos-mlflow: 3 records lost")
    assert str(bad.paths.directory) in lost
    assert kept.endswith(f"deliver with: qitos-mlflow sync {tmp_path}")


def test_exit_handlers_of_the_program_come_first() -> None:
    """What it registers after the first run may still begin and end traces."""
    code = """
import atexit
from qitos_mlflow.recording import process_exit
process_exit._end_all = lambda pipelines: print("ours", flush=True)
process_exit.register()
process_exit.end_first()
atexit.register(print, "theirs", flush=True)
process_exit.end_first()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[:2] == ["theirs", "ours"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_the_wait_and_the_line_remains(hanging: str) -> None:
    """The parent sees a process that Ctrl-C has ended, its user what is left."""
    # A shell that starts the tests in the background has them ignore SIGINT, and so this process.
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heeds}\n{SCRIPT}\nprint('over', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code, hanging, "2", "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "over\n"
        time.sleep(0.5)  # Until it waits in its exit handler.
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    [line] = said.splitlines()
    assert "6 records of 1 trace are kept" in line
    assert process.returncode == -signal.SIGINT


EXITS = """
import signal, sys
from qitos_mlflow.recording.pipelines import RecordPipeline

def announced(self, timeout_s, close=RecordPipeline.close):
    print("waits", flush=True)
    return close(self, timeout_s)

RecordPipeline.close = announced
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_a_handler_that_exits_ends_the_wait_and_is_no_ctrl_c(hanging: str) -> None:
    """A process that ends in order, and is then asked to hurry, has still ended in order."""
    with subprocess.Popen(
        [sys.executable, "-c", EXITS + SCRIPT, hanging, "2", "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert "6 records of 1 trace are kept" in said
    assert process.returncode == 0


LATE = """
import multiprocessing, sys, time
from pathlib import Path
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings
from qitos_mlflow.tracing import SpanType, StepSpanData, Trace
from tests.fakes.sink import FakeServer

class ToServer(RecordPipeline):
    def open_sink(self):
        return FakeServer().sink()

recorder = Recorder(Settings(spool_dir=Path(sys.argv[1])))
host = Trace(name="t", trace_id="t")
pipeline = recorder.pipeline_to("x", lambda key, settings: ToServer(b"x", key, settings))
trace = TraceRecorder(host, pipeline, recorder.settings)
recorder.add("t", trace)
trace.start(host)
assert recorder.close(30)
"""


@pytest.mark.parametrize(
    ("late", "reason"),
    [
        ("pipeline.offer(b'late')", "closed"),
        pytest.param(
            "child = multiprocessing.get_context('fork').Process("
            "target=recorder.lose_span, args=('t',))\nchild.start()\nchild.join()",
            "forked",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="forks"),
        ),
    ],
)
def test_what_comes_after_an_end_without_remains_is_counted(
    tmp_path: Path, late: str, reason: str
) -> None:
    """`status` shows it, although the pipeline had nothing left and was closed before."""
    run(tmp_path, code=LATE + late)
    [losses] = [inspect_segment(paths).losses for paths in find_segments(tmp_path)]
    assert losses == {reason: 1}


def test_many_files_are_named_by_their_directory(tmp_path: Path) -> None:
    """With many segments the line names their directory, so that it stays short."""
    said = run("", 12, 1.0)[1]
    assert said.endswith(f"sync {tmp_path / 'spool'}\n")


DROPPED = """
import gc, sys, time
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.recording import process_exit
from qitos_mlflow.tracing import create_trace, set_trace_processors

process_exit.COUNT_S = 60.0  # On a busy machine, too.
for number in range(3):
    settings = dict(tracking_uri=sys.argv[1], exit_timeout_s=0.0, flush_timeout_s=0.0, **{options})
    processor = MlflowTraceProcessor("e", **settings)
    set_trace_processors([processor])
    with create_trace("x"):
        pass
    {close}
del processor
set_trace_processors([])
gc.collect()
"""


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("close", ["pass", "processor.shutdown()"])
def test_records_of_a_deleted_processor_are_named_all_the_same(offline: bool, close: str) -> None:
    """The line at the exit counts the records of processors that no longer exist."""
    code = DROPPED.format(options={"offline": offline}, close=close)
    said = run("http://127.0.0.1:9", code=code)[1]
    # Behind it there may be a line of the log, about an attempt that fails at that moment.
    assert said.count("6 records of 3 traces are kept") == 1


IN_MEMORY = """
from qitos_mlflow.recording import pipelines

normalize, entered = pipelines.normalize, []

def slow(payload, *rest):
    entered.append(payload)
    time.sleep(60)

import time
pipelines.normalize = slow
"""


def test_what_is_still_in_memory_is_reported_as_lost() -> None:
    """Records that the spooling thread could not write in time are reported as lost."""
    said = run("http://127.0.0.1:9", 1, 0.0, code=IN_MEMORY + SCRIPT)[1]
    assert "3 records lost: neither the server nor the spool" in said


class ClosedPipe(io.StringIO):
    """What stderr is once its reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class LeftSomething:
    """A pipeline that could not deliver all it had."""

    hopeless = None
    exit_timeout_s = local_exit_timeout_s = 0.0
    traces = ()
    unsaved = 1
    stats = Counts()
    paths = Paths(Path("spool"), "none-1-1-1")
    sync_command = "qitos-mlflow sync", "spool"

    def refuse(self) -> None:
        """Nothing is offered."""

    def close(self, timeout_s: float) -> bool:
        return False


def test_what_cannot_be_printed_does_not_keep_mlflows_run(
    monkeypatch: pytest.MonkeyPatch, swallowed: list[tuple[str, BaseException]]
) -> None:
    """MLflow's exit handler finds no active run of ours, whose server may be gone."""
    let_go: list[bool] = []
    monkeypatch.setattr(process_exit, "at_last", [lambda: let_go.append(True)])
    monkeypatch.setattr(sys, "stderr", ClosedPipe())
    process_exit._end_all([LeftSomething()])  # type: ignore[list-item]
    assert let_go == [True]
    assert [type(error) for _, error in swallowed] == [BrokenPipeError]
    swallowed.clear()


SAID = "are kept but not delivered yet"
REUSED = "import os; os.close(2); users = open('users', 'w'); assert users.fileno() == 2"
REPLACED = """
import os
log = os.open('users', os.O_WRONLY | os.O_CREAT)
os.dup2(log, 2)
os.close(log)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors as a shell does")
@pytest.mark.parametrize(
    ("begin", "redirect", "said", "spool"),
    [
        # A spool that cannot be written makes both: a log line, and the last line.
        ("", "2>&-", False, "file"),  # No stderr.
        ("import sys; sys.stderr = None", "2>users", False, "file"),
        ("import sys; sys.stderr.close()", "2>users", False, "file"),
        (REUSED, "", False, "file"),  # A file of the program's has its number.
        (REUSED, "", False, "spool"),
        (REPLACED, "", True, "file"),  # A daemon's log, on purpose.
        ("import os, sys; sys.stderr = open('users', 'w')", "2>&-", True, "file"),
        ("", "2>users", True, "file"),
        ("", "2>users", True, "spool"),
    ],
)
def test_lines_go_to_stderr_or_nowhere(
    tmp_path: Path, begin: str, redirect: str, said: bool, spool: str
) -> None:
    """Neither the last line nor a log line is ever in the program's output or in its files."""
    (tmp_path / "file").touch()
    (tmp_path / "users").touch()
    (tmp_path / "script.py").write_text(f"{begin}\n{SCRIPT}\nprint('output', flush=True)")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "script.py", "", "1", "1"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "QITOS_MLFLOW_SPOOL_DIR": str(tmp_path / spool),
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("output\n", "")
    lines = (tmp_path / "users").read_text().splitlines()
    if not said:
        assert lines == []
    elif spool == "spool":
        assert [line for line in lines if SAID in line] == lines != []
    else:
        assert ["cannot be written" in line for line in lines] == [True, False]
        assert " lost: " in lines[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors as a shell does")
def test_complaints_of_commands_go_to_stderr_or_nowhere(tmp_path: Path) -> None:
    """Without a stderr a command has nothing but its exit code to complain with."""
    command = [sys.executable, "-m", "qitos_mlflow.cli", "status", "no-such-thing"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode in (1, 2)  # The first versions of click 8 cannot do better than 1.
    assert done.stdout == ""


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_spool_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, offline: bool
) -> None:
    """However many of its files cannot be written; the last line counts what is lost."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("QITOS_MLFLOW_SPOOL_DIR", str(tmp_path / place))
    said = run("" if offline else "http://127.0.0.1:9", 2, 0.5)[1].splitlines()
    assert len([line for line in said if f"{tmp_path / place}" in line]) == 2, said
    assert "cannot be written" in said[0]
    assert "records lost" in said[-1]
