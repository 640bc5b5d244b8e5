"""A batch of records as calls on a server, made in order and resumed at the one that failed.

Receives `Call`s from the sink and hands back dead letters. A call that the server refuses for good
is split until only the offending item is left out and the rest is delivered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qitos_mlflow.delivery import DeadLetter, OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused

REQUEST_TIMEOUT_S = 10.0
"""Longest wait for one answer, whatever MLflow's environment says (its default is 120 s)."""
FAIR_SHARE = 0.1
"""Share of the given time. With less left no further call begins, lest it fail for that alone."""

FAILING_TRIES = 4
"""A call that fails is tried as it is at least this often, ..."""
FAILING_S = 20.0
"""... and at least for this time (seconds), which is shorter than `qitos-mlflow sync` waits.

Then, if the call makes the server itself fail and the server is well otherwise, it is treated as
refused. (A server without its database fails on every call.) If the call is not answered, it is
made in halves: it may be too large for its time, or a firewall may block one item of it.
"""


@dataclass
class Failing:
    """How often a call has failed in one way, and since when (seconds, monotonic clock)."""

    times: int = 0
    since: float = 0.0

    def again(self) -> bool:
        """Count one more failure; True if there were enough of them over enough time."""
        now = time.monotonic()
        self.times += 1
        if self.times == 1:
            self.since = now
        return self.times >= FAILING_TRIES and now - self.since >= FAILING_S


@dataclass(frozen=True)
class Group:
    """What some calls have in common, such as their run. If it is refused, none of them is made.

    Attributes:
        records: all records that the calls come from.
        check: raises `Refused` if the server refuses everything of this group.
        refuse: called with the reason when the server refuses the group.
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
        essential: if this call is refused, so is the group.
        checked: the server has said that it does not refuse the group.
        broke: how often the server failed on it; its halves go on counting.
        failed: how often it was not answered; its halves go on counting.
    """

    send: Callable[[Sequence[Any], float], None]
    items: Sequence[Any]
    letter: Callable[[Any], bytes]
    group: Group | None = None
    essential: bool = False
    checked: bool = False
    broke: Failing = field(default_factory=Failing)
    failed: Failing = field(default_factory=Failing)


class CallList:
    """The calls of a batch that are left to be made. Used by one thread.

    Args:
        calls: to be made, in order.
        dead: dead letters from before.
        healthy: whether the server is well; asked before a call that it fails on is given up.
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
            RetryLater: the server cannot be reached; the next `send` goes on with the call that
                failed.
            OutOfTime: some calls were made, and `timeout_s` is over.
        """
        deadline = time.monotonic() + timeout_s
        answered = False
        while self._calls:
            left = deadline - time.monotonic()
            if answered and left < FAIR_SHARE * timeout_s:
                raise OutOfTime
            if left <= 0:
                raise RetryLater("out of time", 0.0)
            call = self._calls[0]
            try:
                call.send(call.items, min(left, REQUEST_TIMEOUT_S))
            except Refused as refusal:
                self._refused(call, refusal, min(left, REQUEST_TIMEOUT_S))
            except Poisoned as failure:
                if not call.broke.again():
                    raise RetryLater(str(failure)) from failure
                if not self._healthy(min(left, REQUEST_TIMEOUT_S)):
                    call.broke.times = 0
                    raise RetryLater(f"the server is out of order: {failure}") from failure
                self._give_up(call, str(failure))
            except RetryLater:
                if call.failed.again() and len(call.items) > 1:
                    self._halve(call)
                raise
            else:
                self._calls.popleft()
            answered = True
        return self._dead

    def _refused(self, call: Call, refusal: Refused, timeout_s: float) -> None:
        if call.group is not None and not call.essential and not call.checked:
            # Before its items are tried one by one: a run that was deleted takes none of them.
            try:
                call.group.check(timeout_s)
            except Refused as whole:
                self._bury(call.group, str(whole))
                return
            except Poisoned:
                pass
            call.checked = True
        self._give_up(call, str(refusal))

    def _give_up(self, call: Call, reason: str) -> None:
        if call.essential and call.group is not None:
            self._bury(call.group, reason)
        elif len(call.items) > 1:
            self._halve(call)
        else:
            self._calls.popleft()
            self._dead.extend(DeadLetter(call.letter(item), reason) for item in call.items)

    def _halve(self, call: Call) -> None:
        """Put two calls in its place, each with half of the items."""
        self._calls.popleft()
        middle = len(call.items) // 2
        for half in (call.items[middle:], call.items[:middle]):
            self._calls.appendleft(replace(call, items=half))

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
    """Everything in batches within MLflow's limits. If a tag is set twice, the last value stays."""
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
