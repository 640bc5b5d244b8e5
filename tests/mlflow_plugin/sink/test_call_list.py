"""Calls that do not come through at once: made again, made smaller, never given up for that."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qitos_mlflow.delivery import DeadLetter, OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.server.transport import Refused
from qitos_mlflow.mlflow_plugin.sink import call_list
from qitos_mlflow.mlflow_plugin.sink.call_list import FAILING_TRIES, Call, CallList
from qitos_mlflow.mlflow_plugin.sink.operations import Operations
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState
from tests.fakes.clock import Clock
from tests.fakes.transport import FakeTransport

Fail = Callable[[Sequence[Any]], "Exception | None"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(call_list, "time", clock)
    return clock


class Server:
    """Takes items, each attempt so many seconds long, and fails as `fail` says of them."""

    def __init__(self, clock: Clock, takes_s: float) -> None:
        self.taken: list[Any] = []
        self.attempts: list[int] = []
        self.given: list[float] = []
        self.fail: Fail = lambda items: None
        self._clock = clock
        self._takes_s = takes_s
        self.trace = TraceState.begin("trace-1", {}, tree=False, late=False, resumed=False)
        self.trace.run = RunRef("run-0", "0", "name", "", 0)

    def __call__(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        self.attempts.append(len(items))
        self.given.append(timeout_s)
        self._clock.now += self._takes_s
        if failure := self.fail(items):
            raise failure
        self.taken.extend(items)

    def calls(self, *each: Sequence[Any]) -> CallList:
        """Calls with these items, on a server that does not have the trace's run."""
        calls = [Call(self.trace, self, items) for items in each]
        return CallList(Operations(FakeTransport(), lambda *_: None), calls)


def send(calls: CallList, tries: int) -> list[DeadLetter] | None:
    """Try so often at most; None if there is still something to send."""
    for _ in range(tries):
        try:
            return calls.send(15.0)
        except RetryLater:
            pass
    return None


def test_what_is_too_much_at_once_is_sent_in_parts(clock: Clock) -> None:
    """A call that is never answered in time gets through all the same, in order."""
    server = Server(clock, takes_s=8.0)
    server.fail = lambda items: RetryLater("ReadTimeout") if len(items) > 100 else None
    items = list(range(500))
    assert send(server.calls(items), 20) == []
    assert server.taken == items
    assert server.attempts[:FAILING_TRIES] == [500] * FAILING_TRIES


def test_a_blip_splits_nothing(clock: Clock) -> None:
    """A server that is back soon gets what it was to get, however often it was tried meanwhile."""
    server = Server(clock, takes_s=0.1)
    calls = server.calls(range(500))
    server.fail = lambda items: RetryLater("ConnectionError")
    assert send(calls, 10 * FAILING_TRIES) is None
    server.fail = lambda items: None
    assert send(calls, 1) == []
    assert set(server.attempts) == {500}


def test_what_a_firewall_minds_is_kept(clock: Clock) -> None:
    """All before the one item arrives; that, and what follows, waits for as long as it takes."""
    server = Server(clock, takes_s=1.0)
    server.fail = lambda items: RetryLater("HTTP 403") if 250 in items else None
    calls = server.calls(range(500), [500])
    assert send(calls, 300) is None
    assert server.taken == list(range(250))
    server.fail = lambda items: None
    assert send(calls, 1) == []
    assert server.taken == list(range(501))


def test_a_run_deleted_during_an_outage_is_found_out_at_once(clock: Clock) -> None:
    """That its calls were made smaller meanwhile does not have their items refused one by one."""
    server = Server(clock, takes_s=8.0)
    server.trace.waiting.records.append(b"record")
    calls = server.calls(range(500))
    server.fail = lambda items: RetryLater("ConnectionError")
    assert send(calls, 2 * FAILING_TRIES) is None
    server.attempts.clear()
    server.fail = lambda items: Refused("INVALID_PARAMETER_VALUE", "")
    reason = "RESOURCE_DOES_NOT_EXIST: run-0"
    assert send(calls, 1) == [DeadLetter(b"record", reason)]
    assert len(server.attempts) == 1
    assert calls.refused == {"trace-1": reason}


def test_many_calls_that_are_answered_are_no_failure(clock: Clock) -> None:
    """If only the time is too short, the exception says so, and no call begins without time."""
    server = Server(clock, takes_s=3.6)
    calls = server.calls(*([number] for number in range(5)))
    with pytest.raises(OutOfTime):
        calls.send(15.0)
    assert server.taken == [0, 1, 2]
    assert calls.send(15.0) == []
    assert server.taken == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("takes_s", [2.0, 4.0, 7.0])
def test_no_call_has_less_time_than_the_server_takes(clock: Clock, takes_s: float) -> None:
    """A slow server would look dead, and the call that creates a run would be made twice."""
    server = Server(clock, takes_s)
    calls = server.calls(*([number] for number in range(20)))
    for timeout_s in itertools.cycle((15.0, 5.0 + takes_s)):
        with contextlib.suppress(OutOfTime):
            if calls.send(timeout_s) == []:
                break
    assert server.taken == list(range(20))
    assert min(server.given) >= takes_s
