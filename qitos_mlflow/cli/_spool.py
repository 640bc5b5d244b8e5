"""What the commands about the spool share: which segments are meant, and where they are to go."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qitos_mlflow.cli import Refused

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Paths, SegmentInfo

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORE = "MLflow's local store"


def paths_argument(command: F) -> F:
    """`PATH…`: spool directories, or single files of segments."""
    return click.argument("paths", metavar="[PATH]...", nargs=-1, callback=_paths)(command)


def _paths(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Path, ...]:
    if "" in values:  # A variable that is not set; to Path it is the working directory.
        raise click.BadParameter("one is empty; leave it out for this user's spool")
    return tuple(map(Path, values))


def default_directory() -> Path:
    """This user's spool, as the settings have it."""
    from qitos_mlflow.settings import Settings

    return Settings.resolve().spool_dir


def segments_in(paths: Iterable[Path]) -> list[Paths]:
    """The segments that are meant, each once, oldest first; without paths those of the spool.

    A segment whose file is gone by now is none to complain of: it has been delivered.
    """
    from qitos_mlflow.delivery import find_segments

    chosen = tuple(paths)
    found: dict[Paths, None] = {}
    for path in chosen or (default_directory(),):
        try:
            if path.is_dir():
                os.scandir(path).close()  # An agent's spool that it may not read is no error.
            segments = find_segments(path)
            known = bool(segments) or path.is_dir() or not (chosen or path.exists())
        except OSError as error:
            raise Refused(f"{str(path)!r} cannot be read: {reason_of(error)}") from error
        if not known:
            raise Refused(
                f"{str(path)!r} is neither a directory nor a file of a spool; "
                + (
                    f"without a path, {default_directory()} is meant"
                    if chosen
                    else "check QITOS_MLFLOW_SPOOL_DIR"
                )
            )
        found.update(dict.fromkeys(segments))
    return list(found)


def look_at(paths: Iterable[Path]) -> tuple[list[SegmentInfo], dict[Paths, str]]:
    """The segments that are meant; those that cannot be read are told apart, with the reason."""
    from qitos_mlflow.delivery import inspect_segment

    seen, unreadable = [], {}
    for segment in segments_in(paths):
        try:
            for _, part in segment.parts():
                # What this user may not read is not for this user to give up.
                with contextlib.suppress(FileNotFoundError), part.open("rb"):
                    pass
            seen.append(inspect_segment(segment))
        except OSError as error:
            unreadable[segment] = reason_of(error)
    return seen, unreadable


def reason_of(error: OSError) -> str:
    """Such as "Permission denied: /spool/x.seg"."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {error.filename}" if error.filename else reason


def header_of(segment: SegmentInfo) -> dict[str, Any]:
    """Where the segment's records are to go, as its header has it; empty where it is damaged."""
    if segment.header is None:
        return {}
    header: dict[str, Any] = json.loads(segment.header)
    return header


def destination_of(header: dict[str, Any]) -> str:
    """The header's destination, for people."""
    from qitos_mlflow.redaction.uris import without_credentials

    if not header:
        return "unknown"
    uri = header.get("tracking_uri")
    return without_credentials(uri) if uri else f"{DEFAULT_STORE} in {header.get('cwd')}"


def age(time_ns: int) -> str:
    """How long ago, for people."""
    seconds = max(0.0, time.time() - time_ns / 1e9)
    for unit, size_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def plural(count: int, noun: str) -> str:
    """Such as "1 record" and "2 records"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def waiting_traces(segment: SegmentInfo) -> tuple[Counter[str], set[str]]:
    """What the starts and ends that still wait say of their traces.

    Returns the spans lost, by reason, and the names of the experiments. Of traces whose start or
    end is delivered, the runs have it.
    """
    from qitos_mlflow.delivery import waiting_records

    lost: Counter[str] = Counter()
    experiments: set[str] = set()
    if (name := header_of(segment).get("experiment_name")) is not None:
        experiments.add(str(name))  # The first version of the format has it there.
    for record in waiting_records(segment.paths):
        if b'"trace_end"' in record or b'"trace_start"' in record:
            try:
                content = json.loads(record)
                if content["kind"] == "trace_end":
                    lost.update(content["dropped"])
                elif content["kind"] == "trace_start":
                    experiments.add(str(content["settings"]["experiment_name"]))
            except (ValueError, KeyError, TypeError):
                continue  # The sink refuses it and says why.
    return lost, experiments
