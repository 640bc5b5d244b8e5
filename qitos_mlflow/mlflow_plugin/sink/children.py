"""The numbers of a run that has others below it, computed from what the server has.

All children count, whichever process has delivered them. So the numbers are right in the end,
whichever process writes them last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qitos_mlflow import _json
from qitos_mlflow._guard import report, warn
from qitos_mlflow.delivery import OutOfTime, RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric, RunData, RunRef, StoredRun
from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import (
    PREFIX,
    STOP,
    Attempt,
    attempts,
    lean,
    table,
    totals,
)
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import PARENT_TAG, TREE_TAG
from qitos_mlflow.mlflow_plugin.server.transport import (
    MAX_LINKED,
    Oversized,
    Poisoned,
    Refused,
    Transport,
    Unanswered,
)
from qitos_mlflow.mlflow_plugin.sink.experiments import Experiments
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState

EVERY_S = 10.0
"""Least time between two looks at the children of one parent (seconds), ..."""
PAUSE = 20.0
"""... or so many times what the last one took."""
PAGE = 200
"""Children read in one request; half as many once an answer is too large or takes too long."""
MOST_RUNS = 100_000
"""Most children of one parent, ..."""
MOST_CHARS = 32 * 1024 * 1024
"""... and most text that is kept of them: what 10,000 of them have, each with 3,000 characters."""
LEAST_S = 0.05
"""With less time left, no further page is read (seconds)."""

EXPECTED_TAG = "qitos.evaluation.expected"
"""How many attempts there are to be."""
FILE_TRIES = 3
"""Failures in a row after which the table is left out: all in it is on the server."""
RESULTS = "evaluation_results.json"
SHOWN = {"mlflow.loggedArtifacts": f'[{{"path": "{RESULTS}", "type": "table"}}]'}
"""Has MLflow's pages show the file as a table."""


class TooMany(RetryLater):
    """There are more children than are read; or the server sends pages without an end."""


@dataclass
class Due:
    """A parent whose children have changed.

    Attributes:
        experiments: where they are.
        evaluation: the id of the evaluation that it is; empty for a run of the user's.
        traces: MLflow's ids of traces that are to be shown with it.
    """

    experiments: list[str] = field(default_factory=list)
    evaluation: str = ""
    traces: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """A look at the children of a parent, as far as it has got: it may take several requests.

    `runs`: by their ids; `size`: the characters in them.
    `stale`: children have changed since it was begun. `token`: of the next page; None: no more.
    `at_ms`: the time of the numbers: when the first page was asked for, or just after the numbers
    that the parent had then. Of several processes, the one that looks last sees all children.
    MLflow shows its numbers, also if the clock of another process is ahead.
    """

    began_s: float = field(default_factory=time.monotonic)
    at_ms: int = 0
    token: str | None = ""
    stale: bool = False
    runs: dict[str, StoredRun] = field(default_factory=dict)
    size: int = 0
    file_failures: int = 0


class Children(Experiments):
    """`Experiments` that keeps the numbers of parents. Used by one thread."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.due: dict[str, Due] = {}
        """By the parent's run id; part of the sink's state."""
        self._readings: dict[str, Reading] = {}
        self._not_before: dict[str, float] = {}
        self._page = PAGE

    def note(self, trace: TraceState) -> None:
        """A run has ended, or was judged: its parent's numbers change."""
        facts, run = trace.facts, trace.run
        parent = facts.parent or facts.start_tags.get(PARENT_TAG)
        if not parent or run is None or facts.of_evaluation:
            return
        due = self.due.setdefault(parent, Due())
        if reading := self._readings.get(parent):
            reading.stale = True
        if run.experiment_id not in due.experiments:
            due.experiments.append(run.experiment_id)
        if facts.evaluation:
            due.evaluation = str(facts.evaluation.get("id"))
            shown = facts.start_tags.get(TREE_TAG) or trace_id(facts.trace_id)
            there = trace.has_info or TREE_TAG in facts.start_tags
            if there and shown not in due.traces:
                due.traces.append(shown)

    def refresh(self, timeout_s: float, *, final: bool) -> None:
        """Write the numbers of the parents whose children have changed.

        Args:
            timeout_s: about how long this may take.
            final: no more records come. The numbers are written even if the last look was a short
                time ago, and the table is, too.

        Raises:
            RetryLater: only if `final`; call again.
        """
        deadline = time.monotonic() + timeout_s
        for run_id in list(self.due):
            if not final and time.monotonic() < self._not_before.get(run_id, 0.0):
                continue
            try:
                self.bring(run_id, deadline, final=final)
            except RetryLater:
                if final:
                    raise
                return  # It stays due.
            except Exception as error:  # noqa: BLE001 - numbers must not keep records waiting
                report("children.refresh", error)
                self.due.pop(run_id, None)
                self._readings.pop(run_id, None)

    def bring(self, run_id: str, deadline: float, *, final: bool = False) -> None:
        """Write the numbers of one parent."""
        due = self.due[run_id]
        reading = self._readings.get(run_id)
        if reading is None or (final and reading.stale):
            reading = self._readings[run_id] = Reading()
        try:
            parent = self._transport.stored_run(run_id, left_s(deadline))
            if due.evaluation and (final or parent is None):
                parent = self.settled(parent, run_id, due, left_s(deadline))
            if parent is not None:
                if not reading.token:  # Not before: children may have been adopted meanwhile.
                    earlier_ms = parent.metric_times.get(f"{PREFIX}n", 0)
                    reading.at_ms = max(time.time_ns() // 1_000_000, earlier_ms + 1)
                wanted = below(parent.ref.run_id)
                while reading.token is not None:
                    self.read(reading, wanted, due.experiments, left_s(deadline))
                found = attempts(reading.runs.values())
                self._write(parent, due, reading, found, deadline)
                if final and due.evaluation:
                    self._write_table(parent.ref, reading, found, deadline)
        except (Refused, Poisoned, TooMany) as failure:
            text = "run %s does not get the numbers of the runs below it: %s"
            warn(f"parents.{run_id}", text, run_id, failure)
        now = time.monotonic()
        self._not_before = {key: at for key, at in self._not_before.items() if at > now}
        self._not_before[run_id] = now + max(EVERY_S, PAUSE * (now - reading.began_s))
        del self._readings[run_id]
        if not reading.stale:
            del self.due[run_id]

    def read(
        self,
        reading: Reading,
        wanted: str,
        experiments: Sequence[str],
        timeout_s: float,
        kept: Callable[[StoredRun], StoredRun] = lean,
    ) -> None:
        """Read one more page of the runs that a filter wants, and keep of each what `kept` does."""
        try:
            runs, token = self._transport.search_runs(
                experiments, wanted, timeout_s, most=self._page, token=reading.token or ""
            )
        except (Oversized, Unanswered):
            self._page = max(1, self._page // 2)
            raise
        new = [kept(run) for run in runs if run.ref.run_id not in reading.runs]
        if token and not new:
            raise RetryLater("the server's pages of runs go round in circles")
        reading.runs |= {run.ref.run_id: run for run in new}
        reading.size += sum(len(text) for run in new for text in (*run.tags.values(), *run.metrics))
        if len(reading.runs) > MOST_RUNS or reading.size > MOST_CHARS:
            raise TooMany(f"there are more than {MOST_RUNS} or they say too much")
        reading.token = token or None

    def _write(
        self,
        parent: StoredRun,
        due: Due,
        reading: Reading,
        found: Sequence[Attempt],
        deadline: float,
    ) -> None:
        run_id, text = parent.ref.run_id, parent.tags.get(EXPECTED_TAG, "")
        # Of a reason for which no attempt has stopped that still counts.
        numbers = dict.fromkeys(filter(_is_stop, parent.metrics), 0.0)
        numbers |= totals(found, int(text) if text.isdecimal() else None)
        points = [Metric(key, value, reading.at_ms, 0) for key, value in numbers.items()]
        self._transport.log_batch(run_id, RunData(metrics=points), left_s(deadline))
        while due.traces:
            some = due.traces[:MAX_LINKED]
            try:
                self._transport.link_traces(run_id, some, left_s(deadline))
            except (Refused, Poisoned) as failure:  # A store without traces.
                warn("parents.link", "traces are not shown with their evaluation: %s", failure)
            del due.traces[: len(some)]

    def _write_table(
        self, run: RunRef, reading: Reading, found: Sequence[Attempt], deadline: float
    ) -> None:
        content = _json.dumps(table(found))
        try:
            self._transport.write_artifact(run, RESULTS, content, left_s(deadline))
        except (RetryLater, Refused, Poisoned) as failure:
            reading.file_failures += 1
            if isinstance(failure, RetryLater) and reading.file_failures < FILE_TRIES:
                raise
            warn("parents.table", "the table of results is not written: %s", failure)
        else:
            shown = RunData(tags=list(SHOWN.items()))
            self._transport.log_batch(run.run_id, shown, left_s(deadline))

    def settled(
        self, own: StoredRun | None, run_id: str, due: Due, timeout_s: float
    ) -> StoredRun | None:
        """The run that an evaluation's numbers go to. `Parents` overrides this."""
        return own


def below(run_id: str) -> str:
    """The filter for a run's children."""
    return f"tags.`{PARENT_TAG}` = '{run_id}'"


def _is_stop(key: str) -> bool:
    return key.startswith(f"{PREFIX}{STOP}")


def left_s(deadline: float) -> float:
    """How long until `deadline` (monotonic clock); raises `OutOfTime` if it is too short."""
    left = deadline - time.monotonic()
    if left < LEAST_S:
        raise OutOfTime
    return left
