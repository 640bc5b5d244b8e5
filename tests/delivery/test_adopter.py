"""What dead processes left is finished by those that live and deliver."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qitos_mlflow.delivery import RetryLater, Sink, adopter, find_segments, inspect_segment
from tests.fakes.sink import FakeServer, make_pipeline, numbered
from tests.waiting import eventually

LONG_S = 30.0
ROOT = Path(__file__).parents[2]

DIE = """
import os, sys
from pathlib import Path
from tests.fakes.sink import FakeServer, make_pipeline, numbered
server = FakeServer() if sys.argv[2] == "online" else None
if server is not None:
    server.answers.clear()
pipeline = make_pipeline(Path(sys.argv[1]), server, header=sys.argv[3].encode())
for record in numbered(3, int(sys.argv[4])):
    pipeline.offer(record)
pipeline.flush(0.2)
os.kill(os.getpid(), 9)
"""

Opener = Callable[[bytes], "Callable[[], Sink] | None"]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at once and all the time; these tests are not about how often."""
    monkeypatch.setattr(adopter, "FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(adopter, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(adopter, "PAUSE_S", 0.0)


@pytest.fixture
def server() -> FakeServer:
    """Where everything goes."""
    return FakeServer()


@pytest.fixture
def live(tmp_path: Path, server: FakeServer) -> Iterator[Callable[[Opener], None]]:
    """Start a pipeline that has delivered a record, and adopts as it is told."""
    pipelines = []

    def start(adopt: Opener) -> None:
        pipeline = make_pipeline(tmp_path, server, adopt=adopt)
        pipelines.append(pipeline)
        pipeline.offer(b"own")
        pipeline.flush(LONG_S)

    yield start
    for pipeline in pipelines:
        pipeline.close(LONG_S)


def die(directory: Path, *, mode: str = "online", header: str = "{}", first: int = 0) -> None:
    """A process that records three records from `first` on, delivers none and is killed."""
    command = [sys.executable, "-c", DIE, str(directory), mode, header, str(first)]
    subprocess.run(command, cwd=ROOT, check=False)


posix = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


@posix
def test_a_living_process_finishes_a_dead_ones_segment(
    tmp_path: Path, server: FakeServer, live: Callable[[Opener], None]
) -> None:
    """Its records arrive in order, its open traces are ended, its files are gone."""
    die(tmp_path)
    live(lambda header: lambda: server.sink(header))
    eventually(lambda: len(find_segments(tmp_path)) == 1)
    assert server.accepted == [b"own", *numbered(3), b"killed"]
    assert [mapped for mapped, _ in server.abandoned] == [3]


@posix
def test_only_what_is_asked_for_is_adopted(
    tmp_path: Path, server: FakeServer, live: Callable[[Opener], None]
) -> None:
    """Other headers, those who work offline and those who live are left alone."""
    die(tmp_path, header='{"to": "elsewhere"}')
    die(tmp_path, mode="offline", first=10)
    other = make_pipeline(tmp_path, None)
    other.offer(b"alive")
    other.flush(0.1)
    die(tmp_path, first=20)
    asked: list[bytes] = []

    def adopt(header: bytes) -> Callable[[], Sink] | None:
        asked.append(header)
        return server.sink if header == b"{}" else None

    live(adopt)
    eventually(lambda: b"killed" in server.accepted)
    eventually(lambda: asked.count(b'{"to": "elsewhere"}') >= 2)
    assert set(asked) == {b"{}", b'{"to": "elsewhere"}'}
    assert server.accepted == [b"own", *numbered(3, 20), b"killed"]
    left = [inspect_segment(paths) for paths in find_segments(tmp_path)]
    assert sum(info.waiting for info in left if not info.owner_alive) == 6
    other.close(0.1)


@posix
def test_adoption_never_stands_in_the_way(
    tmp_path: Path, server: FakeServer, live: Callable[[Opener], None]
) -> None:
    """A sink that hangs while it adopts holds up neither records, nor flush, nor the end."""
    die(tmp_path)
    hanging, go_on = threading.Event(), threading.Event()

    def hang() -> Sink:
        hanging.set()
        go_on.wait(LONG_S)
        raise RetryLater("stopped")

    pipeline = make_pipeline(tmp_path, server, adopt=lambda header: hang)
    pipeline.offer(b"one")
    assert hanging.wait(LONG_S)
    pipeline.offer(b"two")
    assert pipeline.flush(LONG_S)
    assert pipeline.close(LONG_S)
    assert server.accepted == [b"one", b"two"]
    go_on.set()
    eventually(lambda: not inspect_segment(find_segments(tmp_path)[0]).shipping)


@posix
def test_nothing_is_adopted_while_the_server_is_away(tmp_path: Path, server: FakeServer) -> None:
    """A process that cannot deliver its own does not try with others'."""
    die(tmp_path)
    server.down = RetryLater("503")
    asked = threading.Event()
    pipeline = make_pipeline(tmp_path, server, adopt=lambda header: asked.set())
    pipeline.offer(b"one")
    assert not pipeline.flush(0.3)
    assert not asked.is_set()
    server.down = None
    assert asked.wait(LONG_S)
    assert pipeline.close(LONG_S)
