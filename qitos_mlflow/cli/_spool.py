"""What the commands about the spool share: which segments are meant, and where they go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Paths, SegmentInfo

DEFAULT_STORE = "MLflow's local store"
RECORD_BYTES = 4 * 1024 * 1024
"""Into a larger record the commands do not look (bytes)."""


def _paths(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Path, ...]:
    from qitos_mlflow.delivery import trust
    from qitos_mlflow.settings import Settings

    trust(Settings.resolve().spool_owners)
    if "" in values:  # Such as an unset shell variable; Path("") is the working directory.
        raise click.BadParameter("a path is empty; leave it out for this user's spool")
    return tuple(map(Path, values))


paths_argument = click.argument("paths", metavar="[PATH]...", nargs=-1, callback=_paths)
"""`PATH…`: spool directories, or single files of segments."""


def default_directory() -> Path:
    """This user's spool, as the settings have it."""
    from qitos_mlflow.settings import Settings

    return Settings.resolve().spool_dir


def look_at(paths: Iterable[Path]) -> list[SegmentInfo]:
    """The segments at `paths`, each once, oldest first. Without paths those of this user's spool.

    A segment whose file no longer exists is no error: it has been delivered.
    """
    from qitos_mlflow.delivery import check_directory, find_segments, inspect_segment

    chosen = tuple(paths)
    found: dict[Paths, None] = {}
    for path in chosen or (default_directory(),):
        try:
            there = path.is_dir() or not chosen
            check_directory(path if there else path.parent, repair=not chosen)
            segments = find_segments(path)
            known = bool(segments) or path.is_dir() or not (chosen or path.exists())
        except OSError as error:
            raise QitosMlflowError(f"{str(path)!r} cannot be read: {reason_of(error)}") from error
        if not known:
            raise QitosMlflowError(
                f"{str(path)!r} is neither a spool directory nor a file in one; "
                "leave the path out for this user's spool, or check QITOS_MLFLOW_SPOOL_DIR"
            )
        found.update(dict.fromkeys(segments))
    return [inspect_segment(segment) for segment in found]


def reason_of(error: OSError) -> str:
    """Such as "Permission denied: /spool/x.seg"."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {error.filename}" if error.filename else reason


def header_of(segment: SegmentInfo) -> dict[str, Any]:
    """The segment's header, which names its destination; empty if it is damaged."""
    from qitos_mlflow.delivery import json_object

    header = json_object(segment.head.caller or b"")
    texts = [header.get(name, "") for name in ("tracking_uri", "cwd", "experiment_name")]
    tenant = header.get("headers") or {}
    texts += tenant.values() if isinstance(tenant, dict) else [0]
    return header if all(isinstance(text, (str, type(None))) for text in texts) else {}


def experiment_of(segment: SegmentInfo) -> str | None:
    """The experiment of the segment's first waiting trace; None if no record that waits names one.

    Segments of format 1 have it in their header. Reads records from disk.
    """
    from qitos_mlflow.delivery import json_object, waiting_records

    recorded: str | None = header_of(segment).get("experiment_name")
    if recorded is not None:
        return recorded
    for record in waiting_records(segment.paths):
        if b'"trace_start"' in record and len(record) <= RECORD_BYTES:
            with contextlib.suppress(KeyError, TypeError):
                return str(json_object(record)["settings"]["experiment_name"])
    return None


def destination_of(header: dict[str, Any], uri: str | None = None) -> str:
    """The destination as it is shown: the header's, or `uri` in its place, with its tenant."""
    from qitos_mlflow.redaction.redact import without_credentials

    if not header and not uri:
        return "unknown"
    uri = uri or header.get("tracking_uri")
    shown = without_credentials(uri) if uri else f"{DEFAULT_STORE} in {header.get('cwd')}"
    tenant = ", ".join(f"{key}: {text}" for key, text in (header.get("headers") or {}).items())
    return f"{shown} ({tenant})" if tenant else shown
