"""What MLflow has around a trace that begins: the run it is part of, and MLflow's own experiment.

Looked up once for each trace, on the agent's thread, in this process only: nothing here connects to
a server or imports mlflow. The sink later asks the server what only that knows: whether a run
exists, in which experiment it is, and whether it was still open.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, NamedTuple

from qitos_mlflow._guard import shield, warn
from qitos_mlflow.mlflow_plugin.fluent.active_run import same_place
from qitos_mlflow.mlflow_plugin.fluent.origins import (
    inherited_run_id,
    mlflow_in_use,
    open_run,
    trial,
)
from qitos_mlflow.mlflow_plugin.mapping.ids import otel_trace_id

RATIO_VARIABLE = "MLFLOW_TRACE_SAMPLING_RATIO"


class Surroundings(NamedTuple):
    """What is known of a trace's place in MLflow as it begins.

    All fields but `parent_run_id` are fields of `RunSettings`, too.

    Attributes:
        parent_run_id: the run that its own run is a child of.
        inherited_run_id: a run of another process, which is the parent if it is still open.
        experiment_of: the run whose experiment the server is asked for: the parent or the inherited
            run.
        experiment_id: MLflow's id of an experiment: that of a parent which is open here, or of the
            one that MLflow itself uses.
        experiment_name: the name of the one that MLflow itself uses.
    """

    parent_run_id: str | None = None
    inherited_run_id: str | None = None
    experiment_of: str | None = None
    experiment_id: str | None = None
    experiment_name: str | None = None


def surroundings(
    uri: str | None, parent_run_id: str | None = None, *, same: bool | None = None
) -> Surroundings:
    """What is around a trace that begins on this thread and goes to `uri`. Never raises.

    Args:
        uri: None is MLflow's default.
        parent_run_id: the parent that is configured; it comes before all others.
        same: what `same_place` says of `uri`, if that is known.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or None
    parent, inherited, experiment_id = parent_run_id, None, None
    with shield("surroundings"):
        if same_place(uri) if same is None else same:  # Elsewhere, ids mean something else.
            run = None if parent else open_run()
            if run is not None:
                return Surroundings(run.run_id, None, None, run.experiment_id, name)
            # `mlflow run` sets it for the process that it starts.
            parent = parent or os.environ.get("MLFLOW_RUN_ID") or None
            inherited = None if parent else inherited_run_id()
            own = getattr(mlflow_in_use(), "_active_experiment_id", None)
            experiment_id = own or os.environ.get("MLFLOW_EXPERIMENT_ID") or None
    return Surroundings(parent, inherited, parent or inherited, experiment_id, name)


def is_sampled(qitos_trace_id: str) -> bool:
    """Whether the tree of this trace is logged, by ``MLFLOW_TRACE_SAMPLING_RATIO``.

    The answer is the same for all that log the trace: the last 56 bits of its id decide, which are
    random in a UUID, too (W3C Trace Context, level 2). Inside a span that MLflow's own sampler has
    left out, the tree is not logged.
    """
    if _is_left_out():
        return False
    text = os.environ.get(RATIO_VARIABLE)
    if not text:
        return True
    with contextlib.suppress(ValueError):
        ratio = float(text)
        if 0.0 <= ratio <= 1.0:
            return int.from_bytes(otel_trace_id(qitos_trace_id)[9:], "big") < ratio * 2**56
    warn(
        "surroundings.ratio",
        "%s=%r is not a number from 0 to 1, so all traces are logged",
        RATIO_VARIABLE,
        text,
    )
    return True


def _is_left_out() -> bool:
    if mlflow_in_use() is None:
        return False
    with shield("surroundings.sampled"):
        provider: Any = sys.modules.get("mlflow.tracing.provider")
        # Without a context of MLflow's own it may be a span of the program's own tracer. Without
        # anything in it, there is no span.
        if provider and provider.get_current_context():
            around = provider.get_current_otel_span().get_span_context()
            # One that MLflow has made while its tracing is off has none.
            return bool(around and around.is_valid and not around.trace_flags.sampled)
    return False


def is_trial() -> bool:
    """Whether `mlflow.genai.evaluate` is trying its `predict_fn` on this thread, without a trace.

    Threads that the trial starts count. MLflow counts the spans of the trial. If there are none, it
    puts one around each row. So a trial that begins with an agent is made to count none: otherwise
    each agent of a row would be a trace, and MLflow would delete all but the last.
    """
    counting = trial()
    if counting is not None:
        with shield("surroundings.trial"):
            [counter] = (cell.cell_contents for cell in counting.__closure__)
            if counter.count == 0:
                counter.count = _Uncounted()
    return counting is not None


class _Uncounted(int):
    """Zero, whatever is added."""

    def __add__(self, other: int) -> _Uncounted:
        return self
