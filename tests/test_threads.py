"""A thread of ours goes on after whatever is raised in it, without using up the processor."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from qitos_mlflow import _threads
from qitos_mlflow._inheritance import Forked
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.mlflow_plugin.fluent.in_background import InBackground
from tests.interrupts import inject


class Failing(OwnThread):
    """Raises one after another, then is done."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__("failing")
        self.left = list(errors)
        self.calls = 0

    def work(self) -> None:
        self.calls += 1
        if self.left:
            raise self.left.pop(0)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long threads have paused; they do not."""
    paused: list[float] = []
    monkeypatch.setattr(_threads.time, "sleep", paused.append)
    return paused


def test_work_that_raises_is_called_again(pauses: list[float], swallowed: list[Any]) -> None:
    """Whatever it raises; each failure is reported and told."""
    errors = [ValueError(1), SystemExit(3), KeyboardInterrupt(), MemoryError()]
    told: list[None] = []
    thread = Failing(*errors)
    thread.when_failed = lambda: told.append(None)
    thread.start()
    thread.join(30)
    assert (thread.calls, len(told)) == (5, 4)
    assert swallowed == [("the thread failing", error) for error in errors]
    swallowed.clear()


def test_a_thread_without_memory_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would wait for ever for one that gets its stack and nothing else."""
    monkeypatch.setattr(_threads, "memory_left", lambda: _threads.START_BYTES - 1)
    with pytest.raises(MemoryError):
        Failing().start()
    assert _threads.in_time(threading.current_thread, 30) is threading.current_thread()
    done: list[threading.Thread] = []
    InBackground("work").do(lambda: done.append(threading.current_thread()))
    assert done == [threading.current_thread()]


def test_it_pauses_longer_and_longer(pauses: list[float], swallowed: list[Any]) -> None:
    """What always fails does not use up the processor."""
    thread = Failing(*(ValueError(n) for n in range(10)))
    thread.start()
    thread.join(30)
    assert pauses[:3] == [0.1, 0.2, 0.4]
    assert pauses[-1] == max(pauses) == _threads.LAST_PAUSE_S
    swallowed.clear()


def test_what_fails_while_a_failure_is_told_changes_nothing(
    pauses: list[float], swallowed: list[Any]
) -> None:
    """Such as no memory for the report."""

    def fail() -> None:
        raise MemoryError

    thread = Failing(ValueError(1))
    thread.when_failed = fail
    thread.start()
    thread.join(30)
    assert thread.calls == 2
    swallowed.clear()


def test_a_thread_of_the_parent_process_ends(pauses: list[float]) -> None:
    """With gevent it goes on in a forked child; that is no failure."""
    thread = Failing(Forked())
    thread.start()
    thread.join(30)
    assert (thread.calls, pauses) == (1, [])


def test_what_another_thread_injects_does_not_end_it(
    pauses: list[float], swallowed: list[Any]
) -> None:
    """`PyThreadState_SetAsyncExc` is aimed at the program's threads, and may hit one of ours."""
    begun, go_on = threading.Event(), threading.Event()

    class Working(OwnThread):
        calls = 0

        def work(self) -> None:
            self.calls += 1
            begun.set()
            while not go_on.is_set():
                pass

    thread = Working("working")
    thread.start()
    for number in (1, 2, 3):
        assert begun.wait(30)
        begun.clear()
        assert thread.calls == number
        inject(thread, SystemExit)
    assert begun.wait(30)
    go_on.set()
    thread.join(30)
    assert (thread.calls, len(swallowed)) == (4, 3)
    swallowed.clear()
