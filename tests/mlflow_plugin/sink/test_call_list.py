"""Calls that do not come through at once: made again, made smaller, never given up for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qitos_mlflow.delivery import DeadLetter, OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.server.transport import Refused
from qitos_mlflow.mlflow_plugin.sink import call_list
from qitos_mlflow.mlflow_plugin.sink.call_list import FAILING_TRIES, Call, CallList, Group
from tests.fakes.clock import Clock

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
        self.fail: Fail = lambda items: None
        self._clock = clock
        self._takes_s = takes_s

    def __call__(self, items: Sequence[Any], timeout_s: float) -> None:
        self.attempts.append(len(items))
        self._clock.now += self._takes_s
        if failure := self.fail(items):
            raise failure
        self.taken.extend(items)

    def call(self, items: Sequence[Any], group: Group | None = None) -> Call:
        return Call(self, items, lambda item: b"%d" % item, group)


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
    assert send(CallList([server.call(items)]), 20) == []
    assert server.taken == items
    assert server.attempts[:FAILING_TRIES] == [500] * FAILING_TRIES


def test_a_blip_splits_nothing(clock: Clock) -> None:
    """A server that is back soon gets what it was to get, however often it was tried meanwhile."""
    server = Server(clock, takes_s=0.1)
    calls = CallList([server.call(range(500))])
    server.fail = lambda items: RetryLater("ConnectionError")
    assert send(calls, 10 * FAILING_TRIES) is None
    server.fail = lambda items: None
    assert send(calls, 1) == []
    assert set(server.attempts) == {500}


def test_what_a_firewall_minds_is_kept(clock: Clock) -> None:
    """All before the one item arrives; that, and what follows, waits for as long as it takes."""
    server = Server(clock, takes_s=1.0)
    server.fail = lambda items: RetryLater("HTTP 403") if 250 in items else None
    calls = CallList([server.call(range(500)), server.call([500])])
    assert send(calls, 300) is None
    assert server.taken == list(range(250))
    server.fail = lambda items: None
    assert send(calls, 1) == []
    assert server.taken == list(range(501))


def test_a_run_deleted_during_an_outage_is_found_out_at_once(clock: Clock) -> None:
    """That its calls were made smaller meanwhile does not have their items refused one by one."""
    deleted = Refused("RESOURCE_DOES_NOT_EXIST", "")
    reasons: list[str] = []

    def check(timeout_s: float) -> None:
        raise deleted

    group = Group([b"record"], check, reasons.append)
    server = Server(clock, takes_s=8.0)
    calls = CallList([server.call(range(500), group)])
    server.fail = lambda items: RetryLater("ConnectionError")
    assert send(calls, 2 * FAILING_TRIES) is None
    server.attempts.clear()
    server.fail = lambda items: deleted
    assert send(calls, 1) == [DeadLetter(b"record", str(deleted))]
    assert len(server.attempts) == len(reasons) == 1


def test_many_calls_that_are_answered_are_no_failure(clock: Clock) -> None:
    """If only the time is too short, the exception says so, and no call begins without time."""
    server = Server(clock, takes_s=4.8)
    calls = CallList([server.call([number]) for number in range(5)])
    with pytest.raises(OutOfTime):
        calls.send(15.0)
    assert server.taken == [0, 1, 2]
    assert calls.send(15.0) == []
    assert server.taken == [0, 1, 2, 3, 4]
