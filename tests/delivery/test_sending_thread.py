"""What follows from an attempt: the time of the next one, and what is known of the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from qitos_mlflow.delivery import Counts, Delivery, Outcome, OutOfTime, RetryLater
from qitos_mlflow.delivery.backoff import PROBE_TIMEOUT_S, Circuit
from qitos_mlflow.delivery.leftovers import Leftovers
from qitos_mlflow.delivery.segment_transfer import SEND_TIMEOUT_S
from qitos_mlflow.delivery.sending_thread import SendingThread
from qitos_mlflow.delivery.spool.segments import claim
from tests.fakes.sink import FakeServer, deliver, left_behind


class Steps:
    """Stands in for `SegmentTransfer`: each step is what `step` makes of the time it is given."""

    position = 0

    def __init__(self, step: Callable[[float], None]) -> None:
        self.given_s: list[float] = []
        self._step = step

    def step(self, timeout_s: float, *, end: int | None, sealed: bool, patient: bool) -> bool:
        self.given_s.append(timeout_s)
        self._step(timeout_s)
        return True


def no_leftovers(spool: Path) -> Leftovers:
    return Leftovers(spool, lambda header: None)


def test_what_takes_long_gets_through_after_a_failure(tmp_path: Path) -> None:
    """The short attempts that follow a failure are few: some batches need more time than that."""

    def slow(timeout_s: float) -> None:
        if len(steps.given_s) == 1 or timeout_s < 6:
            raise RetryLater("ReadTimeout")

    steps, circuit = Steps(slow), Circuit()
    sending = SendingThread(steps, circuit, no_leftovers(tmp_path))  # type: ignore[arg-type]
    for _ in range(4):
        sending.attempt()
    assert steps.given_s == [SEND_TIMEOUT_S, PROBE_TIMEOUT_S, PROBE_TIMEOUT_S, SEND_TIMEOUT_S]
    assert circuit.online


def test_a_server_that_has_much_to_do_is_there(tmp_path: Path) -> None:
    """The next part follows at once, and traces that begin may wait for their run."""

    def answered(timeout_s: float) -> None:
        raise OutOfTime

    def fail(timeout_s: float) -> None:
        raise RetryLater("503")

    circuit = Circuit()
    circuit.attempt(fail, 1.0)
    sending = SendingThread(Steps(answered), circuit, no_leftovers(tmp_path))  # type: ignore[arg-type]
    sending.attempt()
    assert (circuit.online, circuit.delay_s) == (True, 0.0)


def test_much_to_do_is_no_problem_of_a_segment(tmp_path: Path) -> None:
    """Delivered by others, a segment that takes more than one attempt is not failing."""
    paths = left_behind(tmp_path, [b"record"])
    server = FakeServer()
    server.down = OutOfTime()

    def failing(delivery: Delivery) -> bool:
        server.down = None
        return delivery.circuit.problem is not None

    assert deliver(paths, server.sink, stop=failing) is Outcome.FINISHED
    assert server.accepted == [b"record", b"killed"]


def test_what_is_half_sent_keeps_its_place(tmp_path: Path) -> None:
    """Put off, a segment would begin anew with records that take long, and never be through."""
    server = FakeServer()
    taken = claim(left_behind(tmp_path, [b"record"]), Counts())
    assert taken is not None
    delivery = Delivery(taken, server.sink)
    server.down = OutOfTime()
    delivery.step()
    assert delivery.transfer.halfway
    server.down = None
    delivery.step()
    assert not delivery.transfer.halfway
    delivery.close()


def test_without_a_thread_the_deadline_holds(tmp_path: Path) -> None:
    """What is left after the pause between two attempts is all that the next one gets."""

    def away(timeout_s: float) -> None:
        raise RetryLater("503", after_s=60)

    steps = Steps(away)
    sending = SendingThread(steps, Circuit(), no_leftovers(tmp_path))  # type: ignore[arg-type]
    assert not sending.send_here(1, time.monotonic() + 0.5)
    assert len(steps.given_s) == 2
    assert steps.given_s[1] < 0.25
