"""A batch of records as calls on a server, made in order, resumed where they stopped.

Receives `Call`s from the sink and hands back dead letters. What the server refuses for good is
split until only the offending item is left out and the rest is delivered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qitos_mlflow.delivery import DeadLetter, RetryLater
from qitos_mlflow.mlflow_plugin import limits
from qitos_mlflow.mlflow_plugin.metrics import Metric
from qitos_mlflow.mlflow_plugin.transport import Poisoned, Refused

REQUEST_TIMEOUT_S = 10.0
"""Longest wait for one answer, whatever MLflow's environment says (its default is 120 s)."""

POISONED_TRIES = 4
"""A call that makes the server itself fail is tried at least this often, ..."""
POISONED_S = 20.0
"""... and for so long, then treated as refused if the server is well otherwise: one whose database
is away says the same of every call. Less than the patience of `qitos-mlflow sync`, which would
never get past it (seconds).
"""


@dataclass(frozen=True)
class Group:
    """What some calls are about; without it there is no use in making them.

    Attributes:
        records: what all of the calls come from.
        check: raises `Refused` if the server takes nothing at all of this group.
        refuse: told why the server will not have it.
    """

    records: Sequence[bytes]
    check: Callable[[float], None]
    refuse: Callable[[str], None]


@dataclass
class Call:
    """One request: `send` with as many of `items` as are given.

    Attributes:
        send: makes the request; gets the items and a timeout in seconds.
        items: what the request carries; a refusal is traced to single ones by splitting.
        letter: the dead letter of one refused item.
        group: what the call is about.
        essential: if this call is refused, the group is.
    """

    send: Callable[[Sequence[Any], float], None]
    items: Sequence[Any]
    letter: Callable[[Any], bytes]
    group: Group | None = None
    essential: bool = False
    is_part: bool = False
    failures: int = 0
    failing_since: float = 0.0

    def halves(self) -> tuple[Call, Call]:
        """The same call twice, each with half of the items."""
        middle = len(self.items) // 2
        one, other = self.items[:middle], self.items[middle:]
        return replace(self, items=one, is_part=True), replace(self, items=other, is_part=True)


class MlflowShipment:
    """`delivery.Shipment` over a list of calls. Used by one thread.

    Args:
        calls: to be made, in order.
        dead: what was refused before.
        healthy: whether the server is well; asked before a call that breaks it is given up.
    """

    def __init__(
        self,
        calls: Iterable[Call],
        dead: Iterable[DeadLetter] = (),
        healthy: Callable[[float], bool] = lambda timeout_s: True,
    ) -> None:
        self._calls = deque(calls)
        self._healthy = healthy
        self._dead = list(dead)

    def send(self, timeout_s: float) -> list[DeadLetter]:
        """Make the remaining calls; returns what was refused for good.

        Raises:
            RetryLater: the server cannot be reached, or `timeout_s` is over; calling again
                goes on with the call that failed.
        """
        deadline = time.monotonic() + timeout_s
        while self._calls:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RetryLater("out of time", 0.0)
            call = self._calls[0]
            try:
                call.send(call.items, min(left, REQUEST_TIMEOUT_S))
            except Refused as refusal:
                self._refused(call, refusal, min(left, REQUEST_TIMEOUT_S))
            except Poisoned as failure:
                call.failures += 1
                if call.failures == 1:
                    call.failing_since = time.monotonic()
                failing_s = time.monotonic() - call.failing_since
                if call.failures < POISONED_TRIES or failing_s < POISONED_S:
                    raise RetryLater(str(failure)) from failure
                if not self._healthy(min(left, REQUEST_TIMEOUT_S)):
                    call.failures = 0
                    raise RetryLater(f"the server is out of order: {failure}") from failure
                self._give_up(call, str(failure))
            else:
                self._calls.popleft()
        return self._dead

    def _refused(self, call: Call, refusal: Refused, timeout_s: float) -> None:
        if call.group is not None and not call.essential and not call.is_part:
            # Before its items are tried one by one: a run that was deleted takes none of them.
            try:
                call.group.check(timeout_s)
            except Refused as whole:
                self._bury(call.group, str(whole))
                return
            except Poisoned:
                pass
        self._give_up(call, str(refusal))

    def _give_up(self, call: Call, reason: str) -> None:
        if call.essential and call.group is not None:
            self._bury(call.group, reason)
            return
        self._calls.popleft()
        if len(call.items) > 1:
            self._calls.extendleft(reversed(call.halves()))
            return
        self._dead.extend(DeadLetter(call.letter(item), reason) for item in call.items)

    def _bury(self, group: Group, reason: str) -> None:
        group.refuse(reason)
        self._calls = deque(call for call in self._calls if call.group is not group)
        self._dead.extend(DeadLetter(record, reason) for record in group.records)


Item = tuple[str, Any]
"""What a log_batch call carries: "metric", "param" or "tag", and the thing itself."""

MOST = {
    "param": limits.BATCH_PARAMS,
    "tag": limits.BATCH_TAGS,
    "metric": limits.BATCH_METRICS,
}


def batches(
    metrics: list[Metric], params: list[tuple[str, str]], tags: list[tuple[str, str]]
) -> Iterator[list[Item]]:
    """Everything in batches within MLflow's limits; of tags set more than once the last stays."""
    left: dict[str, deque[Any]] = {
        "metric": deque(metrics),
        "param": deque(params),
        "tag": deque(dict(tags).items()),
    }
    while any(left.values()):
        chunk: list[Item] = []
        for kind, most in MOST.items():
            queue = left[kind]
            room = min(most, limits.BATCH_TOTAL - len(chunk), len(queue))
            chunk += [(kind, queue.popleft()) for _ in range(room)]
        yield chunk
