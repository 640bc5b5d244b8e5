"""The circuit breaker, with a clock and dice of the test's own."""

from __future__ import annotations

import random

import pytest

from qitos_mlflow.delivery import RetryLater, backoff
from qitos_mlflow.delivery.backoff import Circuit
from tests.fakes.clock import Clock


def online(circuit: Circuit) -> bool | None:
    """Asked anew each time: mypy takes a property for something that stays as it was."""
    return circuit.online


def fail(circuit: Circuit, after_s: float | None = None) -> None:
    """An attempt that the server does not answer, or answers with a Retry-After."""

    def send(timeout_s: float) -> None:
        raise RetryLater("503", after_s)

    assert circuit.attempt(send, 1.0) is None
    assert circuit.problem == "503"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Moves when the test says so. Each delay is the longest possible one."""
    clock = Clock()
    monkeypatch.setattr(backoff, "time", clock)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    return clock


def test_delays_double_up_to_their_bound(clock: Clock) -> None:
    """The longest possible delays grow twofold and stop at the maximum."""
    circuit = Circuit()
    delays = []
    for _ in range(12):
        fail(circuit)
        delays.append(circuit.delay_s)
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays == sorted(delays)
    assert delays[-1] == backoff.MAX_DELAY_S


def test_jitter_is_full(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each delay is drawn between nothing and its bound, so that agents come back spread out."""
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    monkeypatch.setattr(random, "uniform", uniform)
    circuit = Circuit()
    fail(circuit)
    fail(circuit)
    assert drawn == [(0.0, 0.5), (0.0, 1.0)]


def test_retry_after_is_honoured_and_capped(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server asks for is the least delay; an absurd demand is not obeyed for ever."""
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    circuit = Circuit()
    fail(circuit, 7.0)
    assert circuit.delay_s == 7.0
    fail(circuit, 1e9)
    assert circuit.delay_s == backoff.MAX_RETRY_AFTER_S
    fail(circuit, -5.0)
    assert circuit.delay_s == 0.0


def test_a_thread_that_waits_bounds_the_time_between_attempts(clock: Clock) -> None:
    """Counted from the last attempt, not from each look at it; Retry-After is obeyed all the same.

    Otherwise a flush or an exit outlasts its deadline while the server is back for long.
    """
    circuit = Circuit()
    for _ in range(8):
        fail(circuit)
    assert circuit.delay_s == backoff.MAX_DELAY_S
    assert circuit.delay_apart_s(1.0) == 1.0
    clock.now += 0.75
    assert circuit.delay_apart_s(1.0) == 0.25
    clock.now += 0.75
    assert circuit.delay_apart_s(1.0) == 0.0
    assert circuit.delay_s == backoff.MAX_DELAY_S - 1.5
    fail(circuit, 7.0)
    clock.now += 2.0
    assert circuit.delay_apart_s(1.0) == circuit.delay_s == 5.0 + backoff.RETRY_AFTER_SPREAD_S


def test_a_success_closes_the_circuit(clock: Clock) -> None:
    """After one success there is no delay, and the next failure begins with the shortest."""
    circuit = Circuit()
    assert online(circuit) is None
    for _ in range(5):
        fail(circuit)
    assert online(circuit) is False
    clock.now += 100
    assert circuit.failing_s == 100
    assert circuit.delay_s == 0.0
    assert online(circuit) is False
    assert circuit.attempt(lambda timeout_s: "done", 1.0) == "done"
    assert circuit.problem is None
    assert online(circuit) is True
    fail(circuit)
    assert circuit.delay_s == 0.5


def test_many_failures_do_not_overflow(clock: Clock) -> None:
    """A server may be down for weeks."""
    circuit = Circuit()
    for _ in range(5000):
        fail(circuit)
    assert circuit.delay_s == backoff.MAX_DELAY_S
