"""The n-th call fails, for every n, as SQLite's I/O error tests do: nothing lost or doubled.

One run of a pipeline without a fault counts the calls that it makes: of the file system below the
spool, and of MLflow's server. Then each of them fails once in a run of its own; of the file
system's, each fifth outside of soak. Afterwards everything is on the server as in the run without a
fault, once what is left has been delivered as `qitos-mlflow sync` does it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from qitos_mlflow.delivery import Outcome, Pipeline, backoff, find_segments, sending_thread
from qitos_mlflow.delivery.spool import reader as reader_module
from qitos_mlflow.delivery.spool import writer as writer_module
from qitos_mlflow.delivery.spool.segments import inspect_segment
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.delivery.spool.test_spool import MEMORY
from tests.fakes.files import FileCalls
from tests.fakes.mlflow_rest import HEADER, MlflowRest
from tests.fakes.sink import deliver, left_behind, make_pipeline
from tests.mlflow_plugin.records import Records

FINISHED = {Outcome.FINISHED}
LONG_S = 30.0
"""A deadline that is not to be reached."""

TAKES_SPACE = {"open", "write", "fsync", "mkdir", "replace"}
TAKES_A_DESCRIPTOR = {"open", "listdir", "scandir"}


def a_trace(number: int) -> list[bytes]:
    """The records of one run, with a file."""
    make = Records(f"trace-{number}")
    spans = [make.span("step", step=n, step_number=n) for n in range(3)]
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    spans.append(make.span("generation", model="gpt-4o", token_usage=usage))
    file = {"kind": "artifact", "trace_id": make.trace_id, "path": "a.txt", "content": "answer"}
    records = [make.start(), *spans, file, make.end(recorded=4)]
    return [orjson.dumps(record) for record in records]


TRACES = [a_trace(number) for number in range(2)]


RECORDS = [record for trace in TRACES for record in trace]
ENDPOINTS = {
    *("get-by-name", "create", "log-batch", "update", "traces", "metrics", "artifacts"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, and no waiting where only time would have to pass."""
    monkeypatch.setattr(SegmentWriter, "part_bytes", 900)
    monkeypatch.setattr(sending_thread, "SEND_EVERY_S", LONG_S)  # Each flush is one batch.
    monkeypatch.setattr(sending_thread, "WAITED_FOR_DELAY_S", 0.01)
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(writer_module, "DISK_RETRY_S", 0.05)
    monkeypatch.setattr(reader_module, "READ_S", 0.0)


@pytest.fixture
def spool() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name, "state", "spool")


def record(spool: Path, server: MlflowRest | None, **options: Any) -> Pipeline:
    """An agent that records two runs and ends: nothing is refused, nothing is raised."""
    pipeline = make_pipeline(spool, server, header=HEADER, **options)
    for trace in TRACES:
        for records in (trace[:2], trace[2:]):
            assert all(pipeline.offer(record) for record in records)
            assert pipeline.flush(LONG_S) or server is None
    assert pipeline.close(LONG_S) or server is None
    for thread in threading.enumerate():
        if thread.name.startswith("qitos-mlflow"):
            thread.join(LONG_S)
            assert not thread.is_alive()
    return pipeline


def sync(spool: Path, server: MlflowRest) -> set[Outcome | None]:
    """Deliver what is left, as `qitos-mlflow sync` does."""
    found = find_segments(spool) if spool.is_dir() else []
    return {deliver(paths, partial(server.sink, resumed=True)) for paths in found}


def logged(spool: Path) -> dict[str, Any]:
    """What is on the server without a fault."""
    server = MlflowRest()
    record(spool, server)
    assert list(spool.iterdir()) == []
    found = server.logged()
    assert [run["status"] for run in found["runs"].values()] == ["FINISHED"] * 2
    assert len(found["spans"]) == 10
    assert len(found["traces"]) == len(found["artifacts"]) == 2
    return found


@pytest.mark.parametrize("fault", ["reset", "cut", "page"])
def test_each_request_fails_once(spool: Path, fault: str) -> None:
    """A reset before or after the request, and a router's page, change nothing in the end."""
    want = logged(spool)
    server = MlflowRest()
    record(spool, server)
    requests, wrong = server.requests, []
    assert {request.rpartition("/")[2] for request in requests} >= ENDPOINTS, requests
    for number, request in enumerate(requests):
        server = MlflowRest()
        server.fails = lambda n, number=number: fault if n == number else None
        record(spool, server)
        assert sync(spool, server) <= FINISHED
        assert len(server.requests) > number
        if server.logged() != want:
            wrong.append(f"request {number}: {request}")
    assert not wrong, "\n".join(wrong)


def faults(counts: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Each call that was counted, with each error that it may fail with."""
    for name, count in counts.items():
        for number in range(count):
            yield name, number, errno.EIO
            if name in TAKES_SPACE:
                yield name, number, errno.ENOSPC
            if name in TAKES_A_DESCRIPTOR:
                yield name, number, errno.EMFILE


Scene = Callable[[], Iterator[None]]
"""Prepares, yields, does what may fail, yields, and checks what has become of it."""


@pytest.fixture(params=[5, pytest.param(1, marks=pytest.mark.soak)], ids=["fifth", "all"])
def every(request: pytest.FixtureRequest) -> int:
    """Which of the faults are tried: each fifth, in soak all."""
    return int(request.param)


def each_call_fails_once(spool: Path, scene: Scene, every: int) -> Counter[str]:
    """Play the scene once without a fault, then once for each call that fails in it."""
    counts = play(spool, scene, lambda name, number: None)
    for name, number, code in [*faults(counts)][::every]:
        shutil.rmtree(spool.parent, ignore_errors=True)
        failure = OSError(code, os.strerror(code))
        try:
            play(spool, scene, partial(fails_once, name, number, failure))
        except BaseException as error:
            error.args = (f"{name} {number} fails with {failure}: {error!r}",)
            raise
    return counts


def play(spool: Path, scene: Scene, fails: Callable[[str, int], OSError | None]) -> Counter[str]:
    """Play the scene; returns the calls it made."""
    parts = scene()
    next(parts)
    with pytest.MonkeyPatch.context() as patch:
        calls = FileCalls(spool.parent.parent, patch)
        calls.fails = fails
        next(parts)
    assert next(parts, "over") == "over"
    return calls.counts


def fails_once(name: str, number: int, failure: OSError, at: str, n: int) -> OSError | None:
    """For `FileCalls.fails`."""
    return failure if (name, number) == (at, n) else None


@pytest.mark.parametrize("fsync", [False, True], ids=["unsynced", "synced"])
def test_each_call_of_the_file_system_fails_once(spool: Path, fsync: bool, every: int) -> None:
    """While an agent delivers: memory stands in, nothing is lost, nothing is left."""
    want = logged(spool)
    shutil.rmtree(spool.parent)

    def scene() -> Iterator[None]:
        server = MlflowRest()
        yield
        pipeline = record(spool, server, fsync=fsync)
        yield
        assert sync(spool, server) <= FINISHED
        assert (pipeline.stats.dropped, pipeline.stats.dead_letters) == ({}, 0)
        assert server.logged() == want

    counts = each_call_fails_once(spool, scene, every)
    assert set(counts) >= {
        *("open", "write", "fsync", "close", "read", "stat", "fstat", "mkdir", "flock"),
        *("replace", "unlink", "scandir", "fchmod"),
    }, counts


@pytest.mark.parametrize("fsync", [False, True], ids=["unsynced", "synced"])
def test_each_call_fails_once_offline(spool: Path, fsync: bool, every: int) -> None:
    """No memory stands in, so the disk is tried a second time at once: nothing is lost."""
    want = logged(spool)
    shutil.rmtree(spool.parent)

    def scene() -> Iterator[None]:
        yield
        pipeline = record(spool, None, fsync=fsync)
        yield
        assert pipeline.stats.dropped == {}
        [paths] = find_segments(spool)
        assert inspect_segment(paths).waiting == len(RECORDS)
        server = MlflowRest()
        assert sync(spool, server) == FINISHED
        assert server.logged() == want
        assert list(spool.iterdir()) == []

    counts = each_call_fails_once(spool, scene, every)
    assert set(counts) >= {"open", "write", "close", "stat", "fstat", "mkdir", "flock", "listdir"}


def test_each_call_of_sync_fails_once(spool: Path, every: int) -> None:
    """What one `sync` leaves because of it, the next one delivers; a damaged line is counted."""
    want = logged(spool)
    shutil.rmtree(spool.parent)
    damaged = b'{"kind":"span"}'

    def scene() -> Iterator[None]:
        server = MlflowRest()
        paths = left_behind(spool, [*RECORDS[:4], damaged, *RECORDS[4:]], HEADER)
        part = next(path for _, path in paths.parts() if damaged in path.read_bytes())
        part.write_bytes(part.read_bytes().replace(damaged, damaged.upper()))
        yield
        with suppress(OSError):  # The command says so, and that it may be tried again.
            sync(spool, server)
        yield
        assert sync(spool, server) <= FINISHED
        assert server.logged() == want
        info = inspect_segment(paths)
        assert sum(info.dead_letters.values()) + sum(info.losses.values()) >= 1
        assert {path.suffix for path in spool.iterdir()} <= {".dead", ".lost"}

    counts = each_call_fails_once(spool, scene, every)
    assert set(counts) >= {"open", "write", "read", "fsync", "stat", "unlink", "replace", "flock"}
    assert counts["unlink"] >= 5
