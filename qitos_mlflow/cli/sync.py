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

from qitos_mlflow.cli._options import seconds, tracking_uri
from qitos_mlflow.cli._show import complain, plural
from qitos_mlflow.cli._spool import (
    default_directory,
    destination_of,
    experiment_of,
    header_of,
    look_at,
    paths_argument,
    reason_of,
)
from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Counts, Outcome, Paths, SegmentInfo

PATIENCE_S = "30"
"""Default of --patience (seconds, as text for --help)."""


@click.command()
@paths_argument
@click.option("--follow", is_flag=True, help="Keep running as a sidecar; Ctrl-C ends it.")
@tracking_uri(otherwise="what each segment has recorded")
@click.option(
    "--patience",
    "patience_s",
    metavar="SECONDS",
    callback=seconds,
    default=PATIENCE_S,
    show_default=True,
    help="Give up on a server that has accepted nothing for this long. Without effect if --follow "
    "is given.",
)
def sync(
    paths: tuple[Path, ...], follow: bool, tracking_uri: str | None, patience_s: float
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
    from qitos_mlflow.mlflow_plugin.destination import default_header
    from qitos_mlflow.mlflow_plugin.sink.sink import open_sink
    from qitos_mlflow.settings import Settings

    def uri_of(header: dict[str, Any]) -> str | None:
        return tracking_uri or _with_credentials(header.get("tracking_uri"))

    ways = {
        "open_sink": lambda header: open_sink(
            header, tracking_uri=uri_of(json.loads(header)), resumed=True
        ),
        # A segment whose own header is damaged goes where --tracking-uri says, or nowhere.
        "default_header": tracking_uri
        and default_header(Settings.resolve(tracking_uri=tracking_uri), tracking_uri),
    }
    if follow and len(paths) > 1:
        raise click.UsageError(f"--follow watches one directory; {len(paths)} were given")
    if follow:
        _follow(paths[0] if paths else default_directory(), ways)
        return
    segments = [segment for segment in look_at(paths) if segment.paths.parts()]
    delivery = Sync(ways, patience_s, uri_of)
    # What this user may not read is no loss: another user may deliver it.
    denied = (PermissionError, IsADirectoryError)
    for segment in segments:
        if isinstance(segment.error, denied):
            delivery.problems[segment.paths] = f"cannot be read: {reason_of(segment.error)}"
    delivery.run([segment for segment in segments if segment.paths not in delivery.problems])
    delivery.show()
    if delivery.problems:
        raise SystemExit(1)


def _with_credentials(recorded: str | None) -> str | None:
    """A segment's URI, with the credentials of MLFLOW_TRACKING_URI if it is the same server."""
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri
    from qitos_mlflow.redaction.redact import without_credentials
    from qitos_mlflow.settings import Settings

    configured = tracking_uri(Settings.resolve())
    return configured if configured and without_credentials(configured) == recorded else recorded


class Sync:
    """Delivers some segments, one after another.

    Args:
        ways: how `deliver_segment` opens sinks.
        patience_s: how long a server may accept nothing before its segments are left.
        uri_of: the destination of a segment with this header.
    """

    def __init__(
        self,
        ways: dict[str, Any],
        patience_s: float,
        uri_of: Callable[[dict[str, Any]], str | None],
    ) -> None:
        from qitos_mlflow.delivery import Counts

        self.counts = Counts()
        self.outcomes: Counter[Outcome] = Counter()
        self.problems: dict[Paths, str] = {}
        """The segments not delivered, each with its reason; "" if another line says why."""
        self._ways = ways
        self._patience_s = patience_s
        self._uri_of = uri_of
        self._stop = threading.Event()
        self._interrupted = False
        self._given_up: dict[tuple[str, str | None], str] = {}
        """Servers, and experiments of a server, that are not tried again, each with the reason."""
        self._failure = ""
        self._settled = 0
        self._settled_at = 0.0

    def run(self, segments: Iterable[SegmentInfo]) -> None:
        """Deliver `segments`. Shows a progress bar if stdout is a terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        segments = list(segments)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        progress = Progress(*columns, transient=True)
        # Without a terminal rich 13 leaves an empty line behind.
        shown = progress if progress.console.is_terminal else nullcontext()
        with _signals(self._interrupt), shown:
            bar = progress.add_task("records", total=sum(s.waiting for s in segments))
            for segment in segments:
                self._deliver(segment, lambda: progress.update(bar, completed=self._look()))

    def _deliver(self, segment: SegmentInfo, moved: Callable[[], None]) -> None:
        from qitos_mlflow.delivery import Outcome, deliver_segment
        from qitos_mlflow.redaction.redact import without_credentials

        header, paths = header_of(segment), segment.paths
        uri = self._uri_of(header)
        to = without_credentials(uri) if uri else destination_of(header)
        try:
            experiment = experiment_of(segment)
            if self._interrupted or self._given_up.keys() & {(to, None), (to, experiment)}:
                self.problems[paths] = ""
                return
            self._stop.clear()
            self._settled_at = time.monotonic()
            self._failure = f"nothing was accepted for {self._patience_s:g} s"
            outcome = deliver_segment(
                paths,
                stop=self._stop,
                stats=self.counts,
                progress=lambda _: moved(),
                failed=self._failed,
                **self._ways,
            )
        except OSError as error:
            self.problems[paths] = f"cannot be read: {reason_of(error)}"
            return
        self.outcomes[outcome] += 1
        if outcome is Outcome.UNREADABLE:
            self.problems[paths] = (
                "has a damaged header, so its destination is unknown; give it: "
                f"qitos-mlflow sync --tracking-uri URI {paths.parts()[0][1]}"
            )
        elif outcome is Outcome.UNFINISHED:
            self.problems[paths] = "" if self._interrupted else self._give_up(to, experiment, uri)

    def _give_up(self, to: str, experiment: str | None, uri: str | None) -> str:
        """Remember what not to try again. Returns what to say about this segment alone."""
        from qitos_mlflow.cli._server import ask

        answer = ask(uri)
        if answer.reachable is False:
            self._given_up[to, None] = answer.detail
        elif experiment is None:
            return f"rejected by {to}: {self._failure}"
        else:  # The server may accept other experiments.
            self._given_up[to, experiment] = self._failure
        return ""

    def show(self) -> None:
        """Print what was delivered, what was not, and the next step."""
        from qitos_mlflow.delivery import Outcome

        counts = self.counts
        done, busy = self.outcomes[Outcome.FINISHED], self.outcomes[Outcome.BUSY]
        click.echo(
            f"{plural(counts.delivered, 'record')} delivered, {plural(done, 'segment')} finished"
            + (f", {busy} being delivered by other processes" if busy else "")
        )
        if counts.dead_letters:
            click.echo(
                f"{plural(counts.dead_letters, 'record')} refused by the server or damaged; "
                "the reasons: qitos-mlflow status"
            )
        for (to, experiment), reason in self._given_up.items():
            if experiment is None:
                complain(f"{to} is unreachable: {reason}")
            else:
                complain(f"{to} rejected the data of experiment {experiment!r}: {reason}")
        for paths, reason in self.problems.items():
            if reason:
                complain(f"segment {paths.stem} {reason}")
        if self.problems:
            left = plural(len(self.problems), "segment")
            complain(f"{left} not delivered; run `qitos-mlflow sync` again later")

    def _look(self) -> int:
        """How many records are settled. Ends the delivery of a segment that makes no progress."""
        counts = self.counts
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
        raise QitosMlflowError(f"{str(directory)!r} cannot be read: {reason_of(error)}") from error
    wait = "" if there else ", which does not exist yet"
    click.echo(f"Delivering the records in {directory}{wait}; Ctrl-C ends it", err=True)
    stop, total = threading.Event(), Counts()
    with _signals(stop.set), Console().status("") as status:

        def moved(stats: Counts) -> None:
            refused = f", {stats.dead_letters} refused or damaged" if stats.dead_letters else ""
            status.update(f"{directory}: {plural(stats.delivered, 'record')} delivered{refused}")

        follow(directory, stop=stop, stats=total, progress=moved, **ways)
    click.echo(f"{plural(total.delivered, 'record')} delivered")


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM. The second one acts as without this."""
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
