"""`qitos-mlflow sync`: delivers what agents have left in spools, of this machine or another."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._show import complain, echo, plural, spinner
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
    from qitos_mlflow.delivery import Delivery, Outcome, SegmentInfo

LEAST_S = 1.0
"""A server that answers has this long for a batch, however small the patience is (seconds)."""


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
    if any(action == "error" for action, *_ in warnings.filters):  # Of PYTHONWARNINGS.
        warnings.simplefilter("default")  # MLflow's own must not keep a store from being opened.
    from qitos_mlflow.delivery import Counts
    from qitos_mlflow.delivery.spool.segments import claim
    from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header
    from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
    from qitos_mlflow.settings import Settings

    server_of = partial(_server_of, tracking_uri)

    def open_sink(header: bytes) -> MlflowSink:
        uri, trusted = server_of(json.loads(header))
        return MlflowSink(header, tracking_uri=uri, trusted=trusted, resumed=True)

    ways: dict[str, Any] = {"open_sink": open_sink}
    if tracking_uri:  # A segment whose own header is damaged goes there, or nowhere.
        settings = Settings.resolve(tracking_uri=tracking_uri)
        ways["default_header"] = segment_header(Destination.of(tracking_uri), settings)
    if follow and len(paths) > 1:
        raise click.UsageError(f"--follow watches one directory; {len(paths)} were given")
    if follow:
        _follow(paths[0] if paths else default_directory(), ways)
        return
    delivery, segments = Sync(ways, patience_s, server_of, paths), _found(paths)
    delivery.run([segment for segment in segments if segment.paths.parts()])
    for segment in segments:  # Of those without records, the deletion may have been cut short.
        with suppress(OSError):
            if not segment.paths.parts() and (taken := claim(segment.paths, Counts())):
                taken.release()
    delivery.show()
    if delivery.left or delivery.counts.put_off:
        raise SystemExit(1)


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


def _server_of(given: str | None, header: dict[str, Any]) -> tuple[str | None, bool]:
    """Where a segment goes, and whether this process's credentials are for that server.

    A segment is data from a disk. What it names gets no credentials, unless MLFLOW_TRACKING_URI or
    the command line names the same server.
    """
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import names_place
    from qitos_mlflow.redaction.redact import without_credentials
    from qitos_mlflow.settings import Settings

    recorded = header.get("tracking_uri")
    configured = given or tracking_uri(Settings.resolve())
    same = configured and without_credentials(configured) == recorded and names_place(recorded)
    if given or same:
        return configured, True
    return recorded, False


class Sync:
    """Delivers some segments, one after another.

    Args:
        ways: how `delivery.take` opens sinks.
        patience_s: how long a server may fail before its segments are left.
        server_of: where a segment with this header goes, and whether credentials are for there.
        paths: as they were given, for the command that is shown.
    """

    def __init__(
        self,
        ways: dict[str, Any],
        patience_s: float,
        server_of: Callable[[dict[str, Any]], tuple[str | None, bool]],
        paths: Sequence[Path] = (),
    ) -> None:
        from qitos_mlflow.delivery import Counts

        self.counts = Counts()
        self.outcomes: Counter[Outcome | None] = Counter()
        self.left = 0
        """How many segments are not delivered."""
        self.problems: dict[str, None] = {}
        """Why they are not, each line once."""
        self._ways = ways
        self._patience_s = patience_s
        self._server_of = server_of
        self._paths = paths
        self._given_up: dict[tuple[str, str | None], str] = {}
        """Servers, and experiments of a server, that are not tried again, each with the line."""

    def run(self, segments: Sequence[SegmentInfo]) -> None:
        """Deliver `segments`, and say how far it is if stdout is a terminal. Ctrl-C ends it."""
        self.left, total = len(segments), plural(sum(s.waiting for s in segments), "record")
        with _interruptible() as ended, spinner(f"0 of {total}") as show:

            def moved() -> None:
                if ended.is_set():
                    raise KeyboardInterrupt
                show(f"{self.counts.delivered + self.counts.dead_letters} of {total}")

            for segment in segments:
                try:
                    problem = self._deliver(segment, moved)
                except OSError as error:
                    problem = f"segment {segment.paths.stem} cannot be read: {reason_of(error)}"
                if problem is None:
                    self.left -= 1
                else:
                    self.problems[problem] = None

    def _deliver(self, segment: SegmentInfo, moved: Callable[[], None]) -> str | None:
        """Deliver a segment. Returns the line for `problems` if that fails."""
        from qitos_mlflow.delivery import Delivery, Outcome, take

        if isinstance(segment.error, (PermissionError, IsADirectoryError)):
            raise segment.error  # This is no loss: another user may deliver it.
        name, header = f"segment {segment.paths.stem}", header_of(segment)
        uri, trusted = self._server_of(header)
        to = destination_of(header, uri)
        experiment = experiment_of(segment)
        given_up = self._given_up.get((to, None)) or self._given_up.get((to, experiment))
        if given_up:
            return given_up
        taken = take(segment.paths, stats=self.counts, **self._ways)
        outcome = self._send(taken, moved) if isinstance(taken, Delivery) else taken
        self.outcomes[outcome] += 1
        if outcome is Outcome.UNREADABLE:
            return (
                f"{name} has a damaged header, so its destination is unknown; give it: "
                f"qitos-mlflow sync --tracking-uri URI {segment.paths.parts()[0][1]}"
            )
        if outcome is not None or not isinstance(taken, Delivery):
            return None
        from qitos_mlflow.cli._server import ask

        problem = taken.circuit.problem
        if taken.circuit.hopeless:
            return self._given_up.setdefault((to, None), str(problem))
        answer = ask(uri, trusted=trusted)
        if answer.reachable is False:
            return self._given_up.setdefault((to, None), f"{to} does not work: {answer.detail}")
        if experiment is None:
            return f"{name} is not taken by {to}: {problem}"
        # The server may accept other experiments.
        if not trusted and str(problem).startswith(("HTTP 401", "HTTP 403")):
            problem = f"{problem}. No credentials were sent: they go to MLFLOW_TRACKING_URI only"
        line = f"{to} does not take the data of experiment {experiment!r}: {problem}"
        return self._given_up.setdefault((to, experiment), line)

    def _send(self, delivery: Delivery, moved: Callable[[], None]) -> Outcome | None:
        """Send a segment; None if nothing was accepted for too long."""
        from qitos_mlflow.delivery.segment_transfer import SEND_TIMEOUT_S

        outcome, circuit = None, delivery.circuit
        with closing(delivery):
            while outcome is None:
                patience_left_s = self._patience_s - circuit.failing_s
                if circuit.problem is not None and not patience_left_s > 0:  # Nor NaN.
                    break
                if circuit.hopeless:
                    break
                # A server may ask for minutes. The last attempt is made when patience ends.
                time.sleep(max(0.0, min(circuit.delay_s, patience_left_s)))
                moved()
                patience_left_s = self._patience_s - circuit.failing_s
                outcome = delivery.step(max(LEAST_S, min(patience_left_s, SEND_TIMEOUT_S)))
        return outcome

    def show(self) -> None:
        """Print what was delivered, what was not, and the next step."""
        from qitos_mlflow.delivery import Outcome

        counts = self.counts
        done, busy = self.outcomes[Outcome.FINISHED], self.outcomes[Outcome.BUSY]
        echo(
            f"{plural(counts.delivered, 'record')} delivered, {plural(done, 'segment')} finished"
            + (f", {busy} being delivered by other processes" if busy else "")
        )
        if refused := counts.dead_letters - counts.put_off:
            echo(
                f"{plural(refused, 'record')} refused by the server or damaged; "
                "the reasons: qitos-mlflow status"
            )
        for line in self.problems:
            complain(line)
        left = [plural(self.left, "segment")] if self.left else []
        left += [plural(counts.put_off, "record")] if counts.put_off else []
        if left:
            complain(
                f"{' and '.join(left)} not delivered; run it again later: "
                + shlex.join(["qitos-mlflow", "sync", *map(str, self._paths)]),
                own=True,
            )


def _follow(directory: Path, ways: dict[str, Any]) -> None:
    from qitos_mlflow.delivery import Counts, follow

    try:
        there = directory.exists()
        if there and not directory.is_dir():
            raise click.UsageError(f"--follow watches a directory; {str(directory)!r} is a file")
    except OSError as error:
        raise QitosMlflowError(f"{str(directory)!r} cannot be read: {reason_of(error)}") from error
    wait = "" if there else ", which does not exist yet"
    total = Counts()
    with _interruptible() as ended, spinner() as update:
        echo(f"Delivering the records in {directory}{wait}; Ctrl-C ends it", err=True, own=True)
        for _ in follow(directory, stats=total, **ways):
            if ended.is_set():
                break
            update(f"{directory}: {plural(total.delivered, 'record')} delivered")
    echo(f"{plural(total.delivered, 'record')} delivered")


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the block; the event says so if a finalizer has swallowed them."""
    ended = threading.Event()

    def end(number: int, frame: object) -> None:
        ended.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # In the background a shell has SIGINT ignored.
        signal.signal(number, end)
    with suppress(KeyboardInterrupt):
        yield ended
