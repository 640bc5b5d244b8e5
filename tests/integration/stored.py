"""What a server has stored, read straight from its database, and whether it is what was recorded.

The public client shows the same, but takes seconds for what the soak tests compare; and here a
server that is down, or locked, can be looked into as well.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qitos_mlflow.mlflow_plugin.mapping.ids import span_id, trace_id
from tests.integration.agents import Report

ONE_A_SPAN = {
    "step": ("step/number", "step/latency_ms"),
    "generation": (
        "generation/prompt_tokens",
        "generation/completion_tokens",
        "generation/total_tokens",
        "generation/latency_ms",
    ),
    "tool": ("tool/latency_ms",),
    "critic": ("critic/score",),
}
"""Metrics that get one point from each span of a type."""


class NotExactlyOnce(AssertionError):
    """Something is missing or there twice: never chance, so noxfile.py does not run it again."""


@contextmanager
def never_rerun() -> Iterator[None]:
    """Assertions that fail in here, or in a function decorated with it, are `NotExactlyOnce`."""
    try:
        yield
    except AssertionError as error:
        raise NotExactlyOnce(str(error)) from error


@dataclass
class StoredRun:
    """One run with everything that hangs on it."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    points: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    """(step, value) of every point of each metric, in the order of their steps."""
    traces: list[str] = field(default_factory=list)
    """MLflow traces that belong to it."""
    spans: list[str] = field(default_factory=list)
    """Ids of the spans of these traces."""
    open_spans: int = 0
    """Of these, how many have no end."""

    @property
    def trace_id(self) -> str:
        """QitOS's id of the trace it is about."""
        return self.tags["qitos.trace_id"]


def stored_runs(database: Path, experiment_name: str) -> list[StoredRun]:
    """The runs of an experiment, in the order of their start; deleted ones are not there."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as store:
        store.execute("BEGIN")  # All of it as of one moment, while agents go on.
        runs = {
            row[0]: StoredRun(*row)
            for row in store.execute(
                "SELECT run_uuid, runs.name, status FROM runs JOIN experiments USING "
                "(experiment_id) WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' "
                "ORDER BY start_time",
                [experiment_name],
            )
        }
        if not runs:
            return []
        chosen = (
            "(SELECT run_uuid FROM runs JOIN experiments USING (experiment_id) "
            "WHERE experiments.name = ? AND runs.lifecycle_stage = 'active')"
        )
        for run_id, key, value in store.execute(
            f"SELECT run_uuid, key, value FROM tags WHERE run_uuid IN {chosen}", [experiment_name]
        ):
            runs[run_id].tags[key] = value
        for run_id, key, value in store.execute(
            f"SELECT run_uuid, key, value FROM params WHERE run_uuid IN {chosen}", [experiment_name]
        ):
            runs[run_id].params[key] = value
        for run_id, key, step, value in store.execute(
            "SELECT run_uuid, key, step, value FROM metrics WHERE run_uuid IN "
            f"{chosen} ORDER BY step, timestamp",
            [experiment_name],
        ):
            runs[run_id].points[key].append((step, value))
        of_trace: dict[str, StoredRun] = {}
        for trace, run_id in store.execute(
            "SELECT request_id, value FROM trace_request_metadata "
            f"WHERE key = 'mlflow.sourceRun' AND value IN {chosen}",
            [experiment_name],
        ):
            of_trace[trace] = runs[run_id]
            runs[run_id].traces.append(trace)
        for trace, span, end in store.execute(
            "SELECT trace_id, span_id, end_time_unix_nano FROM spans JOIN experiments USING "
            "(experiment_id) WHERE experiments.name = ?",
            [experiment_name],
        ):
            if (run := of_trace.get(trace)) is not None:
                run.spans.append(span)
                run.open_spans += end is None
        return list(runs.values())


def runs_of(report: Report, runs: Iterable[StoredRun]) -> list[StoredRun]:
    """Of these runs, those of one agent and the processes it started."""
    return [run for run in runs if run.trace_id in report.trace_ids()]


def stray_traces(database: Path, experiment_name: str) -> list[str]:
    """MLflow traces of an experiment that belong to none of its runs; there should be none."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as store:
        found = store.execute(
            "SELECT request_id FROM trace_info JOIN experiments USING (experiment_id) "
            "WHERE experiments.name = ? AND request_id NOT IN (SELECT request_id FROM "
            "trace_request_metadata JOIN runs ON value = run_uuid WHERE key = 'mlflow.sourceRun')",
            [experiment_name],
        )
        return [row[0] for row in found]


@never_rerun()
def assert_exactly_once(
    report: Report, runs: Iterable[StoredRun], *, status: str = "FINISHED"
) -> None:
    """Every trace of an agent process is one run, with each of its spans and points once.

    Args:
        report: of a process that was not killed.
        runs: all runs of its experiment.
        status: of every run.
    """
    runs = list(runs)
    assert sorted(run.trace_id for run in runs) == sorted(report.trace_ids())
    ended = spans_by_trace(report)
    for run in runs:
        assert run.status == status, run
        assert_whole(run, ended[run.trace_id])


@never_rerun()
def assert_whole(run: StoredRun, spans: Mapping[str, str]) -> None:
    """A run has exactly these spans (see `spans_by_trace`), and each of their points once."""
    kinds = list(spans.values())
    assert run.traces == [trace_id(run.trace_id)], run
    assert sorted(run.spans) == sorted(spans), run
    assert not run.open_spans, run
    _assert_points(run, kinds)
    assert ledger(run) == (len(spans), len(spans), ""), run.tags


@never_rerun()
def assert_survived_kill(report: Report, runs: Iterable[StoredRun]) -> float:
    """What a killed process recorded is there once, but for the last moments, and its run ended.

    Args:
        report: of the killed process.
        runs: the runs that may be of this process, no others.

    Returns:
        How long before the last event the oldest one that is lost was recorded (seconds).
    """
    found = {run.trace_id: run for run in runs}
    recorded = spans_by_trace(report)
    last_s = report.truth[-1]["time_s"]
    lost_s = [0.0]
    ends = {e["trace_id"] for e in report.truth if e["callback"] == "on_trace_end"}
    assert found.keys() <= set(report.trace_ids())
    for event in report.truth:
        run = found.get(event["trace_id"])
        if event["callback"] == "on_trace_start":
            lost = run is None
        elif event["callback"] == "on_span_end":
            span = span_id(event["trace_id"], event["span_id"]).hex()
            lost = run is None or span not in run.spans
        else:
            continue
        if lost:
            lost_s.append(last_s - event["time_s"])
    for trace, run in found.items():
        spans = recorded[trace]
        if run.status == "FINISHED":
            assert trace in ends
            assert_whole(run, spans)
            continue
        assert run.status == "KILLED", run
        assert run.tags["qitos.killed"], run
        arrived = [kind for span, kind in spans.items() if span in run.spans]
        # The tree's root is there from the beginning; it need not have ended.
        assert len(set(run.spans) - spans.keys()) <= 1, run
        assert len(set(run.spans)) == len(run.spans), run
        assert run.traces == [trace_id(trace)], run
        _assert_points(run, arrived)
        # The tree's root is there although the record of its end, an agent's, may be lost.
        count = len(arrived)
        assert ledger(run) in {(n, n, "") for n in (count, count - arrived.count("agent"))}, (
            run.tags
        )
    return max(lost_s)


def _assert_points(run: StoredRun, kinds: list[str]) -> None:
    """Each span of these types has given one point of each metric, each at a step of its own."""
    for kind, keys in ONE_A_SPAN.items():
        for key in keys:
            points = run.points[key]
            assert len(points) == kinds.count(kind), (key, points)
            assert len({step for step, _ in points}) == len(points), (key, points)
    assert [value for _, value in run.points["total_steps"]] == [kinds.count("step")], run


@never_rerun()
def assert_losses_are_counted(report: Report, runs: Iterable[StoredRun], reason: str) -> None:
    """Each run of an agent process says how many spans it lost; some were, for this reason.

    A burst may also have been more than the queue holds.
    """
    recorded = spans_by_trace(report)
    runs = list(runs)
    assert sorted(run.trace_id for run in runs) == sorted(report.trace_ids())
    lost: dict[str, int] = defaultdict(int)
    for run in runs:
        count, delivered, dropped = ledger(run)
        assert count == len(recorded[run.trace_id])
        assert len(set(run.spans)) == len(run.spans), run
        # Of the tree's root, the first version is there also where the last one is lost.
        assert len(set(run.spans) & recorded[run.trace_id].keys()) - delivered in (0, 1), run
        losses = dict(loss.split("=") for loss in dropped.split(", ") if loss)
        assert sum(map(int, losses.values())) == count - delivered, run.tags
        for why, number in losses.items():
            lost[why] += int(number)
    assert lost.keys() <= {reason, "queue_full"}, lost
    assert lost[reason] > 0, lost


def spans_by_trace(report: Report) -> Mapping[str, dict[str, str]]:
    """The spans that ended in an agent process: for each trace, MLflow's span ids and the types."""
    spans: dict[str, dict[str, str]] = defaultdict(dict)
    for end in report.spans():
        trace = end["trace_id"]
        spans[trace][span_id(trace, end["span_id"]).hex()] = end["type"]
    return spans


def ledger(run: StoredRun) -> tuple[int, int, str]:
    """What the run says of its spans: recorded, delivered, and the losses by reason."""
    return (
        int(run.tags["qitos.spans.recorded"]),
        int(run.tags["qitos.spans.delivered"]),
        run.tags.get("qitos.spans.dropped", ""),
    )
