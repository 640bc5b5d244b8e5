"""A batch of records as calls on a server, made in order and resumed at the one that failed.

Receives `Call`s from the sink and hands back dead letters. A call that the server refuses for good
is split until only the offending item is left out and the rest is delivered.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow import _json
from qitos_mlflow.delivery import DeadLetter, OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.mapping.attachments import Attachment
from qitos_mlflow.mlflow_plugin.mapping.shorter import shorter
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, PutOff, Refused, TooLarge
from qitos_mlflow.mlflow_plugin.sink.operations import Operations
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState, Waiting

FAIR_SHARE = 0.1
"""Share of the given time. With less left no further call begins, lest it fail for that alone."""
SPARE = 2.0
"""Nor with less than so many times what the slowest call before has taken."""

FAILING_TRIES = 4
"""A call that fails is tried as it is at least this often, ..."""
FAILING_S = 20.0
"""... and at least for this time (seconds), which is shorter than `qitos-mlflow sync` waits.

Then, if the call makes the server itself fail and the server is well otherwise, it is made in
halves until the item to blame is found. (A server without its database fails on every call.) If the
call is not answered, it is made in halves, too: it may be too large for its time, or a firewall may
block one item of it.
"""


@dataclass
class Call:
    """One request about a trace: `send` with as many of `items` as are given.

    Attributes:
        trace: what the request is about. If the server refuses its run, no other call is made.
        send: makes the request; gets the trace, the items and a timeout in seconds.
        items: what the request carries; a refusal is traced to single ones by splitting.
        checked: the server has said that it does not refuse the run.
        cut: its item has been made smaller.
        alone: it failed as part of a request for several traces.
        failures: for each kind of failure how often the call has failed so, and since when
            (seconds, monotonic clock); its halves go on counting.
    """

    trace: TraceState
    send: Callable[[TraceState, Sequence[Any], float], None]
    items: Sequence[Any]
    checked: bool = False
    cut: bool = False
    alone: bool = False
    failures: dict[type[Exception], tuple[int, float]] = field(default_factory=dict)

    def fails_on(self, kind: type[Exception]) -> bool:
        """Count one more failure; True if there were enough of them over enough time."""
        now = time.monotonic()
        times, since = self.failures.get(kind, (0, now))
        self.failures[kind] = (times + 1, since)
        return times + 1 >= FAILING_TRIES and now - since >= FAILING_S

    def shares_request(self, other: Call) -> bool:
        """Whether one request may carry both: spans of traces in one experiment."""
        spans = all(isinstance(call.items[0], Span) and not call.alone for call in (self, other))
        runs = self.trace.run, other.trace.run
        return spans and len({run.experiment_id for run in runs if run}) == 1


class CallList:
    """The calls of a batch that are left to be made. Used by one thread.

    Args:
        operations: asked about the run and the server when a call fails.
        calls: to be made, in order.
        dead: dead letters from before.
        accepted: that of the list before.
    """

    def __init__(
        self,
        operations: Operations,
        calls: Iterable[Call] = (),
        dead: Iterable[DeadLetter] = (),
        accepted: Mapping[Any, tuple[TraceState, Any]] | None = None,
    ) -> None:
        self._operations = operations
        self._calls = deque(calls)
        self._dead = list(dead)
        self.refused: dict[str, str] = {}
        """The ids of traces whose run the server refuses, each with the reason."""
        self.accepted = dict(accepted or {})
        """For each kind of item one that the server has taken, with its trace."""

    def send(self, timeout_s: float) -> list[DeadLetter]:
        """Make the remaining calls; returns what was refused for good.

        Raises:
            RetryLater: the server cannot be reached; the next `send` goes on with the call that
                failed.
            OutOfTime: some calls were made, and `timeout_s` is over.
        """
        deadline = time.monotonic() + timeout_s
        answered, least_s = False, FAIR_SHARE * timeout_s
        while self._calls:
            left = deadline - time.monotonic()
            if answered and left < least_s:
                raise OutOfTime
            if left <= 0:
                raise RetryLater("out of time", 0.0)
            try:
                self._make(self._calls[0], min(left, self._operations.request_timeout_s))
            except RetryLater as later:
                later.got_on = answered
                raise
            answered = True
            least_s = max(least_s, SPARE * (left - (deadline - time.monotonic())))
        return self._dead

    def _make(self, call: Call, timeout_s: float) -> None:
        together = [*takewhile(call.shares_request, self._calls)]
        if len(together) > 1:
            self._make_together(together, timeout_s)
            return
        try:
            call.send(call.trace, call.items, timeout_s)
        except Refused as refusal:
            self._operations.failed()
            self._give_up(call, refusal, timeout_s)
        except Poisoned as failure:
            if not call.fails_on(Poisoned):
                raise RetryLater(str(failure)) from failure
            if not self._operations.server_is_well(call.trace, timeout_s):
                del call.failures[Poisoned]
                raise RetryLater(f"the server is out of order: {failure}") from failure
            self._give_up(call, failure, timeout_s)
        except RetryLater:
            self._operations.failed()
            if call.fails_on(RetryLater) and len(call.items) > 1:
                self._halve(call)
            raise
        else:
            self._made(self._calls.popleft())

    def _make_together(self, calls: Sequence[Call], timeout_s: float) -> None:
        """Write spans of several traces in one request; if that fails, each trace is on its own."""
        try:
            spans = [span for call in calls for span in call.items]
            for call in calls:
                self._operations.confirm_run(call.trace, timeout_s)
            calls[0].send(calls[0].trace, spans, timeout_s)
        except (Refused, Poisoned, RetryLater) as failure:
            self._operations.failed()
            for call in calls:
                call.alone = True
            if isinstance(failure, RetryLater):
                raise
        else:
            for _ in calls:
                self._made(self._calls.popleft())

    def _give_up(self, call: Call, failure: Exception, timeout_s: float) -> None:
        """Leave the call out: one of several items, or the whole trace if its run is refused."""
        reason = str(failure)
        if call.trace.run is None:
            self._create_bare(call, failure, timeout_s)
            return
        if not call.checked:
            # Before its items are tried one by one: a run that was deleted takes none of them, and
            # a server that cannot write at all blames none of them.
            try:
                self._operations.check_run(call.trace, timeout_s)
            except (Poisoned, TooLarge) as whole:
                raise RetryLater(f"not even a small request: {whole}") from whole
            except Refused as whole:
                self._bury(call.trace, whole)
                return
            call.checked = True
        if len(call.items) > 1:
            self._halve(call)
        elif isinstance(failure, TooLarge) and (cut := shorter(call.items[0])) is not None:
            call.trace.facts.lost["too_large"] += not call.cut
            call.items, call.cut = [cut], True
        elif isinstance(failure, Poisoned) and not self._is_to_blame(call, timeout_s):
            raise RetryLater(f"the server may fail on all others, too: {failure}") from failure
        else:
            self._calls.popleft()
            again = isinstance(failure, PutOff)
            if call.send == self._operations.write_artifact:
                call.trace.facts.lost["artifact_put_off" if again else "artifact_refused"] += 1
            letters = [_letter(call.trace, item, again=again) for item in call.items]
            header = self._operations.header if again else b""
            self._dead.extend(DeadLetter(letter, reason, header) for letter in letters)

    def _is_to_blame(self, call: Call, timeout_s: float) -> bool:
        """Whether the server takes another item of the kind, and then still fails on this one.

        If there is no other one, the item waits.
        """
        kind = self._kind(call, call.items[0])
        others = [self.accepted[kind]] if kind in self.accepted else []
        for other in self._calls:
            if other is not call:
                others += [(other.trace, one) for key, one in self._shown(other) if key == kind]
        if not others:
            return False
        # A different one each time, for it may be bad itself.
        trace, item = others[call.failures[Poisoned][0] % len(others)]
        try:
            call.send(trace, [item], timeout_s)
        except (Poisoned, Refused):
            return False
        try:
            call.send(call.trace, call.items, timeout_s)
        except (Poisoned, Refused):
            return True
        return False

    def _kind(self, call: Call, item: Any) -> tuple[Any, Any]:
        """A server may take tags and no metrics, runs and no spans."""
        return call.send, item[0] if call.send == self._operations.log else None

    def _shown(self, call: Call) -> list[tuple[Any, Any]]:
        """The items that the server has taken if the call succeeds, each with its kind."""
        if call.send == self._operations.write_info and not call.trace.facts.ended:
            return []  # It may have been given up without a word.
        return [(self._kind(call, item), item) for item in call.items]

    def _made(self, call: Call) -> None:
        """Keep an item of each kind, but no file. To send it again changes nothing."""
        if call.send != self._operations.write_artifact:
            trace = replace(call.trace, waiting=Waiting())
            self.accepted.update((kind, (trace, item)) for kind, item in self._shown(call))

    def _create_bare(self, call: Call, failure: Exception, timeout_s: float) -> None:
        """Create the run without its tags, if these may be the reason; they follow one by one."""
        if isinstance(failure, Refused) and not isinstance(failure, TooLarge):
            self._bury(call.trace, failure)  # In the server's own words.
            return
        try:
            self._operations.create_run(call.trace, [], timeout_s)
        except (Refused, Poisoned) as whole:
            raise RetryLater(f"no run can be created: {whole}") from whole
        # Those of the start are among the calls that follow.
        start = call.trace.facts.start_tags
        tags = [("tag", tag) for tag in call.trace.creation_tags() if tag[0] not in start]
        self._calls.popleft()
        if tags:
            self._calls.appendleft(Call(call.trace, self._operations.log, tags))

    def _halve(self, call: Call) -> None:
        """Put two calls in its place, each with half of the items."""
        self._calls.popleft()
        middle = len(call.items) // 2
        for half in (call.items[middle:], call.items[:middle]):
            self._calls.appendleft(replace(call, items=half))

    def _bury(self, trace: TraceState, failure: Refused) -> None:
        reason = self.refused[trace.facts.trace_id] = str(failure)
        header = self._operations.header if isinstance(failure, PutOff) else b""
        self._calls = deque(call for call in self._calls if call.trace is not trace)
        self._dead.extend(DeadLetter(record, reason, header) for record in trace.waiting.records)


def _letter(trace: TraceState, item: Any, *, again: bool) -> bytes:
    """The dead letter of one item: enough to log it by hand, or its record, to send it again."""
    if isinstance(item, dict) and item.get("kind") == "assessment":
        return _json.dumps(item)
    about: dict[str, Any] = {"trace_id": trace.facts.trace_id}
    about["run_id"] = trace.run and trace.run.run_id
    if isinstance(item, Attachment):
        about |= {"kind": "pictures", "pictures": {item.id: b64encode(item.content).decode()}}
        about["settings"] = trace.facts.settings
    elif again:
        about |= {"kind": "artifact", "path": item[0], "content": item[1]}
        about["settings"] = trace.facts.settings
    elif isinstance(item, Span):
        from google.protobuf.json_format import MessageToDict

        trace.count_refused(item)
        about["item"] = MessageToDict(item)
    else:
        about["item"] = item
    return _json.dumps(about, default=_file_text)


def _file_text(content: bytes) -> str:
    return content.decode("utf-8", "replace")
