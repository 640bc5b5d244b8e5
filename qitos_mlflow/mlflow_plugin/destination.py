"""Where traces go, how their runs are logged, and what MLflow adds to a recording pipeline.

What it adds is a header that makes each spool segment self-contained, the sink, and the choice of
leftovers that may be delivered. A record goes to the server, store and tenant that it was recorded
for, or to none.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import sys
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from qitos_mlflow import _json
from qitos_mlflow._after_import import imported
from qitos_mlflow.errors import QitosMlflowError
from qitos_mlflow.mlflow_plugin.fluent.surroundings import Surroundings
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import DEFAULT_EXPERIMENT
from qitos_mlflow.mlflow_plugin.server.access import (
    REGISTRY,
    WORKSPACE,
    has_credentials,
    has_plugins,
    routing_headers,
)
from qitos_mlflow.mlflow_plugin.server.pages import show_run
from qitos_mlflow.mlflow_plugin.server.tracking_uri import (
    absolute,
    is_http,
    is_local,
    names_place,
    working_directory,
)
from qitos_mlflow.mlflow_plugin.trust import is_own_spool
from qitos_mlflow.recording.pipelines import MAX_PICTURE_BYTES, RecordPipeline
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.redaction.redact import redact, without_credentials
from qitos_mlflow.settings import TRACKING_VARIABLE, Settings


def tracking_uri(settings: Settings) -> str | None:
    """The destination right now, absolute; None for MLflow's own local default.

    `mlflow.set_tracking_uri` sets the variable as well, so the variable is all there is to ask.
    """
    uri = settings.tracking_uri or os.environ.get(TRACKING_VARIABLE) or None
    return None if uri is None else absolute(uri)


_USER = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


class Destination(NamedTuple):
    """Equal for destinations that are the same server or store, reached as the same tenant.

    Attributes:
        uri: None is MLflow's local default.
        cwd: which that depends on; None with a URI.
        headers: those by which a server tells tenants apart, with their values; None: not known.
        user: the credentials in the environment.
    """

    uri: str | None
    cwd: str | None
    headers: tuple[tuple[str, str], ...] | None
    user: tuple[str | None, ...]

    @classmethod
    def of(cls, uri: str | None) -> Destination:
        """What `uri` stands for at this moment, on this thread."""
        cwd = working_directory() if uri is None else None
        known = routing_headers()
        headers = None if known is None else tuple(sorted(known.items()))
        return cls(uri, cwd, headers, tuple(map(os.environ.get, _USER)))

    @property
    def workspace(self) -> str | None:
        """MLflow's workspace, if one is named."""
        return dict(self.headers or ()).get(WORKSPACE)


def segment_header(
    to: Destination, settings: Settings | None = None, *, asked: bool = True
) -> bytes:
    """What a spool segment says of itself, as JSON: where its records go, and nothing else.

    Credentials are left out; the process that delivers the segment later supplies them as MLflow
    does. How a trace is logged is in its own start: `run_settings`. Only traces that the first
    version of the spool's format recorded have none, and need the header to have `settings`.
    Plugins of MLflow that tell tenants apart cannot be `asked` before its client has made a call:
    that would take an import. Then the process that delivers asks them.

    Raises:
        QitosMlflowError: the destination is a place that JSON, and so the spool, cannot name.
    """
    cwd = working_directory() if to.cwd is None else to.cwd
    place = cwd if to.uri is None else without_credentials(to.uri)
    if _in_utf8(place).decode() != place:
        raise QitosMlflowError(
            f"cannot log to {place!a}, whose name is not UTF-8: work in another directory, or "
            "set MLFLOW_TRACKING_URI to a server or an absolute path"
        )
    header: dict[str, Any] = {"tracking_uri": None if to.uri is None else place, "cwd": cwd}
    if settings is not None:
        header |= redact(run_settings(settings))
    header["headers"] = None if to.headers is None else dict(to.headers)
    return _in_utf8(json.dumps({**header, "asked": asked}, ensure_ascii=False))


def run_settings(settings: Settings) -> RunSettings:
    """The field ``settings`` of a trace's start: how its run is logged, and by which process."""
    script = sys.argv[0] if sys.argv else ""
    found: RunSettings = {
        "experiment_name": settings.experiment_name or DEFAULT_EXPERIMENT,
        "run_name": settings.run_name,
        "tags": dict(settings.tags),
        "auto_end_run": settings.auto_end_run,
        "log_traces": settings.log_traces,
        "user": _user(),
        "source": Path(script).name if script not in ("", "-c") else "python",
        "plugin_version": version("qitos-mlflow"),
    }
    if not _max_picture_bytes():
        found["attachments"] = False
    # Names that the system has in another encoding are there for people to read.
    cleaned: RunSettings = json.loads(_in_utf8(json.dumps(found, ensure_ascii=False)))
    return cleaned


def placed(found: RunSettings, settings: Settings, around: Surroundings) -> RunSettings:
    """The settings of one trace's run: `found`, and what decides its experiment and its parent."""
    names = ["inherited_run_id"]
    if settings.experiment_name is None:
        names += ["experiment_of", "experiment_id", "experiment_name"]
    place: Any = {name: value for name in names if (value := getattr(around, name))}
    return {**found, **place}


def _max_picture_bytes() -> int:
    """The largest picture that becomes an attachment, by MLflow's own variables; 0: none does."""
    if os.environ.get("MLFLOW_TRACE_EXTRACT_ATTACHMENTS", "true").lower() in ("false", "0"):
        return 0
    with suppress(ValueError):
        most = int(os.environ.get("MLFLOW_TRACE_MAX_ATTACHMENT_SIZE", ""))
        return min(most, MAX_PICTURE_BYTES) if most > 0 else MAX_PICTURE_BYTES
    return MAX_PICTURE_BYTES


class MlflowPipeline(RecordPipeline):
    """The pipeline of traces that are logged at `to`.

    Raises:
        QitosMlflowError: the spool cannot name the place.
    """

    def __init__(self, to: Destination, key: Hashable, settings: Settings) -> None:
        self._to = to
        # A picture must leave room in the queue for the spans.
        self.max_picture_bytes = min(_max_picture_bytes(), settings.queue_bytes // 8)
        asked = not is_http(to.uri) or imported(REGISTRY) is not None
        super().__init__(segment_header(to, asked=asked), key, settings, local=is_local(to.uri))

    @cached_property
    def sync_command(self) -> tuple[str, str]:
        """Names the server to `sync`, which sends credentials to no other one.

        Local stores are named, too, if the spool is one that others may have written to.
        """
        uri, (command, directory) = self._to.uri, super().sync_command
        named = has_credentials(uri) if uri and is_http(uri) else not is_own_spool(Path(directory))
        if not named:
            return command, directory
        if uri is None:  # What MLflow's default is depends on a directory.
            return f"{command} --trust", str(next((p for _, p in self.paths.parts()), directory))
        if uri != without_credentials(uri):
            return command, directory
        return f"{TRACKING_VARIABLE}={shlex.quote(uri)} {command}", directory

    def open_sink(self) -> Any:
        """Open the sink for this process's records."""
        return self._sink(self.header, announce=self._announce)

    def open_leftovers(self, header: bytes) -> Callable[[], Any] | None:
        """What opens the sink for a dead process's segment, if its destination is the same."""
        same = _place(self.header) == _place(header)
        return partial(self._sink, header, resumed=True) if same else None

    def _sink(self, header: bytes, **options: Any) -> Any:
        from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink

        # With our URI, which may have the credentials that the header has not on disk.
        return MlflowSink(header, tracking_uri=self._to.uri, **options)

    def _announce(self, trace_id: str, ref: RunRef) -> None:
        """Sending thread. The run of a trace exists."""
        trace = self.find(trace_id)
        if trace is not None:
            trace.run.created(ref)
        show_run(self._to.uri, ref, self._to.workspace)


def pipeline_of(recorder: Recorder[Any]) -> tuple[Destination, RecordPipeline]:
    """Where a plugin's records go right now, and the pipeline to there."""
    to = Destination.of(tracking_uri(recorder.settings))
    return to, recorder.pipeline_to(to, partial(MlflowPipeline, to))


def _place(header: bytes) -> tuple[Any, ...]:
    """Equal for segments that go to the same tenant of the same server or store."""
    head = _json.loads(header)
    uri = head["tracking_uri"]
    # Without a URI it is MLflow's default, which may be a store in the working directory.
    headers = head.get("headers", {})
    known = headers is not None and (head.get("asked", True) or not has_plugins())
    if not (known and names_place(uri)):
        headers = object()  # It is not known, so it is like no other one's.
    return uri, None if uri else head.get("cwd"), headers


def _in_utf8(text: str) -> bytes:
    """`text`, with ``?`` for what the system has named in another encoding (surrogates)."""
    return text.encode("utf-8", "replace")


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # A container's user without a name.
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
