"""SIGINT and SIGTERM end `sync`, `status`, `compare` and `spool purge`, whatever they wait for."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import environment, runs_in
from tests.cli.test_spool import trace, write_segment
from tests.integration.made_store import make_store
from tests.waiting import eventually

NEVER_S = 90.0
"""Shorter than any of the waits that are ended here would last; a busy machine takes its time."""
PATIENCE = ("--patience", "100000")


class Slow:
    """A server that accepts connections and sends `piece` every now and then, for ever."""

    def __init__(self, piece: bytes) -> None:
        self._piece = piece
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.is_set():
                connection, _ = self._listener.accept()
                threading.Thread(target=self._drip, args=[connection], daemon=True).start()

    def _drip(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            if self._piece:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            self.asked.set()
            while not self._over.wait(0.05):
                connection.sendall(self._piece)

    def close(self) -> None:
        self._over.set()
        self._listener.close()


@pytest.fixture
def slow(request: pytest.FixtureRequest) -> Iterator[Slow]:
    """A server that never finishes an answer: it drips `x`, or hangs if there is nothing to."""
    server = Slow(request.param)
    yield server
    server.close()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `qitos-mlflow args…`, killed at last if it has not ended."""
    started = []

    def run(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "qitos_mlflow.cli", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], number: int) -> str:
    """Send the signal; returns the one line that the process says of it."""
    process.send_signal(number)
    _, said = process.communicate(timeout=NEVER_S)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "ended by" in line]
    assert len(lines) == 1, said
    assert lines[0].startswith(f"qitos-mlflow: ended by {signal.Signals(number).name}: ")
    return lines[0]


@pytest.mark.parametrize(
    ("slow", "command", "number"),
    [
        (b"x", ("sync", *PATIENCE), signal.SIGINT),
        (b"", ("sync", *PATIENCE), signal.SIGTERM),
        (b"x", ("sync", "--follow"), signal.SIGTERM),
        (b"", ("sync", "--follow"), signal.SIGINT),
        (b"x", ("status",), signal.SIGINT),
        (b"", ("status",), signal.SIGTERM),
        (b"x", ("compare", "a", "b", "--tracking-uri", "{uri}"), signal.SIGTERM),
        (b"", ("compare", "a", "b", "--tracking-uri", "{uri}"), signal.SIGINT),
    ],
    indirect=["slow"],
)
def test_a_slow_server_holds_nothing_up(
    tmp_path: Path, slow: Slow, start: Start, command: tuple[str, ...], number: int
) -> None:
    """Whether it hangs or drips, and whether it is asked or sent records; none of these is lost.

    Each command meets both servers and both signals, but not all four pairs of them: what a signal
    does is the same function for all commands.
    """
    part = write_segment(tmp_path, slow.uri, *trace("slow"))
    process = start(*(word.format(uri=slow.uri) for word in command))
    assert slow.asked.wait(NEVER_S)
    end(process, number)
    assert part.exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_locked_database_holds_nothing_up(tmp_path: Path, start: Start) -> None:
    """SQLite waits for a lock outside of Python, where no handler of Python's runs."""
    make_store(tmp_path / "locked.db")
    store = f"sqlite:///{tmp_path}/locked.db"
    write_segment(tmp_path, store, *trace("locked"))
    with contextlib.closing(sqlite3.connect(tmp_path / "locked.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        process = start("sync", *PATIENCE)
        eventually(lambda: _has_open(process.pid, "locked.db"))
        end(process, signal.SIGTERM)
    again = start("sync")
    assert again.communicate(timeout=NEVER_S)[0].startswith("2 records delivered")
    assert len(runs_in(store, "locked")) == 1


def _has_open(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):  # It may close one meanwhile.
        return any(fd.readlink().name == name for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_question_is_not_answered(tmp_path: Path, start: Start, number: int) -> None:
    """`spool purge` asks before it deletes; a signal is no yes."""
    part = write_segment(tmp_path, "http://127.0.0.1:9", *trace("kept"))
    process = start("spool", "purge")
    assert process.stdout is not None
    assert "1 segment with 2 records" in process.stdout.readline()
    assert end(process, number).endswith("0 segments deleted")
    assert part.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sidecar_with_nothing_to_do_ends(tmp_path: Path, start: Start, number: int) -> None:
    """That is no failure; its last line says what it has done."""
    process = start("sync", "--follow")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Delivering the records in")
    process.send_signal(number)
    output, said = process.communicate(timeout=NEVER_S)
    assert (process.returncode, output, said) == (0, "0 records delivered\n", "")


def test_the_last_line_says_how_to_go_on(tmp_path: Path, start: Start) -> None:
    """With the paths that were given."""
    server = Slow(b"")
    write_segment(tmp_path, server.uri, *trace("slow"))
    process = start("sync", *PATIENCE, str(tmp_path / "spool"))
    assert server.asked.wait(NEVER_S)
    said = end(process, signal.SIGTERM)
    server.close()
    assert said.endswith(
        f"0 records delivered, 1 segment not; go on with: qitos-mlflow sync {tmp_path / 'spool'}"
    )
