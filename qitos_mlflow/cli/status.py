"""`qitos-mlflow status`: what waits in the spool, what was lost and why, and who answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._spool import (
    age,
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
    from qitos_mlflow.delivery import Paths, SegmentInfo

REASON_CHARS = 200
"""So much of a reason is shown; --json has all of it."""

TORN = "torn or corrupt line in the spool"


@click.command()
@paths_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@tracking_uri(otherwise="what the segments have recorded, and MLFLOW_TRACKING_URI")
def status(paths: tuple[Path, ...], as_json: bool, tracking_uri: str | None) -> None:
    """Show what waits in the spool and what was lost.

    By process, and whether it lives; what servers refused for good and what was lost, by reason;
    whether the servers answer. Changes nothing. A run that has ended has its losses in its own tags
    as well. Exits with 1 if a part of the spool cannot be read.

    PATH is the directory of a spool or a file in it; without one, this user's spool is meant.
    """
    found = survey(paths, tracking_uri)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(found)
    if any(segment["error"] for segment in found["segments"]):
        raise SystemExit(1)


def survey(paths: tuple[Path, ...], tracking_uri: str | None) -> dict[str, Any]:
    """All there is to say, as JSON has it. Reads every record that waits; asks each server."""
    from qitos_mlflow.cli._server import ask
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri as destination
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
    from qitos_mlflow.redaction.uris import without_credentials
    from qitos_mlflow.settings import Settings

    lost: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    segments = []
    configured = tracking_uri or destination(Settings.resolve())
    # By what is shown of them; only what is configured here has the credentials as well.
    servers = {without_credentials(configured or ""): configured}
    seen, unreadable = look_at(paths)
    for segment in seen:
        if not (segment.size_bytes or segment.dead_letters or segment.bad_lines or segment.losses):
            continue  # Its process is just beginning or just done.
        try:
            # What the end of a trace tells is in the counts as well, but for what was never
            # offered.
            dropped, experiments = waiting_traces(segment)
            lost += dropped | Counter(segment.losses)
        except OSError as error:
            unreadable[segment.paths] = reason_of(error)
            continue
        segments.append(_described(segment, experiments))
        refused += reasons(segment.paths.dead)
        if segment.bad_lines:
            lost[TORN] += segment.bad_lines
        uri = header_of(segment).get("tracking_uri")
        if segment.size_bytes and uri and is_http(uri):
            servers.setdefault(without_credentials(uri), uri)
    segments += [_unreadable(paths, reason) for paths, reason in unreadable.items()]
    return {
        "directories": [str(path) for path in paths or (default_directory(),)],
        "segments": segments,
        "waiting": sum(segment["waiting"] for segment in segments),
        "dead_letters": dict(refused.most_common()),
        "lost": dict(lost.most_common()),
        "servers": [ask(uri)._asdict() for _, uri in sorted(servers.items())],
    }


def reasons(dead: Path) -> Counter[str]:
    """Why the records in a dead-letter file were refused."""
    found: Counter[str] = Counter()
    try:
        lines = dead.read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            found[str(json.loads(line)["reason"])] += 1
        except (ValueError, KeyError, TypeError):
            found["unknown: the line is torn"] += 1
    return found


def _unreadable(paths: Paths, reason: str) -> dict[str, Any]:
    from qitos_mlflow.delivery import SegmentInfo

    counts = dict.fromkeys(("waiting", "size_bytes", "dead_letters", "bad_lines"), 0)
    nothing = SegmentInfo(
        paths=paths,
        header=None,
        host="",
        pid=0,
        offline=False,
        started_ns=0,
        last_time_ns=0,
        owner_alive=False,
        delivering=False,
        losses={},
        damaged=(),
        **counts,
    )
    return {**_described(nothing, set()), "owner": "unknown", "error": reason}


def _process(paths: Paths) -> str:
    # Delivered to its end, a segment is gone but for what was refused; its name still tells.
    return paths.stem.rsplit("-", 2)[0]


def _described(segment: SegmentInfo, experiments: set[str]) -> dict[str, Any]:
    header = header_of(segment)
    return {
        "segment": segment.paths.stem,
        "directory": str(segment.paths.directory),
        "error": None,
        "destination": destination_of(header) if segment.size_bytes else "",
        "experiments": sorted(experiments),
        "process": _process(segment.paths),
        "host": segment.host,
        "pid": segment.pid,
        "owner": "alive" if segment.owner_alive else "dead",
        "offline": segment.offline,
        "shipping": segment.delivering,
        "waiting": segment.waiting,
        "dead_letters": segment.dead_letters,
        "bad_lines": segment.bad_lines,
        "lost": dict(segment.losses),
        "bytes": segment.size_bytes,
        "last_record_ns": segment.last_time_ns,
    }


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if found["segments"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("process", "owner", "waiting", "refused", "last record", "destination"):
            table.add_column(heading, overflow="fold")
        for segment in found["segments"]:
            owner = segment["owner"] + (", offline" if segment["offline"] else "")
            row = (
                *(segment["process"], owner, str(segment["waiting"])),
                str(segment["dead_letters"]),
                age(segment["last_record_ns"]) if segment["last_record_ns"] else "",
                segment["destination"],
            )
            table.add_row(*map(escape, row))
        console.print(table)
    where = ", ".join(found["directories"])
    count = plural(found["waiting"], "record")
    click.echo(f"{count} in {plural(len(found['segments']), 'segment')} wait in {where}")
    for title, counts in (("refused for good", found["dead_letters"]), ("lost", found["lost"])):
        for reason, number in counts.items():
            line = " ".join(reason.split())
            click.echo(f"{number} {title}: {line[:REASON_CHARS]}")
    if found["dead_letters"]:
        kept = ", ".join(str(Path(where, "*.dead")) for where in _directories(found))
        click.echo(f"What was refused is kept in {kept}; nothing sends it again")
    for server in found["servers"]:
        state = {True: " answers", False: " does not answer", None: ""}[server["reachable"]]
        click.echo(f"{server['uri']}{state}: {server['detail']}")
    for segment in found["segments"]:
        if segment["error"]:
            click.echo(f"{segment['segment']} cannot be read: {segment['error']}", err=True)
    if any(s["waiting"] and s["owner"] == "dead" for s in found["segments"]):
        click.echo("Deliver what dead processes left behind: qitos-mlflow sync")


def _directories(found: dict[str, Any]) -> list[str]:
    return sorted({segment["directory"] for segment in found["segments"]})
