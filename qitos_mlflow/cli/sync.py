"""`qitos-mlflow sync`: delivers what agents have left in spools, of this machine or another."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli._delivering import Sync
from qitos_mlflow.cli._endings import ends_on_signals
from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._show import complain, echo, plural, spinner
from qitos_mlflow.cli._spool import (
    default_directory,
    destination_of,
    header_of,
    look_at,
    paths_argument,
    reason_of,
)
from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Paths, SegmentInfo, Sink
    from qitos_mlflow.mlflow_plugin.trust import Trust, Way


@click.command()
@paths_argument
@click.option("--follow", is_flag=True, help="Keep running as a sidecar; Ctrl-C ends it.")
@tracking_uri(otherwise="what each segment has recorded")
@click.option(
    "--patience",
    "patience_s",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    help="Give up on a server that has accepted nothing for this long. Without effect if --follow "
    "is given.",
)
@click.option(
    "--trust",
    is_flag=True,
    help="Also write to local stores and directories for segments that another user may have "
    "written.",
)
def sync(
    paths: tuple[Path, ...],
    follow: bool,
    tracking_uri: str | None,
    patience_s: float,
    trust: bool,
) -> None:
    """Deliver the records that wait in the spool.

    A running agent delivers its own records, unless it works offline. This command delivers the
    rest: the server was away for too long, or the process died. Runs of dead processes are closed
    as KILLED. Several syncs may run at once, also beside running agents. Exits with 1 if something
    is left, and says why.

    PATH is a spool directory or a file in it, also one copied from another machine. The default is
    this user's spool.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # MLflow logs each table it creates.
    if any(action == "error" for action, *_ in warnings.filters):  # Of PYTHONWARNINGS.
        warnings.simplefilter("default")  # MLflow's own must not keep a store from being opened.
    from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri as configured
    from qitos_mlflow.mlflow_plugin.trust import Trust
    from qitos_mlflow.settings import Settings

    settings = Settings.resolve(tracking_uri=tracking_uri)
    named = Trust(configured(settings), given=bool(tracking_uri), foreign=trust)
    # A segment whose own header is damaged goes to the place that is given, or nowhere.
    header = segment_header(Destination.of(named.named), settings) if tracking_uri else None
    if follow and len(paths) > 1:
        raise click.UsageError(f"--follow watches one directory; {len(paths)} were given")
    if follow:
        _follow(paths[0] if paths else default_directory(), named, header)
        return
    delivery = Sync(
        _open_sink,
        lambda header, segment: named.way(header, segment.paths),
        patience_s,
        paths,
        header,
    )
    with ends_on_signals(delivery.last_words) as ended:
        segments = _found(paths)
        delivery.run([segment for segment in segments if segment.paths.parts()], ended)
        _clear(segments)
    delivery.show()
    if delivery.left or delivery.counts.put_off:
        raise SystemExit(1)


def _open_sink(way: Way, header: bytes) -> Sink:
    from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink

    return MlflowSink(
        header, tracking_uri=way.uri, trusted=way.trusted, files=way.files, resumed=True
    )


def _clear(segments: Sequence[SegmentInfo]) -> None:
    """Of segments without records, the deletion may have been cut short."""
    from qitos_mlflow.delivery import Counts
    from qitos_mlflow.delivery.spool.segments import claim

    for segment in segments:
        with suppress(OSError):
            if not segment.paths.parts() and (taken := claim(segment.paths, Counts())):
                taken.release()


def _found(paths: Sequence[Path]) -> list[SegmentInfo]:
    """The segments at `paths`; last, new ones of the files among their dead letters."""
    from qitos_mlflow.delivery import inspect_segment, send_again

    found = look_at(paths)
    for segment in found.copy():
        try:
            found += map(inspect_segment, filter(None, [send_again(segment.paths)]))
        except OSError as error:
            complain(f"files of {segment.paths.stem} are not sent again: {reason_of(error)}")
    return found


def _opener(named: Trust, paths: Paths) -> Callable[[bytes], Sink] | None:
    """What opens the sink of a segment; None if only the user may say that it is delivered."""
    from qitos_mlflow._guard import warn
    from qitos_mlflow.delivery.spool.segments import read_head

    seen: Any = SimpleNamespace(head=read_head(paths))
    header = header_of(seen)
    way = named.way(header, paths)
    if way.needs:
        text = "segment %s: not delivered to %s, because another user may have written it. If you "
        text += "trust its author, run: qitos-mlflow sync %s"
        warn(f"sync.{paths.stem}", text, paths.stem, destination_of(header), way.needs)
        return None
    return partial(_open_sink, way)


def _follow(directory: Path, named: Trust, default_header: bytes | None) -> None:
    from qitos_mlflow.delivery import Counts, follow

    try:
        there = directory.exists()
        if there and not directory.is_dir():
            raise click.UsageError(f"--follow watches a directory; {str(directory)!r} is a file")
    except OSError as error:
        raise QitosMlflowError(f"{str(directory)!r} cannot be read: {reason_of(error)}") from error
    wait = "" if there else ", which does not exist yet"
    total = Counts()

    def last_words() -> str:
        return f"{plural(total.delivered, 'record')} delivered"

    with ends_on_signals(last_words, otherwise=False) as ended, spinner() as update:
        echo(f"Delivering the records in {directory}{wait}; Ctrl-C ends it", err=True, own=True)
        for pause_s in follow(directory, partial(_opener, named), total, default_header):
            if ended.wait(pause_s):
                break
            update(f"{directory}: {last_words()}")
    echo(last_words())
