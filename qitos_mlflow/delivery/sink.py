"""What delivery hands its records to: a sink, the part that knows the server.

Receives records in the order they were recorded, each at least once. A sink runs on one thread
only: the sending thread or that of `qitos-mlflow sync`, never the agent's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from qitos_mlflow.delivery.spool.dead_letters import DeadLetter

steps: Counter[int] = Counter()
"""How often the sinks of each thread, by its id, have called `progressed`."""


def progressed() -> None:
    """Note that the sink of this thread gets on, such as with each call that is answered."""
    steps[threading.get_ident()] += 1


class RetryLater(Exception):
    """Raised by a sink: not now; call again later.

    Args:
        reason: for people, such as ``"503 from http://host"``; holds no payload and no key.
        after_s: what the server asked for (``Retry-After``), in seconds; None when it did not.
    """

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s
        self.got_on = False
        """Whether the server had carried out a part before."""


class Hopeless(RetryLater):
    """Raised by a sink: time alone will not help, such as with a directory that is read-only."""


class OutOfTime(RetryLater):
    """Raised by a sink: the server answers, but there is more to send than time."""

    def __init__(self) -> None:
        super().__init__("out of time", 0.0)


class Sink(Protocol):
    """Maps and sends the records of one segment, and keeps what later records depend on.

    Attributes:
        patience: a factor of the time that `send` gets, at least 1: how slow its server may be.
    """

    patience: float

    def restore(self, state: bytes) -> None:
        """Go back to a state that `state` returned; also called in mid-life, after a failure.

        Called with what an earlier process stored before the first `prepare`, unless that is
        empty or nothing was acknowledged yet.
        """
        ...

    def prepare(self, records: Sequence[bytes]) -> None:
        """Map records for `send` and advance the state; no network.

        Everything prepared before has been sent when this is called, or `restore` was called since.
        `restore` is called after whatever this raises. If it raises each time that it is given one
        record alone, that one becomes a dead letter.
        """
        ...

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        """Prepare what ends the traces left open: no more records will come. False: nothing does.

        Called once after the last record, by the process that delivers the segment of a dead one.
        Called with `closed` by the process itself when it closes in order: what is meant to stay
        open stays open. `last_time_ns` is the wall clock's time of the last record.
        """
        ...

    def send(self, timeout_s: float) -> list[DeadLetter]:
        """Bring what is prepared to the server; returns all of it that was refused for good.

        Blocks up to about `timeout_s` (more than 0). After `RetryLater` it is called again and
        continues where it stopped; doing a part twice must be harmless.

        Raises:
            RetryLater: the server cannot be reached or is busy.
            OutOfTime: the server answers; the next call sends the rest.
        """
        ...

    def state(self) -> bytes:
        """Everything `restore` needs, as of the last `prepare`; stored with the acknowledgement."""
        ...

    def close(self) -> None:
        """Free connections; the sink is not used again. Must not wait for the server."""
        ...
