"""`qitos-mlflow sync`: delivers what agents have left in spools, of this machine or another."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli._options import finite, tracking_uri
from qitos_mlflow.cli._spool import (
    default_directory,
    destination_of,
    header_of,
    paths_argument,
    plural,
    segments_in,
)

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Outcome, SegmentInfo, Stats

PATIENCE_S = 30.0
"""So long a server may take nothing before `sync` leaves the rest for another time."""


@click.command()
@paths_argument
@click.option("--follow", is_flag=True, help="Go on with what comes, until interrupted: a sidecar.")
@tracking_uri(otherwise="what each segment has recorded")
@click.option(
    "--patience",
    "patience_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    callback=finite,
    default=PATIENCE_S,
    show_default=True,
    help="Give up when the server takes nothing for so long; not with --follow.",
)
def sync(
    paths: tuple[Path, ...], follow: bool, tracking_uri: str | None, patience_s: float
) -> None:
    """Deliver what is left in the spool.

    Or in the directories and files given, which may be of another machine. Runs whose process
    died are closed as KILLED. Living processes deliver for themselves, unless they work offline.
    Any number of syncs may run at once, and beside running agents.
    """
    from qitos_mlflow.mlflow_plugin.destination import segment_header
    from qitos_mlflow.mlflow_plugin.sink import open_sink
    from qitos_mlflow.settings import Settings

    ways = {
        "open_sink": partial(open_sink, tracking_uri=tracking_uri, resumed=True),
        # A segment whose own header is damaged goes where it is told to, or nowhere.
        "default_header": tracking_uri and segment_header(Settings.resolve(), tracking_uri),
    }
    if follow and len(paths) > 1:
        raise click.UsageError(f"--follow watches one directory; {len(paths)} were given")
    if follow:
        _follow(paths[0] if paths else default_directory(), ways)
        return
    delivery = Sync(ways, patience_s)
    delivery.run([look for look in _look(paths) if look.paths.parts()])
    delivery.tell(tracking_uri)
    if delivery.unfinished:
        raise SystemExit(1)


class Sync:
    """One delivery of some segments, one after another.

    Args:
        ways: how `deliver_segment` opens sinks.
        patience_s: how long a server may take nothing before its segments are left.
    """

    def __init__(self, ways: dict[str, Any], patience_s: float) -> None:
        from qitos_mlflow.delivery import Stats

        self.stats = Stats()
        self.ends: list[tuple[SegmentInfo, Outcome]] = []
        self._ways = ways
        self._patience_s = patience_s
        self._stop = threading.Event()
        self._interrupted = False
        self._silent: set[str] = set()
        self._settled = 0
        self._settled_at = 0.0

    def run(self, segments: Iterable[SegmentInfo]) -> None:
        """Deliver `segments`, with a progress bar where there is a terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from qitos_mlflow.delivery import Outcome, deliver_segment

        segments = list(segments)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        progress = Progress(*columns, transient=True)
        progress.disable = not progress.console.is_terminal
        with _signals(self._interrupt), progress:
            bar = progress.add_task("records", total=sum(s.waiting for s in segments))

            def moved(_: Stats) -> None:
                progress.update(bar, completed=self._look())

            for segment in segments:
                to = destination_of(header_of(segment))
                if self._interrupted or to in self._silent:
                    self.ends.append((segment, Outcome.UNFINISHED))
                    continue
                self._stop.clear()
                self._settled_at = time.monotonic()
                outcome = deliver_segment(
                    segment.paths, stop=self._stop, stats=self.stats, progress=moved, **self._ways
                )
                self.ends.append((segment, outcome))
                if outcome is Outcome.UNFINISHED:
                    self._silent.add(to)  # Its other segments would wait as long, in vain.

    @property
    def unfinished(self) -> list[tuple[SegmentInfo, Outcome]]:
        """The segments that are left and that nobody else is delivering."""
        from qitos_mlflow.delivery import Outcome

        left = {Outcome.UNFINISHED, Outcome.UNREADABLE}
        return [(segment, outcome) for segment, outcome in self.ends if outcome in left]

    def tell(self, tracking_uri: str | None) -> None:
        """Print what was delivered, what was not, and the next step."""
        from qitos_mlflow.cli._server import ask
        from qitos_mlflow.delivery import Outcome

        counts = self.stats.snapshot()
        done = sum(outcome is Outcome.FINISHED for _, outcome in self.ends)
        busy = sum(outcome is Outcome.BUSY for _, outcome in self.ends)
        click.echo(
            f"{plural(counts.delivered, 'record')} delivered, {plural(done, 'segment')} finished"
            + (f", {busy} delivered by others" if busy else "")
        )
        if counts.dead_letters:
            click.echo(
                f"{plural(counts.dead_letters, 'record')} refused by the server for good; "
                "the reasons: qitos-mlflow status"
            )
        for to in sorted(self._silent):
            answer = ask(tracking_uri or to)
            click.echo(f"{answer.uri} takes nothing: {answer.detail}", err=True)
        for segment, outcome in self.unfinished:
            if outcome is Outcome.UNREADABLE:
                click.echo(
                    f"{segment.paths.stem} does not say where it is to go: its header is damaged. "
                    f"Say it: qitos-mlflow sync --tracking-uri URI {segment.paths.parts()[0][1]}",
                    err=True,
                )
        if self.unfinished:
            click.echo(f"{plural(len(self.unfinished), 'segment')} kept for another time", err=True)

    def _look(self) -> int:
        """How many records are settled; stops the segment when that has not grown for long."""
        counts = self.stats.snapshot()
        settled = counts.delivered + counts.dead_letters
        if settled > self._settled:
            self._settled, self._settled_at = settled, time.monotonic()
        elif time.monotonic() - self._settled_at > self._patience_s:
            self._stop.set()
        return settled

    def _interrupt(self) -> None:
        self._interrupted = True
        self._stop.set()


def _look(paths: tuple[Path, ...]) -> list[SegmentInfo]:
    from qitos_mlflow.delivery import inspect_segment

    return [inspect_segment(segment) for segment in segments_in(paths)]


def _follow(directory: Path, ways: dict[str, Any]) -> None:
    from rich.console import Console

    from qitos_mlflow.delivery import Stats, follow

    if directory.exists() and not directory.is_dir():
        raise click.UsageError(f"--follow watches a directory; {str(directory)!r} is a file")
    stop, stats = threading.Event(), Stats()
    with _signals(stop.set), Console().status("") as status:

        def moved(stats: Stats) -> None:
            counts = stats.snapshot()
            refused = f", {counts.dead_letters} refused for good" if counts.dead_letters else ""
            status.update(f"{directory}: {plural(counts.delivered, 'record')} delivered{refused}")

        follow(directory, stop=stop, stats=stats, progress=moved, **ways)
    click.echo(f"{plural(stats.snapshot().delivered, 'record')} delivered")


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; the second one acts as it always does."""
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        restore()
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
