"""`qitos-mlflow spool`: what is done to the spool by hand."""

from __future__ import annotations

from pathlib import Path

import click

from qitos_mlflow.cli._spool import paths_argument, plural, segments_in


@click.group()
def spool() -> None:
    """Look after the directory that records wait in."""


@spool.command()
@paths_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(paths: tuple[Path, ...], yes: bool) -> None:
    """Delete segments with all their records, delivered or not.

    Those of living processes are left alone, and so are those that are being delivered.
    """
    from qitos_mlflow.delivery import inspect_segment
    from qitos_mlflow.delivery import purge as purge_segment

    segments = [inspect_segment(segment) for segment in segments_in(paths)]
    idle = [segment for segment in segments if not (segment.owner_alive or segment.shipping)]
    if not idle:
        click.echo("Nothing to delete" + _in_use(len(segments)))
        return
    waiting = sum(segment.waiting for segment in idle)
    click.echo(
        f"{plural(len(idle), 'segment')} with {plural(waiting, 'record')} not delivered yet "
        f"in {', '.join(sorted({str(segment.paths.directory) for segment in idle}))}"
    )
    if not yes:
        click.confirm("Delete them?", abort=True)
    deleted = sum(purge_segment(segment.paths) for segment in idle)
    click.echo(f"{plural(deleted, 'segment')} deleted" + _in_use(len(segments) - deleted))


def _in_use(count: int) -> str:
    return f"; {plural(count, 'segment')} in use" if count else ""
