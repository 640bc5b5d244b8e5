"""How `qitos-mlflow sync` delivers segments, one after another, and says what is left."""

from __future__ import annotations

import shlex
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qitos_mlflow import _json
from qitos_mlflow.cli._show import complain, echo, plural, spinner
from qitos_mlflow.cli._spool import destination_of, experiment_of, header_of, reason_of

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Delivery, Outcome, SegmentInfo, Sink
    from qitos_mlflow.mlflow_plugin.trust import Way

LEAST_S = 2.0
"""What a server gets for an attempt, however little patience is left (seconds)."""
MORE_S = 10.0
"""How much longer than twice patience the segments of one experiment may fail (seconds)."""
NAMED = 3
"""A line names at most so many segments."""


class Sync:
    """Delivers some segments, one after another.

    A segment that is stuck, such as one with a text that a firewall refuses, does not hold up the
    others. There are two exceptions. Segments that go on with one of its traces wait for it. The
    rest of an experiment is left once its segments have failed for `2 * patience_s + MORE_S`.

    Args:
        opens: opens the sink of a segment with this header, in this way.
        way: how a segment with this header may be delivered.
        patience_s: how long a server may fail before its segments are left.
        paths: as they were given, for the command that is shown.
        default_header: for segments whose own cannot be read.
    """

    def __init__(
        self,
        opens: Callable[[Way, bytes], Sink],
        way: Callable[[dict[str, Any], SegmentInfo], Way],
        patience_s: float,
        paths: Sequence[Path] = (),
        default_header: bytes | None = None,
    ) -> None:
        from qitos_mlflow.delivery import Counts

        self.counts = Counts()
        self.outcomes: Counter[Outcome | None] = Counter()
        self.left = self._barred = 0
        """How many segments are not delivered; of these, how many only an option would deliver."""
        self.problems: dict[str, list[str]] = {}
        """Why they are not; with the stems of the segments that this is about."""
        self._opens = opens
        self._way = way
        self._patience_s = patience_s
        self._paths = paths
        self._default_header = default_header
        self._given_up: dict[str, str] = {}
        """Servers that are not tried again, each with the line."""
        self._failing_s: dict[tuple[str, str | None], float] = defaultdict(float)
        """How long the segments of an experiment have failed since the last one got on."""
        self._stuck: dict[str, str] = {}
        """The traces of stuck segments, each with the segment."""

    @property
    def again(self) -> str:
        """The command that goes on."""
        return shlex.join(["qitos-mlflow", "sync", *map(str, self._paths)])

    def run(self, segments: Sequence[SegmentInfo], ended: threading.Event) -> None:
        """Deliver `segments` until `ended`, and say how far it is if stdout is a terminal."""
        self.left, total = len(segments), plural(sum(s.waiting for s in segments), "record")
        with spinner(f"0 of {total}") as show:

            def moved() -> bool:
                show(f"{self.counts.delivered + self.counts.dead_letters} of {total}")
                return not ended.is_set()

            for segment in segments:
                try:
                    self._deliver(segment, moved, ended)
                except OSError as error:
                    self._note(f"it cannot be read: {reason_of(error)}", segment)
                if ended.is_set():
                    break

    def last_words(self) -> str:
        """The line of a process that a signal ends."""
        done = plural(self.counts.delivered, "record")
        return f"{done} delivered, {plural(self.left, 'segment')} not; go on with: {self.again}"

    def _note(self, problem: str, segment: SegmentInfo | None = None) -> None:
        stems = self.problems.setdefault(problem, [])
        if segment is not None:
            stems.append(segment.paths.stem)

    def _note_damage(self, segment: SegmentInfo) -> None:
        part = shlex.quote(str(segment.paths.parts()[0][1]))
        command = f"qitos-mlflow sync --tracking-uri URI {part}"
        self._note(f"its header is damaged, so give its destination: {command}", segment)

    def _deliver(
        self, segment: SegmentInfo, moved: Callable[[], bool], ended: threading.Event
    ) -> None:
        """Deliver a segment, or note why that is not possible."""
        from qitos_mlflow.delivery import Delivery, Outcome, take

        if isinstance(segment.error, (PermissionError, IsADirectoryError)):
            raise segment.error  # This is no loss: another user may deliver it.
        header, instead = header_of(segment), self._default_header
        if segment.head.caller is not None and not header and instead is None:
            self._note_damage(segment)
            return
        way = self._way(header, segment)
        to = destination_of(header, way.uri)
        if to in self._given_up or self._must_not(segment, way, to) or self._goes_on(segment):
            return
        experiment = experiment_of(segment)
        key = to, experiment
        if self._failing_s[key] > 2 * self._patience_s + MORE_S:
            self._note(f"{to} has not taken others of experiment {experiment!r}", segment)
            return

        def opens(found: bytes) -> Sink:
            return self._opens(way, found if header or instead is None else instead)

        taken = take(segment.paths, opens, self.counts, instead)
        outcome = taken if isinstance(taken, Outcome) else self._send(taken, key, moved, ended)
        self.outcomes[outcome] += 1
        if outcome is Outcome.UNREADABLE:
            self._note_damage(segment)
        elif outcome is not None or not isinstance(taken, Delivery):
            self.left -= 1
        elif not ended.is_set():
            self._explain(segment, taken, way, key)

    def _explain(
        self, segment: SegmentInfo, taken: Delivery, way: Way, key: tuple[str, str | None]
    ) -> None:
        """Note why a segment is not delivered, and whether others have a chance."""
        from qitos_mlflow.cli._server import ask

        (to, experiment), problem = key, str(taken.circuit.problem)
        if taken.circuit.hopeless:
            self._given_up[to] = problem
        elif (answer := ask(way.uri, trusted=way.trusted)).reachable is False:
            self._given_up[to] = f"{to} does not work: {answer.detail}"
        if to in self._given_up:
            self._note(self._given_up[to])
            return
        self._stuck |= dict.fromkeys(_traces_of(segment), segment.paths.stem)
        if not way.trusted and problem.startswith(("HTTP 401", "HTTP 403")):
            problem = f"{problem}. No credentials were sent: they go to MLFLOW_TRACKING_URI only"
        of = "" if experiment is None else f" of experiment {experiment!r}"
        self._note(f"{to} does not take its data{of}: {problem}", segment)

    def _must_not(self, segment: SegmentInfo, way: Way, to: str) -> bool:
        """Whether only the user may say that the segment is delivered; then note how."""
        if way.needs:
            self._barred += 1
            command = ["qitos-mlflow", "sync", *way.needs.split(), *map(str, self._paths)]
            self._note(
                f"not delivered to {to}, because another user may have written it: it is outside "
                "your own spool, or a file of it is another user's. If you trust its author, run: "
                + shlex.join(command),
                segment,
            )
        return bool(way.needs)

    def _goes_on(self, segment: SegmentInfo) -> bool:
        """Whether it goes on with a trace of a stuck segment, which must come first."""
        if not self._stuck:
            return False
        first = [self._stuck[one] for one in _traces_of(segment) if one in self._stuck]
        if first:
            self._note(f"it goes on with a trace of segment {first[0]}, so it waits", segment)
        return bool(first)

    def _send(
        self,
        delivery: Delivery,
        key: tuple[str, str | None],
        moved: Callable[[], bool],
        ended: threading.Event,
    ) -> Outcome | None:
        """Send a segment; None if nothing was accepted for too long."""
        from qitos_mlflow.delivery.segment_transfer import SEND_TIMEOUT_S

        outcome, circuit = None, delivery.circuit
        with closing(delivery):
            while outcome is None and not circuit.hopeless:
                patience_s = max(0.0, self._patience_s - self._failing_s[key])
                left_s = patience_s - circuit.failing_s
                if circuit.problem is not None and not left_s > 0:  # Nor NaN.
                    break
                # A server may ask for minutes. The last attempt is made when patience ends.
                ended.wait(max(0.0, min(circuit.delay_s, left_s)))
                if not moved():
                    break
                outcome = delivery.step(max(LEAST_S, min(SEND_TIMEOUT_S, left_s)))
                if circuit.got_on:
                    self._failing_s[key] = 0.0
        self._failing_s[key] += circuit.failing_s
        return outcome

    def show(self) -> None:
        """Print what was delivered, what was not, and the next step."""
        from qitos_mlflow.delivery import Outcome

        counts = self.counts
        done, busy = self.outcomes[Outcome.FINISHED], self.outcomes[Outcome.BUSY]
        echo(
            f"{plural(counts.delivered, 'record')} delivered, {plural(done, 'segment')} finished"
            + (f", {busy} being delivered by other processes" if busy else "")
        )
        if refused := counts.dead_letters - counts.put_off:
            echo(
                f"{plural(refused, 'record')} refused by the server or damaged; "
                "the reasons: qitos-mlflow status"
            )
        for problem, stems in self.problems.items():
            complain(f"{_named(stems)}{problem}")
        left = [plural(self.left, "segment")] if self.left else []
        left += [plural(counts.put_off, "record")] if counts.put_off else []
        if left:
            helps = counts.put_off or self.left > self._barred
            again = f"; run it again later: {self.again}" if helps else ""
            complain(f"{' and '.join(left)} not delivered{again}", own=True)


def _named(stems: Sequence[str]) -> str:
    if not stems:
        return ""
    more = len(stems) - NAMED
    shown = ", ".join(stems[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{'segments' if len(stems) > 1 else 'segment'} {shown}: "


def _traces_of(segment: SegmentInfo) -> set[str]:
    """The traces of the records that wait. Reads them."""
    from qitos_mlflow.delivery import waiting_records

    found = set()
    for record in waiting_records(segment.paths):
        with suppress(ValueError, KeyError, TypeError):
            found.add(str(_json.loads_foreign(record)["trace_id"]))
    return found
