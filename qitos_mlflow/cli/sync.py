"""`qitos-mlflow sync`: delivers what agents have left in spools, of this machine or another."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli import Refused
from qitos_mlflow.cli._options import seconds, tracking_uri
from qitos_mlflow.cli._spool import (
    default_directory,
    destination_of,
    header_of,
    look_at,
    paths_argument,
    plural,
    reason_of,
    waiting_traces,
)

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Counts, Outcome, Paths, SegmentInfo

PATIENCE_S = "30"
"""So long (seconds, as --help shows it) a server may take nothing before `sync` leaves the rest."""


@click.command()
@paths_argument
@click.option(
    "--follow",
    is_flag=True,
    help="Keep running and deliver what comes, as a sidecar, until interrupted.",
)
@tracking_uri(otherwise="what each segment has recorded")
@click.option(
    "--patience",
    "patience_s",
    metavar="SECONDS",
    callback=seconds,
    default=PATIENCE_S,
    show_default=True,
    help="Give up on a server that takes nothing for so long; not with --follow.",
)
def sync(
    paths: tuple[Path, ...], follow: bool, tracking_uri: str | None, patience_s: float
) -> None:
    """Deliver what is left in the spool.

    Agents deliver for themselves while they live, unless they work offline. This is for the rest:
    the server was away for too long, or the process died, whose runs are closed as KILLED. Any
    number of syncs may run at once, and beside running agents. Exits with 1 if something is left,
    and says why.

    PATH is the directory of a spool or a file in it, of another machine as well; without one, this
    user's spool is meant.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # It tells of tables it makes.
    from qitos_mlflow.mlflow_plugin.destination import default_header
    from qitos_mlflow.mlflow_plugin.sink.sink import open_sink
    from qitos_mlflow.settings import Settings

    def uri_of(header: dict[str, Any]) -> str | None:
        return tracking_uri or _with_credentials(header.get("tracking_uri"))

    ways = {
        "open_sink": lambda header: open_sink(
            header, tracking_uri=uri_of(json.loads(header)), resumed=True
        ),
        # A segment whose own header is damaged goes where it is told to, or nowhere.
        "default_header": tracking_uri
        and default_header(Settings.resolve(tracking_uri=tracking_uri), tracking_uri),
    }
    if follow and len(paths) > 1:
        raise click.UsageError(f"--follow watches one directory; {len(paths)} were given")
    if follow:
        _follow(paths[0] if paths else default_directory(), ways)
        return
    segments, unreadable = look_at(paths)
    delivery = Sync(ways, patience_s, uri_of)
    delivery.problems.update(unreadable)
    delivery.run([segment for segment in segments if segment.paths.parts()])
    delivery.tell()
    if delivery.unfinished:
        raise SystemExit(1)


def _with_credentials(recorded: str | None) -> str | None:
    """A segment's URI, with what MLFLOW_TRACKING_URI has in it and a segment must not."""
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri
    from qitos_mlflow.redaction.uris import without_credentials
    from qitos_mlflow.settings import Settings

    configured = tracking_uri(Settings.resolve())
    return configured if configured and without_credentials(configured) == recorded else recorded


class Sync:
    """One delivery of some segments, one after another.

    Args:
        ways: how `deliver_segment` opens sinks.
        patience_s: how long a server may take nothing before its segments are left.
        uri_of: where the segment with a header goes.
    """

    def __init__(
        self,
        ways: dict[str, Any],
        patience_s: float,
        uri_of: Callable[[dict[str, Any]], str | None],
    ) -> None:
        from qitos_mlflow.delivery import Counts

        self.stats = Counts()
        self.outcomes: Counter[Outcome] = Counter()
        self.problems: dict[Paths, str] = {}
        """Why segments are left that nobody else is delivering; empty where that is said once."""
        self._ways = ways
        self._patience_s = patience_s
        self._uri_of = uri_of
        self._stop = threading.Event()
        self._interrupted = False
        self._silent: dict[tuple[str, str | None], str] = {}
        self._failure = ""
        self._settled = 0
        self._settled_at = 0.0

    def run(self, segments: Iterable[SegmentInfo]) -> None:
        """Deliver `segments`, with a progress bar where there is a terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        segments = list(segments)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        progress = Progress(*columns, transient=True)
        # Elsewhere it would leave an empty line behind (rich 13).
        shown = progress if progress.console.is_terminal else nullcontext()
        with _signals(self._interrupt), shown:
            bar = progress.add_task("records", total=sum(s.waiting for s in segments))
            for segment in segments:
                self._deliver(segment, lambda: progress.update(bar, completed=self._look()))

    def _deliver(self, segment: SegmentInfo, moved: Callable[[], None]) -> None:
        from qitos_mlflow.delivery import Outcome, deliver_segment
        from qitos_mlflow.redaction.uris import without_credentials

        header = header_of(segment)
        uri = self._uri_of(header)
        try:
            experiment = ", ".join(sorted(waiting_traces(segment)[1])) or None
        except OSError as error:
            self.problems[segment.paths] = reason_of(error)
            return
        to = without_credentials(uri) if uri else destination_of(header)
        if self._interrupted or self._silent.keys() & {(to, None), (to, experiment)}:
            self.problems[segment.paths] = ""
            return
        self._stop.clear()
        self._settled_at = time.monotonic()
        self._failure = "no progress"
        try:
            outcome = deliver_segment(
                segment.paths,
                stop=self._stop,
                stats=self.stats,
                progress=lambda _: moved(),
                failed=self._failed,
                **self._ways,
            )
        except OSError as error:
            self.problems[segment.paths] = reason_of(error)
            return
        self.outcomes[outcome] += 1
        if outcome is Outcome.UNREADABLE:
            self.problems[segment.paths] = (
                "its header is damaged, so its destination is unknown. Name it: "
                f"qitos-mlflow sync --tracking-uri URI {segment.paths.parts()[0][1]}"
            )
        elif outcome is Outcome.UNFINISHED:
            self.problems[segment.paths] = ""
            if not self._interrupted:
                self._give_up(to, experiment, uri)

    def _give_up(self, to: str, experiment: str | None, uri: str | None) -> None:
        """Try no further segment that would wait as long, in vain."""
        from qitos_mlflow.cli._server import ask

        answer = ask(uri)
        if answer.reachable is False:
            self._silent[to, None] = answer.detail
        else:  # Its other experiments may be open to us.
            self._silent[to, experiment] = self._failure

    @property
    def unfinished(self) -> int:
        """How many segments are left that nobody else is delivering."""
        return len(self.problems)

    def tell(self) -> None:
        """Print what was delivered, what was not, and the next step."""
        from qitos_mlflow.delivery import Outcome

        counts = self.stats.snapshot()
        done, busy = self.outcomes[Outcome.FINISHED], self.outcomes[Outcome.BUSY]
        click.echo(
            f"{plural(counts.delivered, 'record')} delivered, {plural(done, 'segment')} finished"
            + (f", {busy} delivered by others" if busy else "")
        )
        if counts.dead_letters:
            click.echo(
                f"{plural(counts.dead_letters, 'record')} refused by the server for good; "
                "the reasons: qitos-mlflow status"
            )
        for (to, experiment), reason in self._silent.items():
            what = f"nothing for experiment {experiment!r}" if experiment else "nothing"
            click.echo(f"{to} takes {what}: {reason}", err=True)
        for paths, reason in self.problems.items():
            if reason:
                click.echo(f"{paths.stem}: {reason}", err=True)
        if self.problems:
            click.echo(f"{plural(self.unfinished, 'segment')} kept for another time", err=True)

    def _look(self) -> int:
        """How many records are settled; stops the segment when that has not grown for long."""
        counts = self.stats.snapshot()
        settled = counts.delivered + counts.dead_letters
        if settled > self._settled:
            self._settled, self._settled_at = settled, time.monotonic()
        elif time.monotonic() - self._settled_at > self._patience_s:
            self._stop.set()
        return settled

    def _failed(self, reason: str) -> None:
        self._failure = reason

    def _interrupt(self) -> None:
        self._interrupted = True
        self._stop.set()


def _follow(directory: Path, ways: dict[str, Any]) -> None:
    from rich.console import Console

    from qitos_mlflow.delivery import Counts, follow

    try:
        there = directory.exists()
        if there and not directory.is_dir():
            raise click.UsageError(f"--follow watches a directory; {str(directory)!r} is a file")
    except OSError as error:
        raise Refused(f"{str(directory)!r} cannot be read: {reason_of(error)}") from error
    wait = "" if there else ", which is not there yet"
    click.echo(f"Delivering what comes to {directory}{wait}; Ctrl-C ends it", err=True)
    stop, stats = threading.Event(), Counts()
    with _signals(stop.set), Console().status("") as status:

        def moved(stats: Counts) -> None:
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
