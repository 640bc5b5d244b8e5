"""What the agent's side keeps of each trace while it goes; the plugin alone reads and writes it.

Bounded by what is going: nothing here grows with a trace but one number for each open span, and
one id for each thread.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from qitos_mlflow.delivery import Pipeline
from qitos_mlflow.mlflow_plugin.fluent.active_run import ActiveRun
from qitos_mlflow.mlflow_plugin.fluent.autolog_spans import AutologSpans
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun


@dataclass
class OpenTrace:
    """One trace, as one processor logs it.

    Attributes:
        id: in its records and on the server; see `free_id`.
        pipeline: where its records go.
        content: whether they hold inputs and outputs.
        active: its run as MLflow's active run.
        run: its run, once there is one.
        nesting: has MLflow's own spans below its spans.
        handling: the exception being handled when it started: not a failure of its own.
        steps: of each open span, the agent's step it belongs to.
        awaits_root: its first span is to be announced.
        recorded: spans that were taken.
        dropped: spans that were not, by reason.
        lost: other records that were not, by reason.
        late: spans that ended after it.
        ended: nothing but late spans is to come.
        end_told: the host has told of its end.
        over_s: when the record of its end had been offered (monotonic).
    """

    id: str
    pipeline: Pipeline
    content: bool
    active: ActiveRun
    run: PendingRun
    nesting: AutologSpans | None
    handling: BaseException | None
    steps: dict[str, int | None] = field(default_factory=dict)
    awaits_root: bool = False
    recorded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    late: int = 0
    ended: bool = False
    end_told: bool = False
    over_s: float | None = None
    _here: threading.local = field(default_factory=threading.local)

    # Where the same processor was added twice, it is told of everything twice in a row.

    def begin_span(self, span: Any) -> bool:
        """Take note of a span and the agent's step it belongs to; False where that is done."""
        if span.span_id in self.steps:
            return False
        # The outermost step counts, so that charts line up with nested agents too.
        step = self.steps.get(span.parent_span_id)
        if step is None and span.data.type == "step":
            step = span.data.step_number
        self.steps[span.span_id] = step
        return True

    def has_just_ended(self, span: Any) -> bool:
        """Whether `span` was the last one to end on this thread, and has not begun again."""
        if span.span_id in self.steps:
            return False
        # With the time, as ids that the user gives may be there twice.
        return getattr(self._here, "ended", None) == (span.span_id, span.started_at)

    def end_span(self, span: Any) -> int | None:
        """Take note of a span's end; returns the agent's step it belongs to, None for none."""
        self._here.ended = (span.span_id, span.started_at)
        step = self.steps.pop(span.span_id, None)
        if step is None:
            step = self.steps.get(span.parent_span_id)
        if step is None and span.data.type == "step":
            step = span.data.step_number
        return step


going: weakref.WeakValueDictionary[tuple[str | None, str], OpenTrace] = (
    weakref.WeakValueDictionary()
)
"""All that go in this process, by tracking URI and id."""


def free_id(uri: str | None, trace_id: str) -> str:
    """`trace_id`, or while a trace with that id is going to the same server, another one like it.

    Run and trace are found on a server by it: two processors must not take each other's.
    """
    names = chain([trace_id], (f"{trace_id}~{number}" for number in count(2)))
    return next(n for n in names if (other := going.get((uri, n))) is None or other.ended)
