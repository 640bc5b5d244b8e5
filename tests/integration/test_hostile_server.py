"""Real processes against a server that wants their memory, their time, or both."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qitos_mlflow.mlflow_plugin.server.http import Request
from tests.cli.conftest import environment, run_cli
from tests.fakes.mlflow_rest import MlflowRest
from tests.fakes.raw_server import RawServer, raw_server

MIB = 1024 * 1024
MEMORY_BYTES = 100 * MIB
"""What an exit may take more than with a server that behaves."""
HANG_S = 60.0
"""Many times the time that is given."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
MUCH = b" " * MIB

AGENT = """
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.tracing import SpanType, StepSpanData, add_trace_processor, create_trace
import sys
add_trace_processor(MlflowTraceProcessor(tracking_uri=sys.argv[1]))
with create_trace("run") as trace:
    for step in range(20):
        trace.create_span(SpanType.STEP, StepSpanData(step)).start().finish()
"""

Answer = Callable[[Request], Iterator[bytes]]


def endless(request: Request) -> Iterator[bytes]:
    """A body without an end, as fast as it is read."""
    yield HEAD + b"\r\n"
    yield from itertools.repeat(MUCH)


def endless_chunks(request: Request) -> Iterator[bytes]:
    """The same in chunks."""
    yield HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    yield from itertools.repeat(b"100000\r\n" + MUCH + b"\r\n")


def endless_head(request: Request) -> Iterator[bytes]:
    """Informational answers before the one that never comes."""
    yield from itertools.repeat(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" * 1000)


def dripping(server: RawServer) -> Answer:
    """A byte now and then, much more often than any timeout of a socket."""

    def answer(request: Request) -> Iterator[bytes]:
        yield HEAD + b"Content-Length: 100000\r\n\r\n"
        while not server.stopped.wait(0.2):
            yield b" "

    return answer


def peak_bytes(spool: Path, uri: str, **environ: str) -> int:
    """The most memory that an agent's process takes with this server, its exit included."""
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, uri],
        env=environment(QITOS_MLFLOW_SPOOL_DIR=str(spool), QITOS_TRACE_PLUGINS="none", **environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stderr is not None
        stderr = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return usage.ru_maxrss * 1024


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The most memory that an agent's process takes with a server that behaves."""
    with raw_server(MlflowRest().over_http) as well:
        found = peak_bytes(tmp_path_factory.mktemp("well"), well.uri)
        assert len(well.requests) > 4
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize("answer", [endless, endless_chunks, endless_head])
def test_an_endless_answer_takes_no_memory(tmp_path: Path, usual: int, answer: Answer) -> None:
    """The exit's seconds would suffice for gigabytes; what is not delivered is in the spool."""
    with raw_server(answer) as hostile:
        most = peak_bytes(tmp_path / "hostile", hostile.uri, QITOS_MLFLOW_EXIT_TIMEOUT_S="2")
        assert most - usual < MEMORY_BYTES
        assert hostile.requests
    assert list((tmp_path / "hostile").rglob("*.seg*"))


@pytest.mark.parametrize("command", ["sync", "status"])
def test_a_byte_now_and_then_ends_no_later(tmp_path: Path, command: str) -> None:
    """`sync` ends with its patience and keeps the records; `status` says that nothing answers."""
    with raw_server(dripping(None)) as server:  # type: ignore[arg-type]
        server.answer = dripping(server)
        peak_bytes(tmp_path, server.uri, QITOS_MLFLOW_EXIT_TIMEOUT_S="0")
        options = ["--patience", "0.5"] if command == "sync" else []
        began = time.monotonic()
        done = run_cli(command, *options, str(tmp_path), QITOS_MLFLOW_SPOOL_DIR=str(tmp_path))
        assert time.monotonic() - began < HANG_S
    assert "Traceback" not in done.stderr
    if command == "sync":
        assert done.returncode == 1
        assert f"{server.uri} does not" in done.stderr
        assert "1 segment not delivered" in done.stderr
    else:
        assert f"{server.uri} does not answer" in done.stdout
