"""MLflow through MLflow itself: local stores, and http for what only its client can do.

Besides the command line, only this module and `sqlite_store` import mlflow. This happens on the
sending thread, and only if the destination needs it. All calls go through clients bound to the
destination's URI, so MLflow's process-wide state is neither read nor changed.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict, ParseDict
from mlflow import entities
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.assessments_pb2 import Assessment
from mlflow.protos.service_pb2 import TraceInfoV3
from mlflow.store.artifact import artifact_repository_registry
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient
from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store, get_default_host_creds
from mlflow.tracking.request_auth.registry import fetch_auth
from mlflow.tracking.request_header.registry import resolve_request_headers

from qitos_mlflow._inheritance import check, disown_in_child
from qitos_mlflow.delivery import Hopeless, RetryLater, importing
from qitos_mlflow.delivery.sink import progressed
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, PromptRef, RunData, RunRef
from qitos_mlflow.mlflow_plugin.server import answers
from qitos_mlflow.mlflow_plugin.server.sqlite_store import file_of, prepare_sqlite
from qitos_mlflow.mlflow_plugin.server.transport import (
    ARTIFACTS_TAG,
    Poisoned,
    PutOff,
    Refused,
    Transport,
    failure,
    readable,
)
from qitos_mlflow.redaction.redact import without_credentials

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

_inherited: list[Any] = []
"""Connections to local stores that a parent process has opened. Nothing closes them."""

UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR})
"""Errors of a place for artifacts that is not on this machine: the server's own disk."""

OF_THIS_PROCESS = (OSError, MemoryError, Warning)
"""Exceptions that say nothing of the record. A program may have warnings raised."""

AWAY = ("Connect", "Timeout", "Unavailable", "ServiceRequestError", "TransportError")
"""Words in the errors of clouds that do not answer."""

ALL_CHARS = 2000
"""Longest text about a store that cannot be opened: MLflow explains what to do (characters)."""


def plugin_access(uri: str) -> tuple[dict[str, str], Any]:
    """Headers and authentication of MLflow's plugins for a request, as requests takes them.

    Runs the plugins' code, which may block. What it raises is a reason to try again.
    """
    try:
        credentials = get_default_host_creds(uri)
        if credentials.aws_sigv4:
            from requests_auth_aws_sigv4 import AWSSigV4  # type: ignore[import-not-found]

            return resolve_request_headers(), AWSSigV4("execute-api")
        auth = credentials.auth and fetch_auth(credentials.auth)
        return resolve_request_headers(), auth or None
    except Exception as error:
        raise RetryLater(f"{type(error).__name__}: {readable(error)}") from error


def write_artifact(artifact_uri: str, path: str, data: bytes, tracking_uri: str) -> None:
    """Write `data` to `path` below `artifact_uri`, with whatever repository MLflow has for it.

    Raises the failures of `Transport`. If this process can never write to the place, the file is
    put off, because everything after it would wait for ever.
    """
    folder, _, name = path.rpartition("/")
    with _temporary_directory() as directory, _failures():
        local = Path(directory, name)
        local.write_bytes(data)
        try:
            repository = artifact_repository_registry.get_artifact_repository(
                artifact_uri, tracking_uri=tracking_uri
            )
            repository.log_artifact(str(local), folder or None)
        except (MlflowException, NotImplementedError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {readable(error)}"
            number = getattr(error, "errno", None)
            if isinstance(error, ImportError) or number in UNWRITABLE:
                where = without_credentials(artifact_uri)
                raise PutOff("NO_ARTIFACTS", f"cannot write to {where}: {reason}") from error
            if any(word in reason for word in AWAY):  # A cloud that does not answer says nothing.
                raise RetryLater(reason) from error
            raise


@contextlib.contextmanager
def _temporary_directory(**where: Any) -> Iterator[str]:
    """A directory that no forked child removes as it exits, as it would a `TemporaryDirectory`."""
    directory = tempfile.mkdtemp(**where)
    try:
        yield directory
    finally:
        check()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _failures(workspace: str | None = None) -> Iterator[None]:
    """Turn MLflow's exceptions into those that `Transport` knows; a store is in `workspace`."""
    try:
        with _in(workspace):
            yield
        progressed()
    except MlflowException as error:
        if isinstance(error.__cause__, OF_THIS_PROCESS):
            raise RetryLater(f"{type(error.__cause__).__name__}: {readable(error)}") from error
        raise failure(str(error.error_code), str(error)) from error
    except NotImplementedError as error:
        raise Refused("NOT_IMPLEMENTED", readable(error)) from error
    except OF_THIS_PROCESS as error:
        raise RetryLater(f"{type(error).__name__}: {readable(error)}") from error
    except (RetryLater, Poisoned, Refused):
        raise
    except Exception as error:  # Of the store itself, for what it was given or for another reason.
        raise Poisoned(f"{type(error).__name__}: {readable(error)}") from error


def _in(workspace: str | None) -> contextlib.AbstractContextManager[object]:
    """MLflow's workspace for this thread alone."""
    try:
        from mlflow.utils.workspace_context import ServerWorkspaceContext
    except ImportError:  # MLflow has none yet.
        return contextlib.nullcontext()
    return ServerWorkspaceContext(workspace) if workspace else contextlib.nullcontext()


def _stays(error: Exception) -> bool:
    """Whether time alone does not mend what keeps a store from being opened."""
    from alembic.util import CommandError
    from sqlalchemy.exc import ArgumentError

    if isinstance(error, MlflowException):  # No such store, or one of another version's.
        return error.error_code == "INVALID_PARAMETER_VALUE" or "database schema" in str(error)
    number = getattr(error, "errno", None)
    unopened = "unable to open database file" in str(error)
    return (
        isinstance(error, (ImportError, ArgumentError, CommandError))
        or number in UNWRITABLE
        or unopened
    )


class StoreTransport(Transport):
    """`Transport` through `MlflowClient`, for local stores. Used by one thread.

    A local store has no timeouts to set (sqlite waits up to 20 s for a lock, on this thread).
    `write`, if it is given, is called in the place of `write_artifact`.

    Raises:
        RetryLater: there is no such store, or it cannot be opened.
    """

    def __init__(self, uri: str, workspace: str | None = None, write: Any = None) -> None:
        super().__init__(uri)
        self._workspace, self._write = workspace, write or write_artifact
        self._file: tuple[int, int] | None = None
        self._open()
        disown_in_child(self)

    def _open(self, *, again: bool = False) -> None:
        try:
            prepare_sqlite(self.uri)
            file = file_of(self.uri)
            self._mlflow: Any = MlflowClient(tracking_uri=self.uri)
            self._tracing: Any = TracingClient(self.uri)
            if again:  # MLflow has one engine for each URI, and looks at a database only once.
                self._tracing.store.engine.dispose()
                _get_sqlalchemy_store(self.uri, None)
            # A store imports most of what it needs at its first use. That happens here, because
            # forks wait until the sink is open: a fork amid an import leaves a broken child.
            with contextlib.suppress(Refused), _failures(self._workspace):
                self._mlflow.search_experiments(max_results=1)
            self._file = file
        except RetryLater:
            raise
        except Exception as error:  # A store that is misnamed, or not there yet.
            text = readable(error, ALL_CHARS).replace(self.uri, self.address)
            reason = f"{type(error).__name__}: {text}"
            if isinstance(error, Warning):
                reason = f"warnings are errors in this process, and MLflow gives one: {reason}"
            raise (Hopeless if _stays(error) else RetryLater)(
                f"{self.address} cannot be opened: {reason}"
            ) from error

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Turn MLflow's exceptions into ours; open the database anew if it is another one now.

        A fork waits for the call: SQLite in the child would take the lock of a transaction that is
        under way for one of its own, for ever.
        """
        with importing():
            if self._has_another_file():
                self._open(again=True)
                # What is known of the old one, such as an experiment's id, may be a stranger's in
                # the new one. After a failure the sink asks for it again.
                raise RetryLater(f"{self.address} was deleted or replaced; it is open again")
            try:
                with _failures(self._workspace):
                    yield
            except Hopeless as error:
                self._tracing.store.engine.dispose()  # SQLite's connections stay read-only.
                if self._has_another_file():
                    raise RetryLater(error.reason) from error
                raise

    def _has_another_file(self) -> bool:
        return self._file is not None and file_of(self.uri) != self._file

    def disown(self) -> None:
        """Have the child open the database anew. SQLite must not use or close what it inherits."""
        engine = getattr(self._tracing.store, "engine", None)
        if engine is not None:
            _inherited.append(engine.pool)
            engine.pool = engine.pool.recreate()

    def _experiment(self, name: str, timeout_s: float) -> Mapping[str, Any] | None:
        with self._call():
            found = self._mlflow.get_experiment_by_name(name)
        return None if found is None else dict(found)

    def _create_experiment(self, name: str, timeout_s: float) -> str:
        with self._call():
            return str(self._mlflow.create_experiment(name))

    def _experiment_with_id(self, experiment_id: str, timeout_s: float) -> Mapping[str, Any]:
        with self._call():
            return dict(self._mlflow.get_experiment(experiment_id))

    def _run(self, run_id: str, timeout_s: float) -> Mapping[str, Any]:
        with self._call():
            return _as_json(self._mlflow.get_run(run_id))

    def create_run(self, run: NewRun, timeout_s: float) -> RunRef:
        with self._call():
            made = self._mlflow.create_run(
                run.experiment_id, start_time=run.start_ms, tags=dict(run.tags), run_name=run.name
            )
            return answers.run_ref(dict(made.info))

    def _search_runs(
        self, wanted: str, page: Mapping[str, Any], timeout_s: float
    ) -> Mapping[str, Any]:
        with self._call():
            found = self._mlflow.search_runs(filter_string=wanted, **page)
        return {"runs": [_as_json(run) for run in found], "next_page_token": found.token}

    def delete_run(self, run_id: str, timeout_s: float) -> None:
        with self._call():
            self._mlflow.delete_run(run_id)

    def log_batch(self, run_id: str, data: RunData, timeout_s: float) -> None:
        with self._call():
            self._mlflow.log_batch(
                run_id,
                [entities.Metric(m.key, m.value, m.timestamp_ms, m.step) for m in data.metrics],
                [entities.Param(*pair) for pair in data.params],
                [entities.RunTag(*pair) for pair in data.tags],
                synchronous=True,  # Whatever MLFLOW_ENABLE_ASYNC_LOGGING says of the user's calls.
            )

    def end_run(self, run_id: str, status: str, end_ms: int, timeout_s: float) -> None:
        with self._call():
            self._mlflow.set_terminated(run_id, status=status, end_time=end_ms)

    def log_dataset(self, run_id: str, dataset: Mapping[str, str], timeout_s: float) -> None:
        tags = [entities.InputTag("mlflow.data.context", "eval")]
        with self._call():
            found = entities.DatasetInput(entities.Dataset(**dataset), tags)
            self._mlflow.log_inputs(run_id, [found])

    def link_traces(self, run_id: str, trace_ids: Sequence[str], timeout_s: float) -> None:
        with self._call():
            self._tracing.store.link_traces_to_run(list(trace_ids), run_id)

    def write_trace(self, info: dict[str, Any], timeout_s: float) -> None:
        with self._call():
            self._tracing.start_trace(entities.TraceInfo.from_proto(ParseDict(info, TraceInfoV3())))

    def _trace_info(self, trace_id: str, timeout_s: float) -> Mapping[str, Any]:
        with self._call():
            proto = self._tracing.store.get_trace_info(trace_id).to_proto()
            return MessageToDict(proto, preserving_proto_field_name=True)

    def create_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        made = entities.Assessment.from_proto(ParseDict(assessment, Assessment()))
        with self._call():
            self._tracing.store.create_assessment(made)

    def update_assessment(self, assessment: dict[str, Any], timeout_s: float) -> None:
        own = entities.Assessment.from_proto(ParseDict(assessment, Assessment()))
        with self._call():
            self._tracing.update_assessment(own.trace_id, own.assessment_id, own)

    def write_spans(self, experiment_id: str, spans: Sequence[Span], timeout_s: float) -> None:
        for _, of_trace in groupby(spans, lambda span: span.trace_id):
            with self._call():
                converted = [entities.Span.from_otel_proto(span) for span in of_trace]
                self._tracing.log_spans(experiment_id, converted)

    def link_prompts(self, trace_id: str, prompts: Sequence[PromptRef], timeout_s: float) -> None:
        with self._call():
            self._tracing.store.link_prompts_to_trace(trace_id, [*prompts])

    def sum_spans(self, question: Mapping[str, Any], timeout_s: float) -> float | None:
        total = MetricAggregation(AggregationType.SUM)
        with self._call():
            points = self._tracing.store.query_trace_metrics(
                view_type=MetricViewType.SPANS, aggregations=[total], **question
            )
            return float(points[0].values["SUM"]) if points else None

    def artifacts_of_trace(self, trace_id: str, timeout_s: float) -> str:
        with self._call():
            return str(self._tracing.get_trace_info(trace_id).tags[ARTIFACTS_TAG])

    def write_artifact(self, run: RunRef, path: str, data: bytes, timeout_s: float) -> None:
        self._write(run.artifact_uri, path, data, self.uri)


def _as_json(run: Any) -> dict[str, Any]:
    """A run as MLflow's servers write it."""
    return dict(MessageToDict(run.to_proto(), preserving_proto_field_name=True))
