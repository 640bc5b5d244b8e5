"""`score` and `expect`: what they take, what they refuse, where records go. No server."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow import MlflowTraceProcessor, _guard, context, expect, score, tracing
from qitos_mlflow.bridge import results
from qitos_mlflow.mlflow_plugin import feedback
from qitos_mlflow.mlflow_plugin.fluent.context import Begun
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.tracing import create_trace

Spooled = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def scores(records: Spooled) -> Spooled:
    """Close the processors, and read the assessments that were recorded."""
    return lambda: [record for record in records() if record["kind"] == "assessment"]


@dataclass
class Result:
    """As the host's: it has no hash."""

    state: Any = None


def test_each_thing_names_its_trace(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """A Trace, both ids, a context, a result, MLflow's trace."""
    attach(experiment_name="there")
    with context() as request, create_trace("agent") as trace:
        pass
    result = Result()
    results.note(result, "run", trace.trace_id)

    class Entity:
        info = type("Info", (), {"trace_id": trace_id(trace.trace_id)})

    ways = (trace, trace.trace_id, trace_id(trace.trace_id), request, result, Entity())
    for number, way in enumerate(ways):
        score(way, "n", number)
    found = scores()
    assert [record["value"] for record in found] == list(range(len(ways)))
    assert {record["trace_id"] for record in found} == {trace.trace_id}
    assert {record["settings"]["experiment_name"] for record in found} == {"there"}


def test_it_goes_wherever_the_trace_is_logged(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """Of two servers, to both; with the settings of each."""
    attach(tracking_uri="http://one.test", experiment_name="one")
    attach(tracking_uri="http://two.test", experiment_name="two")
    with create_trace("agent") as trace:
        pass
    score(trace, "correct", True)
    assert {record["settings"]["experiment_name"] for record in scores()} == {"one", "two"}


def test_an_unknown_id_goes_where_this_process_logs(
    attach: Callable[..., MlflowTraceProcessor], spool: Path, scores: Spooled
) -> None:
    """Or to the server that is given."""
    attach(tracking_uri="http://one.test")
    unknown = "tr-" + "7" * 32
    score(unknown, "correct", True)
    expect(unknown, "answer", "42", tracking_uri="http://two.test")
    found = scores()
    assert [(record["trace_id"], "settings" in record) for record in found] == [
        (unknown, False)
    ] * 2
    heads = b"".join(path.read_bytes() for path in spool.rglob("*") if path.is_file())
    assert b"http://one.test" in heads
    assert b"http://two.test" in heads


@pytest.fixture
def mode() -> Iterator[Callable[[Any], None]]:
    """Sets the host's tracing mode until the test ends."""
    provider = tracing.get_tracing_provider()
    yield provider.set_mode
    provider.set_mode(tracing.TracingMode.ENABLED)


def test_a_host_that_does_not_trace_records_nothing(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled, mode: Callable[[Any], None]
) -> None:
    """Also of a trace that was recorded before."""
    attach()
    with create_trace("agent") as trace:
        pass
    mode(tracing.TracingMode.DISABLED)
    for of in (trace, "tr-" + "7" * 32):
        score(of, "correct", True)
    assert scores() == []


@pytest.mark.parametrize("by_mode", [True, False])
def test_without_content_there_are_labels_and_numbers_only(
    attach: Callable[..., MlflowTraceProcessor],
    scores: Spooled,
    mode: Callable[[Any], None],
    by_mode: bool,
) -> None:
    """Reasons, metadata and expected texts may quote what is not to be logged."""
    attach(capture_content=by_mode)
    if by_mode:
        mode(tracing.TracingMode.ENABLED_WITHOUT_DATA)
    with create_trace("agent") as trace:
        pass
    for of in (trace, "tr-" + "7" * 32):
        score(of, "label", "good", rationale="a secret plan", metadata={"asked": "a secret plan"})
        expect(of, "answer", "a secret plan")
        expect(of, "steps", 3)
    found = scores()
    assert [(record["name"], record["value"]) for record in found] == [
        ("label", "good"),
        ("steps", 3),
    ] * 2
    assert "secret" not in str(found)


def test_what_was_not_logged_is_passed_over(
    scores: Spooled, spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A script runs on without a destination, and nothing is created on disk."""
    from qitos.engine import EngineResult

    _guard._last_logged.clear()
    with context() as request:
        pass
    for of in (object.__new__(EngineResult), request, "tr-" + "7" * 32):
        score(of, "correct", True)
        expect(of, "answer", "42")
    assert scores() == []
    assert not spool.exists()
    assert "no trace of an object of type EngineResult was logged" in caplog.text
    assert "7777 is not scored: nothing is logged here; set MLFLOW_TRACKING_URI" in caplog.text


@pytest.mark.parametrize(
    "environ",
    [
        {"QITOS_TRACE_PLUGINS": "none", "MLFLOW_TRACKING_URI": "http://one.test"},
        {"QITOS_TRACE_PLUGINS": "mlflow", "QITOS_MLFLOW_QUEUE_BYTES": "many"},
    ],
)
def test_an_environment_that_logs_nothing_raises_nothing(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, scores: Spooled, swallowed: Any
) -> None:
    """It is not the caller's fault."""
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    score("tr-" + "7" * 32, "correct", True)
    assert scores() == []
    swallowed.clear()


def test_credentials_are_redacted(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """In reasons and values, as everywhere."""
    attach()
    with create_trace("agent") as trace:
        pass
    secret = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789abcd"
    score(trace, "label", {"api_key": secret}, rationale=f"it said {secret}")
    [record] = scores()
    assert secret not in str(record)
    assert record["rationale"].startswith("it said ")


def test_a_score_of_a_trace_is_recorded_after_its_processor_is_shut_down(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """A notebook's last cell comes late."""
    processor = attach()
    with create_trace("agent") as trace:
        pass
    processor.shutdown()
    score(trace, "correct", True)
    MlflowTraceProcessor(offline=True).force_flush()
    assert [record["value"] for record in scores()] == [True]


def test_scores_are_bounded_like_all_that_waits(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """What the queue has no room for is counted."""
    attach(queue_bytes=100_000)
    with create_trace("agent") as trace:
        pass
    [known] = feedback.logged(trace.trace_id)
    score(trace, "small", 1)
    score(trace, "large", "x" * 200_000)
    assert known.pipeline.stats.dropped == {"queue_full": 1}
    assert [record["name"] for record in scores()] == ["small"]


class Number:
    """As numpy's and torch's."""

    def item(self) -> float:
        return 0.5


def test_numbers_of_arrays_are_numbers(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """A metric often is one."""
    attach()
    with create_trace("agent") as trace:
        pass
    score(trace, "f1", Number())
    assert [record["value"] for record in scores()] == [0.5]


class Odd:
    """A user's object of which nothing works."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    __hash__ = None  # type: ignore[assignment]


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"name": ""}, TypeError, "feedback needs a name; give a text"),
        ({"name": Odd()}, TypeError, "feedback needs a name"),
        ({"value": Odd()}, TypeError, "value of 'n' cannot be used"),
        ({"value": DEEP}, TypeError, "value of 'n' cannot be used"),
        ({"of": Odd()}, TypeError, "no trace is known of an object of type Odd"),
        ({"value": float("nan")}, ValueError, "value=nan of 'n' is no number that MLflow takes"),
        ({"value": None}, TypeError, r"value of 'n' cannot be used \(TypeError: None\); give a"),
        ({"value": object()}, TypeError, "value of 'n' cannot be used"),
        ({"value": [float("inf")]}, TypeError, "value of 'n' cannot be used"),
        ({"rationale": 1}, TypeError, "rationale of 'n' is an object of type int; give a"),
        ({"metadata": "a"}, TypeError, "metadata of 'n' is an object of type str; give a"),
        ({"source": 1}, TypeError, "source is an object of type int; give a name"),
        ({"source_type": "JUDGE"}, ValueError, "source_type='JUDGE'; MLflow has HUMAN"),
        ({"of": "the answer"}, TypeError, "'the answer' is no id of a trace; give an MLflow"),
        ({"of": 7}, TypeError, "no trace is known of an object of type int; give an MLflow"),
        ({"of": Result()}, TypeError, "no trace is known of an object of type Result"),
        ({"tracking_uri": "localhost:5000"}, ValueError, "did you mean http"),
    ],
)
def test_what_is_wrong_is_named_at_once(
    arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    """With what to give instead, and nothing is recorded."""
    given = {"of": "tr-" + "0" * 32, "name": "n", "value": 1, **arguments}
    with pytest.raises((error, ValueError), match=said) as raised:
        score(given.pop("of"), given.pop("name"), given.pop("value"), **given)
    assert "tracking_uri" in arguments or isinstance(raised.value, error)


def test_a_context_of_several_traces_is_no_one() -> None:
    """It is not guessed which."""
    with context() as request:
        for number in (1, 2):
            request.begin(Begun(str(number), None, PendingRun(), None, None))
    with pytest.raises(ValueError, match=r"2 traces have begun .* give one of its trace_ids"):
        score(request, "correct", True)


def test_agents_in_one_trace_of_mlflows_are_one(
    attach: Callable[..., MlflowTraceProcessor], scores: Spooled
) -> None:
    """It is that trace which is scored."""
    attach()
    with context() as request:
        for number in (1, 2):
            request.begin(Begun(str(number), "tr-" + "7" * 32, PendingRun(), None, None))
    score(request, "correct", True)
    assert [record["trace_id"] for record in scores()] == ["tr-" + "7" * 32]


def test_a_result_is_not_kept_alive() -> None:
    """Nor is another object with its number taken for it."""
    results._results.clear()
    result = Result()
    results.note(result, None, "t")
    assert results.trace_of(result) == "t"
    del result
    gc.collect()
    assert results._results == {}


def test_what_is_remembered_of_runs_is_bounded() -> None:
    """The latest ones; a text cannot be remembered."""
    for number in range(results.MAX_RUNS + 5):
        results.note("an answer", f"run {number}", f"t{number}")
    assert len(results._runs) == results.MAX_RUNS
    assert results.trace_of_run(f"run {number}") == f"t{number}"
    assert results.trace_of("an answer") is None
