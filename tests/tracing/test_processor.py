"""Several processors at once, whatever each of them does."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from qitos_mlflow.tracing.models import Span, Trace
from qitos_mlflow.tracing.processor import NoOpTraceProcessor, SynchronousMultiTraceProcessor
from qitos_mlflow.tracing.span_data import StepSpanData
from tests.fakes.recorder import Failing, Recorder
from tests.interrupts import ctrl_c

TRACE = Trace("t", "run")
SPAN = Span("t", "s", StepSpanData(1))

EVENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("on_trace_start", (TRACE,)),
    ("on_span_start", (SPAN,)),
    ("on_span_end", (SPAN,)),
    ("on_trace_end", (TRACE,)),
    ("shutdown", ()),
    ("force_flush", ()),
]


@pytest.mark.parametrize(("method", "arguments"), EVENTS)
def test_a_failing_processor_harms_nobody(
    method: str, arguments: tuple[Any, ...], swallowed: list[Any]
) -> None:
    """What one processor raises reaches neither the caller nor the others, and is reported once."""
    error = ValueError("mine")
    heard: list[str] = []

    class Hearing(Recorder):
        def shutdown(self) -> None:
            heard.append("shutdown")

        def force_flush(self) -> bool:
            heard.append("force_flush")
            return True

    hearing = Hearing()
    multi = SynchronousMultiTraceProcessor([Failing(error), hearing])
    getattr(multi, method)(*arguments)
    assert [method.removeprefix("on_")] == hearing.names + heard
    assert swallowed == [(f"Failing.{method}", error)]
    swallowed.clear()


def test_interrupts_go_through() -> None:
    """Ctrl-C inside a processor still stops the program."""
    interrupted = NoOpTraceProcessor()
    interrupted.on_span_end = ctrl_c
    multi = SynchronousMultiTraceProcessor([interrupted])
    with pytest.raises(KeyboardInterrupt):
        multi.on_span_end(SPAN)


def test_failures_are_logged_at_most_once_a_minute(
    caplog: pytest.LogCaptureFixture, swallowed: list[Any]
) -> None:
    """A processor that always fails is named once in the log, and counted every time."""

    class AlwaysFailing(Failing):
        pass

    multi = SynchronousMultiTraceProcessor([AlwaysFailing(ValueError("mine"))])
    with caplog.at_level(logging.WARNING, "qitos_mlflow"):
        for _ in range(5):
            multi.on_span_end(SPAN)
    (record,) = caplog.records
    assert "AlwaysFailing.on_span_end" in record.getMessage()
    assert len(swallowed) == 5
    swallowed.clear()


@pytest.mark.parametrize(
    ("answers", "flushed"),
    [
        ([], True),
        ([True, None], True),
        ([False, True], False),
        ([True, False], False),
        ([0], False),
    ],
)
def test_force_flush_is_true_only_if_all_agree(answers: list[Any], flushed: bool) -> None:
    """True: every processor said True or nothing; every one is asked, also after a False."""
    asked: list[Any] = []

    class Answering(NoOpTraceProcessor):
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def force_flush(self) -> Any:
            asked.append(self.answer)
            return self.answer

    multi = SynchronousMultiTraceProcessor([Answering(answer) for answer in answers])
    assert multi.force_flush() is flushed
    assert asked == answers


def test_force_flush_of_a_failing_processor_is_false(swallowed: list[Any]) -> None:
    """A processor that fails to flush has not flushed."""
    assert SynchronousMultiTraceProcessor([Failing(ValueError())]).force_flush() is False
    swallowed.clear()


def test_removing_while_telling() -> None:
    """A processor that removes itself, or adds another, skips none and is not called again."""
    multi = SynchronousMultiTraceProcessor()
    last = Recorder()

    class Leaving(Recorder):
        def on_span_end(self, span: Span) -> None:
            super().on_span_end(span)
            multi.remove_processor(self)
            multi.add_processor(Recorder())

    leaving = Leaving()
    for processor in (leaving, last):
        multi.add_processor(processor)
    multi.on_span_end(SPAN)
    multi.on_span_end(SPAN)
    assert leaving.names == ["span_end"]
    assert last.names == ["span_end"] * 2
    multi.remove_processor(leaving)
    assert multi.processors[0] is last


def test_adding_and_removing_from_many_threads() -> None:
    """No processor added is lost and no other removed, with threads doing both during events."""
    stays = Recorder()
    multi = SynchronousMultiTraceProcessor([stays])
    together = threading.Barrier(4)
    kept: list[Recorder] = []

    def change() -> None:
        together.wait()
        for _ in range(200):
            passing, staying = Recorder(), Recorder()
            kept.append(staying)
            multi.add_processor(passing)
            multi.add_processor(staying)
            multi.remove_processor(passing)

    def tell() -> None:
        together.wait()
        for _ in range(200):
            multi.on_span_end(SPAN)

    threads = [threading.Thread(target=target) for target in (change, change, change, tell)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(multi.processors) == {stays, *kept}
    assert len(stays.events) == 200


def test_equal_processors_are_different_ones() -> None:
    """Removing a processor removes that object, not one that claims to equal it."""

    class Equal(NoOpTraceProcessor):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    one, other = Equal(), Equal()
    multi = SynchronousMultiTraceProcessor([one, other])
    multi.remove_processor(other)
    assert multi.processors[0] is one
    assert len(multi.processors) == 1
