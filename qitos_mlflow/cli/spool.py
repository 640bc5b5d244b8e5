"""`qitos-mlflow spool`: maintains the spool by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qitos_mlflow.cli._endings import ends_on_signals
from qitos_mlflow.cli._show import Group, complain, echo, plural
from qitos_mlflow.cli._spool import look_at, paths_argument, reason_of

if TYPE_CHECKING:
    from qitos_mlflow.delivery import SegmentInfo


@click.group(cls=Group)
def spool() -> None:
    """Maintain the directory that records wait in."""


@spool.command()
@paths_argument
@click.option("--yes", is_flag=True, help="Delete without asking.")
def purge(paths: tuple[Path, ...], yes: bool) -> None:
    """Delete segments with all their records, delivered or not.

    A segment holds what one process has written. Segments of living processes and segments that
    are being delivered are left alone. Asks before it deletes.

    PATH is a spool directory or a file in it. The default is this user's spool.
    """
    deleted: list[SegmentInfo] = []
    with ends_on_signals(lambda: f"{plural(len(deleted), 'segment')} deleted"):
        _purge(paths, deleted, yes=yes)


def _purge(paths: tuple[Path, ...], deleted: list[SegmentInfo], *, yes: bool) -> None:
    from qitos_mlflow.delivery import purge as purge_segment

    segments = look_at(paths)
    idle = [segment for segment in segments if not (segment.owner_alive or segment.delivering)]
    failed = 0
    if idle:
        waiting = sum(segment.waiting for segment in idle)
        refused = sum(sum(segment.dead_letters.values()) for segment in idle)
        echo(
            f"{plural(len(idle), 'segment')} with {plural(waiting, 'record')} not delivered yet "
            + (f"and {plural(refused, 'record')} refused or damaged " if refused else "")
            + f"in {', '.join(sorted({str(segment.paths.directory) for segment in idle}))}",
            own=True,
        )
        if not yes:
            click.confirm("Delete them?", abort=True)
    for segment in idle:
        try:
            deleted += [segment] if purge_segment(segment.paths) else []
        except OSError as error:
            failed += 1
            complain(f"segment {segment.paths.stem} cannot be deleted: {reason_of(error)}")
    in_use = len(segments) - len(deleted) - failed
    done = f"{plural(len(deleted), 'segment')} deleted" if idle else "Nothing to delete"
    echo(done + (f"; {plural(in_use, 'segment')} in use" if in_use else ""))
    if failed:
        raise SystemExit(1)
