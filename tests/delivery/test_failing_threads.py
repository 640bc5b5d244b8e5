"""Whatever is raised on the threads of a pipeline costs the record at hand, which is counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow import _threads
from qitos_mlflow.delivery import Pipeline, backoff, inspect_segment
from qitos_mlflow.delivery.byte_queue import ByteQueue
from qitos_mlflow.delivery.spool.parts import DiskPart
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.fakes.sink import FakeServer, FakeSink, make_pipeline, numbered
from tests.interrupts import inject
from tests.waiting import eventually

LONG_S = 30.0
ALL = numbered(6)
RAISED = [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError()]


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def made(tmp_path: Path, server: FakeServer, swallowed: list[Any]) -> Iterator[Any]:
    """Makes pipelines, closes them, and forgets what they have reported."""
    pipelines: list[Pipeline] = []

    def make(**methods: Any) -> Pipeline:
        pipelines.append(make_pipeline(tmp_path / "spool", server, **methods))
        return pipelines[-1]

    yield make
    for pipeline in pipelines:
        pipeline.close(LONG_S)
    swallowed.clear()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 0.001)


def once(error: BaseException, call: Callable[..., Any], *, when: int = 2) -> Callable[..., Any]:
    """`call`, which raises `error` instead the second time."""
    calls: list[None] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == when:
            raise error
        return call(*args, **kwargs)

    return failing


def thread(name: str) -> threading.Thread:
    return next(one for one in threading.enumerate() if one.name == f"qitos-mlflow-{name}")


@pytest.mark.parametrize("error", RAISED)
def test_a_record_that_cannot_be_normalized(
    made: Any, server: FakeServer, error: BaseException
) -> None:
    """It is lost and counted; the others arrive."""
    pipeline = made(normalize=once(error, lambda payload: payload))
    for record in ALL:
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert server.accepted == [ALL[0], *ALL[2:]]
    reason = "no_memory" if isinstance(error, MemoryError) else "normalize_failed"
    assert pipeline.stats.dropped == {reason: 1}


@pytest.mark.parametrize("error", [*RAISED, ValueError("a bug")])
@pytest.mark.parametrize("place", [SegmentWriter, DiskPart])
def test_a_failing_append(
    made: Any,
    server: FakeServer,
    error: BaseException,
    place: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a batch, the first record that is not in the file yet is lost; none is stored twice."""
    monkeypatch.setattr(place, "append", once(error, place.append, when=1))
    pipeline = made()
    for record in ALL:
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert server.accepted == ALL[1:]
    reason = "no_memory" if isinstance(error, MemoryError) else "spooling_failed"
    assert pipeline.stats.dropped == {reason: 1}


@pytest.mark.parametrize("error", RAISED)
def test_a_spooling_thread_that_fails_goes_on_with_what_it_has_taken(
    made: Any, server: FakeServer, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, and the failure is counted for other processes."""
    monkeypatch.setattr(ByteQueue, "linger", once(error, ByteQueue.linger, when=1))
    pipeline = made()
    for record in ALL:
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert server.accepted == ALL
    assert pipeline.stats.dropped == {}
    assert json.loads(pipeline.paths.lost.read_bytes()) == {"threads_restarted": 1}
    assert inspect_segment(pipeline.paths).losses == {}
    assert inspect_segment(pipeline.paths).restarts == 1


@pytest.mark.parametrize("error", RAISED[:3])
@pytest.mark.parametrize("method", ["prepare", "send", "state", "close"])
def test_a_sink_that_raises_is_tried_again(
    made: Any,
    server: FakeServer,
    method: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is lost, given up or sent twice."""
    monkeypatch.setattr(FakeSink, method, once(error, getattr(FakeSink, method), when=1))
    pipeline = made()
    for record in ALL:
        pipeline.offer(record)
    assert pipeline.flush(LONG_S)
    assert pipeline.close(LONG_S)
    assert server.accepted == ALL
    assert pipeline.stats.dropped == {}
    assert pipeline.stats.dead_letters == 0


@pytest.mark.parametrize("name", ["spooling", "sending"])
def test_what_is_injected_into_a_thread_costs_nothing(
    made: Any, server: FakeServer, name: str, swallowed: list[Any]
) -> None:
    """It is a thread of the program for `PyThreadState_SetAsyncExc`, as any other."""
    pipeline = made()
    for number in range(3):
        pipeline.offer(ALL[number])
        assert pipeline.flush(LONG_S)
        inject(thread(name), SystemExit)
        pipeline.offer(ALL[number + 3], urgent=True)
        assert pipeline.flush(LONG_S)
        eventually(lambda number=number: len(swallowed) == number + 1)
    assert sorted(server.accepted) == ALL
    assert pipeline.stats.dropped == {}
    assert inspect_segment(pipeline.paths).restarts == 3
