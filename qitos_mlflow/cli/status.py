"""`qitos-mlflow status`: what waits, what was refused or lost and why, which servers answer."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli._endings import ends_on_signals
from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._show import age, complain, echo, echo_json, plural, row, show, table
from qitos_mlflow.cli._spool import (
    RECORD_BYTES,
    default_directory,
    destination_of,
    experiment_of,
    header_of,
    look_at,
    paths_argument,
    reason_of,
)

if TYPE_CHECKING:
    from qitos_mlflow.delivery import Paths, SegmentInfo
    from qitos_mlflow.mlflow_plugin.trust import Trust

REASON_CHARS = 200
"""Reasons are cut to this many characters; --json has them whole."""

PUT_OFF = ("NO_ARTIFACTS", "NO_TRACE")
"""Reasons of what `sync` sends again: files, and scores whose trace was not on the server."""


NEXT = {
    "": "Deliver the records of dead processes",
    "--trust": "Deliver also what another user may have written, if you trust its author",
    "--tracking-uri URI": "Deliver those whose server takes credentials to the one that you name",
}
"""The next step for dead processes' records, by what `sync` needs."""


@click.command()
@paths_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@tracking_uri(otherwise="what the segments have recorded, and MLFLOW_TRACKING_URI")
def status(paths: tuple[Path, ...], as_json: bool, tracking_uri: str | None) -> None:
    """Show what waits in the spool and what was lost.

    Lists the records that wait for each process and whether the process lives, the records that
    were refused, damaged or lost, by reason, and whether the servers answer. Changes no file. A run
    that has ended also has its losses in its tags. Exits with 1 if a part of the spool cannot be
    read.

    PATH is a spool directory or a file in it. The default is this user's spool.
    """
    with ends_on_signals(lambda: "nothing was changed"):
        found = survey(paths, tracking_uri)
    if as_json:
        echo_json(found)
    else:
        _show(found)
    if any(segment["error"] for segment in found["segments"]):
        raise SystemExit(1)


def survey(paths: tuple[Path, ...], tracking_uri: str | None) -> dict[str, Any]:
    """The content of --json. Reads every record that waits and asks each server."""
    from qitos_mlflow.cli._server import ask
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri as destination
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
    from qitos_mlflow.mlflow_plugin.trust import Trust
    from qitos_mlflow.redaction.redact import without_credentials
    from qitos_mlflow.settings import Settings

    lost: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    segments = []
    configured = destination(Settings.resolve(tracking_uri=tracking_uri))
    named = Trust(configured, given=bool(tracking_uri))
    # The key is the URI as shown. Segments have no credentials, the configuration may have.
    servers = {without_credentials(configured or ""): configured}
    for segment in look_at(paths):
        known = segment.dead_letters or segment.losses or segment.restarts
        if not (segment.size_bytes or known or segment.error):
            continue  # The process has just started or just ended.
        segments.append(_described(segment) | {"needs": _needs(segment, named)})
        # A trace's end repeats what is in the segment's counts; the larger number is right, because
        # the counts miss what was never offered.
        lost += lost_spans(segment.paths) | Counter(segment.losses)
        refused += Counter(segment.dead_letters)
        uri = header_of(segment).get("tracking_uri")
        if segment.size_bytes and uri and is_http(uri):
            servers.setdefault(without_credentials(uri), uri)
    return {
        "directories": [str(path) for path in paths or (default_directory(),)],
        "segments": segments,
        "waiting": sum(segment["waiting"] for segment in segments),
        "dead_letters": dict(refused.most_common()),
        "lost": dict(lost.most_common()),
        "restarts": sum(segment["restarts"] for segment in segments),
        "servers": [
            ask(uri, trusted=uri is configured)._asdict() for _, uri in sorted(servers.items())
        ],
    }


def lost_spans(paths: Paths) -> Counter[str]:
    """Lost spans, by reason, of traces whose end still waits. The rest is in tags of the runs."""
    from qitos_mlflow.delivery import json_object, waiting_records

    lost: Counter[str] = Counter()
    for record in waiting_records(paths):
        if b'"trace_end"' in record and len(record) <= RECORD_BYTES:
            content = json_object(record)  # The sink refuses what is none, and says why.
            dropped = content.get("dropped") if content.get("kind") == "trace_end" else None
            if isinstance(dropped, dict):
                lost.update({key: n for key, n in dropped.items() if type(n) is int and n > 0})
    return lost


def _needs(segment: SegmentInfo, named: Trust) -> str:
    """The option of `sync` that the segment needs."""
    return named.way(header_of(segment), segment.paths).needs if segment.size_bytes else ""


def _described(segment: SegmentInfo) -> dict[str, Any]:
    stem = segment.paths.stem
    return {
        "segment": stem,
        "directory": str(segment.paths.directory),
        "error": reason_of(segment.error) if segment.error else None,
        # A delivered segment has no header any more, only the file of what was refused.
        "destination": destination_of(header_of(segment)) if segment.size_bytes else "",
        "experiment": experiment_of(segment) if segment.size_bytes else None,
        "process": stem.rsplit("-", 2)[0],
        "host": segment.head.machine,
        "pid": segment.head.pid,
        "owner": "unknown" if segment.error else "alive" if segment.owner_alive else "dead",
        "offline": segment.head.offline,
        "delivering": segment.delivering,
        "waiting": segment.waiting,
        "dead_letters": sum(segment.dead_letters.values()),
        "put_off": sum(
            number for reason, number in segment.dead_letters.items() if reason.startswith(PUT_OFF)
        ),
        "lost": dict(segment.losses),
        "restarts": segment.restarts,
        "bytes": segment.size_bytes,
        "last_record_ns": segment.last_time_ns,
    }


def _show(found: dict[str, Any]) -> None:
    from rich.filesize import decimal

    segments = found["segments"]
    if segments:
        rows = table("process", "owner", "waiting", "refused", "last record", "destination")
        for segment in segments:
            row(
                rows,
                segment["process"],
                segment["owner"] + (", offline" if segment["offline"] else ""),
                str(segment["waiting"]),
                str(segment["dead_letters"]),
                age(segment["last_record_ns"]) if segment["last_record_ns"] else "",
                segment["destination"],
            )
        show(rows)
    count = f"{plural(found['waiting'], 'record')} in {plural(len(segments), 'segment')}"
    if size := sum(segment["bytes"] for segment in segments):
        count += f" ({decimal(size)})"
    echo(f"{count} wait in {', '.join(found['directories'])}", own=True)
    for title, counts in (
        ("refused, put off or damaged", found["dead_letters"]),
        ("lost", found["lost"]),
    ):
        for reason, number in counts.items():
            echo(f"{number} {title}: {' '.join(reason.split())[:REASON_CHARS]}")
    if restarts := found["restarts"]:
        times = plural(restarts, "time")
        echo(f"Background threads failed {times} and went on; the agents' logs say why")
    if found["dead_letters"]:
        directories = sorted({segment["directory"] for segment in segments})
        kept = ", ".join(str(Path(directory, "*.dead")) for directory in directories)
        echo(f"These records are kept in {kept}; only those that were put off are sent again")
    for server in found["servers"]:
        state = {True: " answers", False: " does not answer", None: ""}[server["reachable"]]
        echo(f"{server['uri']}{state}: {server['detail']}")
    dead = [s for s in segments if (s["waiting"] or s["put_off"]) and s["owner"] == "dead"]
    for needs, what in NEXT.items():
        # With the path: another environment, such as another HOME, has another default.
        if given := sorted({one["directory"] for one in dead if one["needs"] == needs}):
            command = shlex.join(["qitos-mlflow", "sync", *needs.split(), *given])
            echo(f"{what}: {command}", own=True)
    for segment in segments:
        if segment["error"]:
            complain(f"segment {segment['segment']} cannot be read: {segment['error']}")
