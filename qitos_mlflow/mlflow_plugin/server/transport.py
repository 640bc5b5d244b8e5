"""The calls of a sink to an MLflow server (`Transport`), and how they fail.

`rest` speaks to http(s) servers without mlflow in the process, `mlflow_client` to local stores
through mlflow. Every call is synchronous, used by one thread, and bounded by `timeout_s`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qitos_mlflow._texts import text_of
from qitos_mlflow.delivery import Hopeless, RetryLater
from qitos_mlflow.errors import QitosMlflowError
from qitos_mlflow.mlflow_plugin.mapping.entities import (
    NewRun,
    PromptRef,
    RunData,
    RunRef,
    StoredRun,
)
from qitos_mlflow.mlflow_plugin.server import answers
from qitos_mlflow.redaction.redact import redact_text, without_credentials

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

BLAMING = frozenset(
    {
        *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "NOT_IMPLEMENTED"),
        *("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"),
        *("INVALID_STATE", "INVALID_STATE_TRANSITION", "RESOURCE_CONFLICT"),
    }
)
"""Error codes of MLflow that are about what was sent (databricks.proto)."""
FAILING = frozenset({"INTERNAL_ERROR", "DATA_LOSS", "IO_ERROR"})
"""Error codes of a server that fails: perhaps on what was sent. All others, such as those about
authorisation, quota and time, are not about it, so it is sent again."""

DATABASE_WORDS = ("sqlalche", "QueuePool", "psycopg", "connection already closed")
"""Words in SQLAlchemy's errors. All but OperationalError are BAD_REQUEST to MLflow
(store/db/utils.py), a pool without connections and a refused value alike."""

FAILURE_CHARS = 300
"""Longest text about a failure that is kept (characters): one line of a log, no page of HTML."""

ARTIFACTS_TAG = "mlflow.artifactLocation"
"""Tag of a trace that says where its files are; the server sets it."""

MAX_FOUND = 10
"""Most runs that `find_runs` returns. There is one, and one for each unanswered creation."""

MAX_LINKED = 100
"""Traces that MLflow links in one request."""


class Refused(QitosMlflowError):
    """The server will never accept this call; trying again is useless.

    Attributes:
        code: MLflow's error code, such as ``INVALID_PARAMETER_VALUE``, or ``HTTP 404``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code


class TooLarge(Refused):
    """Something on the way to the server does not take as much at once."""


class PutOff(Refused):
    """A file cannot be stored, for a reason that is not the file: `sync` sends it again."""


class Poisoned(QitosMlflowError):
    """The server failed on this call (MLflow's INTERNAL_ERROR). The call may be the reason."""


class Unanswered(RetryLater):
    """The server did not answer in time. It may carry the call out later."""


class Oversized(RetryLater):
    """What answers sends more than is taken. It may send less if it is asked for less."""


class NotThere(RetryLater):
    """What answers knows no such endpoint: an old MLflow, or a router that does not know it yet."""


def failure(code: str, message: str) -> RetryLater | Poisoned | Refused:
    """The exception that MLflow's error code stands for; `message` is its text."""
    text = readable(message)
    if "readonly database" in message and code in ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR"):
        return Hopeless(f"{code}: {text}")
    if code == "RESOURCE_DOES_NOT_EXIST" and message.startswith("Workspace "):
        return RetryLater(f"{code}: {text}")  # It may be created yet.
    database = code == "BAD_REQUEST" and any(word in message for word in DATABASE_WORDS)
    if database or code in FAILING:
        return Poisoned(f"{code}: {text}")
    if code in BLAMING:
        return Refused(code, text)
    kind = NotThere if code == "ENDPOINT_NOT_FOUND" else RetryLater
    return kind(f"{code}: {text}")


def readable(text: object, most: int = FAILURE_CHARS) -> str:
    """A text of a server or a library about a failure as one line, fit for logs and dead letters.

    At most about `most` characters, whole words.
    """
    text = text_of(text) if isinstance(text, BaseException) else str(text)
    line = " ".join(redact_text(text[: 4 * most]).split())
    return line if len(line) <= most else f"{line[:most].rpartition(' ')[0] or line[:most]} …"


class Transport(ABC):
    """Calls on one MLflow server or store: the base of those that make them.

    Each method may raise `RetryLater` (not reachable, overloaded, not authorised: nothing is
    lost, try again), `Poisoned` (the server failed on it) or `Refused` (never again).
    """

    uri: str
    address: str
    """The URI without credentials."""
    patience = 1.0
    """How much longer than usual its answers may take, as a factor of each timeout."""

    def __init__(self, uri: str) -> None:
        self.uri, self.address = uri, without_credentials(uri)

    def experiment_id(self, name: str, timeout_s: float) -> str:
        """The experiment called `name`, created when missing."""
        found = self._experiment(name, timeout_s)
        if found is None:
            try:
                return self._create_experiment(name, timeout_s)
            except Refused as refusal:
                if refusal.code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._experiment(name, timeout_s)  # Another process was faster.
        if found is None:
            raise RetryLater(f"experiment {name!r} exists, but the server does not show it")
        experiment_id, deleted = answers.experiment(found)
        if deleted:
            restore = f"`mlflow experiments restore --experiment-id {experiment_id}`"
            raise Refused(
                "INVALID_STATE", f"experiment {name!r} is deleted; restore it with {restore}"
            )
        return experiment_id

    @abstractmethod
    def _experiment(self, name: str, timeout_s: float) -> Mapping[str, Any] | None:
        """What MLflow says of an experiment; None if there is none."""

    @abstractmethod
    def _create_experiment(self, name: str, timeout_s: float) -> str:
        """Create an experiment; refused with ``RESOURCE_ALREADY_EXISTS`` if there is one."""

    def has_experiment(self, experiment_id: str, timeout_s: float) -> bool:
        """Whether there is an experiment with this id that takes runs."""
        found = _unless_missing(lambda: self._experiment_with_id(experiment_id, timeout_s))
        return found is not None and not answers.experiment(found, experiment_id)[1]

    def find_experiment(self, name: str, timeout_s: float) -> str | None:
        """The id of the experiment with this name, else with this id; None if there is none."""
        found = self._experiment(name, timeout_s)
        found = found or _unless_missing(lambda: self._experiment_with_id(name, timeout_s))
        return None if found is None else answers.experiment(found)[0]

    @abstractmethod
    def _experiment_with_id(self, experiment_id: str, timeout_s: float) -> Mapping[str, Any]:
        """What MLflow says of an experiment."""

    def stored_run(self, run_id: str, timeout_s: float) -> StoredRun | None:
        """A run by its id; None if there is none, or if it is deleted."""
        run = _unless_missing(lambda: self._run(run_id, timeout_s))
        if run is None or answers.text(answers.thing(run, "info"), "lifecycle_stage") == "deleted":
            return None
        return answers.stored_run(run, run_id)

    @abstractmethod
    def _run(self, run_id: str, timeout_s: float) -> Mapping[str, Any]:
        """What MLflow says of a run, as JSON."""

    @abstractmethod
    def create_run(self, run: NewRun, timeout_s: float) -> RunRef:
        """Create a run. Not idempotent: after a failure look for it with `find_runs` first."""

    def find_runs(self, experiment_id: str, trace_id: str, timeout_s: float) -> list[RunRef]:
        """The runs tagged ``qitos.trace_id`` = `trace_id`, the oldest first, `MAX_FOUND` at most.

        Empty for an id with both kinds of quotes in it, which no filter of MLflow can hold.
        """
        tagged = equals("tags.`qitos.trace_id`", trace_id)
        if tagged is None:
            return []
        found, _ = self.search_runs([experiment_id], tagged, timeout_s)
        return [run.ref for run in answers.with_tag(found, "qitos.trace_id", trace_id)]

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        wanted: str,
        timeout_s: float,
        *,
        order: str = "ASC",
        most: int = MAX_FOUND,
        token: str = "",
    ) -> tuple[list[StoredRun], str]:
        """A page of runs by a filter of MLflow, by start time; and the token of the next page."""
        page: dict[str, Any] = {
            "experiment_ids": list(experiment_ids),
            "order_by": [f"attributes.start_time {order}"],
            "max_results": most,
        }
        if token:
            page["page_token"] = token
        answer = self._search_runs(wanted, page, timeout_s)
        runs = [answers.stored_run(run) for run in answers.objects(answer, "runs")]
        return runs, answers.text(answer, "next_page_token")

    @abstractmethod
    def _search_runs(
        self, wanted: str, page: Mapping[str, Any], timeout_s: float
    ) -> Mapping[str, Any]:
        """MLflow's answer to its SearchRuns, as JSON; `page` has the fields beside the filter."""

    @abstractmethod
    def delete_run(self, run_id: str, timeout_s: float) -> None:
        """Mark a run as deleted, as MLflow's pages do."""

    @abstractmethod
    def log_batch(self, run_id: str, data: RunData, timeout_s: float) -> None:
        """Log at most `limits.BATCH_TOTAL` items in one call; all or nothing."""

    @abstractmethod
    def end_run(self, run_id: str, status: str, end_ms: int, timeout_s: float) -> None:
        """Set the run's status and end time."""

    @abstractmethod
    def log_dataset(self, run_id: str, dataset: Mapping[str, str], timeout_s: float) -> None:
        """Say which dataset a run evaluates on: name, digest, source_type and source."""

    def trace_info(self, trace_id: str, timeout_s: float) -> Mapping[str, Any] | None:
        """What MLflow says of a trace, with its assessments; None if there is none."""
        info = _unless_missing(lambda: self._trace_info(trace_id, timeout_s))
        return None if info is None else answers.trace_info(info, trace_id)

    @abstractmethod
    def _trace_info(self, trace_id: str, timeout_s: float) -> Mapping[str, Any]:
        """A trace's info, as MLflow's JSON."""

    @abstractmethod
    def create_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        """Create an assessment (MLflow's, as JSON) of the trace that it names."""

    @abstractmethod
    def update_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        """Change value, rationale and metadata of the assessment with this one's id."""

    @abstractmethod
    def link_traces(self, run_id: str, trace_ids: Sequence[str], timeout_s: float) -> None:
        """Show traces with a run, beside the run that they are from; at most `MAX_LINKED`."""

    @abstractmethod
    def write_trace(self, info: dict[str, Any], timeout_s: float) -> None:
        """Create or replace the trace described by `info` (MLflow's trace_info, as JSON)."""

    @abstractmethod
    def write_spans(self, experiment_id: str, spans: Sequence[Span], timeout_s: float) -> None:
        """Create or replace spans, of any traces of the experiment; those of one trace in a row."""

    @abstractmethod
    def link_prompts(self, trace_id: str, prompts: Sequence[PromptRef], timeout_s: float) -> None:
        """Link a trace to prompts, so that it is found by them."""

    @abstractmethod
    def sum_spans(self, question: Mapping[str, Any], timeout_s: float) -> float | None:
        """The sum of a metric over spans; None if none of them has it.

        Args:
            question: which metric of which spans: fields of MLflow's QueryTraceMetrics, as JSON.
            timeout_s: longest wait for the answer (seconds).
        """

    @abstractmethod
    def write_artifact(self, run: RunRef, path: str, data: bytes, timeout_s: float) -> None:
        """Create or replace the run's artifact at `path`."""

    def has_attachments(self, timeout_s: float) -> bool:
        """Whether the server shows attachments of traces."""
        return True

    @abstractmethod
    def artifacts_of_trace(self, trace_id: str, timeout_s: float) -> str:
        """The URI below which files of a trace are."""

    def close(self) -> None:
        """Give up connections, if there are any."""
        return


def _unless_missing(ask: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What `ask` returns; None if MLflow says that there is none, or that the id is none."""
    try:
        return ask()
    except Refused as refusal:
        if refusal.code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def equals(field: str, text: str) -> str | None:
    """A filter in MLflow's language; None for a text that it cannot hold."""
    for quote in ("'", '"'):
        if quote not in text:
            return f"{field} = {quote}{text}{quote}"
    return None
