"""`qitos-mlflow spool`: what is done to the spool by hand."""

from __future__ import annotations

from pathlib import Path

import click

from qitos_mlflow.cli import Group
from qitos_mlflow.cli._spool import look_at, paths_argument, plural, reason_of


@click.group(cls=Group)
def spool() -> None:
    """Look after the directory that records wait in."""


@spool.command()
@paths_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(paths: tuple[Path, ...], yes: bool) -> None:
    """Delete segments with all their records, delivered or not.

    A segment is what one process has written. Those of living processes are left alone, and so are
    those that are being delivered. Asks before it deletes.

    PATH is the directory of a spool or a file in it; without one, this user's spool is meant.
    """
    from qitos_mlflow.delivery import purge as purge_segment

    segments, failures = look_at(paths)
    idle = [segment for segment in segments if not (segment.owner_alive or segment.delivering)]
    deleted = 0
    if idle:
        waiting = sum(segment.waiting for segment in idle)
        refused = sum(segment.dead_letters for segment in idle)
        click.echo(
            f"{plural(len(idle), 'segment')} with {plural(waiting, 'record')} not delivered yet "
            + (f"and {plural(refused, 'record')} refused for good " if refused else "")
            + f"in {', '.join(sorted({str(segment.paths.directory) for segment in idle}))}"
        )
        if not yes:
            click.confirm("Delete them?", abort=True)
    for segment in idle:
        try:
            deleted += purge_segment(segment.paths)
        except OSError as error:
            failures[segment.paths] = reason_of(error)
    in_use = len(segments) - deleted - sum(s.paths in failures for s in segments)
    done = f"{plural(deleted, 'segment')} deleted" if idle else "Nothing to delete"
    click.echo(done + (f"; {plural(in_use, 'segment')} in use" if in_use else ""))
    for failed, reason in failures.items():
        click.echo(f"{failed.stem} cannot be deleted: {reason}", err=True)
    if failures:
        raise SystemExit(1)
