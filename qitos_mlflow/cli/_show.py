"""How the commands show things: error lines, tables, counts and ages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table


def complain(text: str) -> None:
    """Print an error or a warning on stderr, with the program's name in front of it."""
    click.echo(f"qitos-mlflow: {text}", err=True)


def table(*headings: str) -> Table:
    """A table without borders; a heading that begins with ">" makes its column right-aligned."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        right = heading.startswith(">")
        made.add_column(heading.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return made


def plural(count: int, noun: str) -> str:
    """Such as "1 record" and "2 records"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def age(time_ns: int) -> str:
    """How long ago `time_ns` is (nanoseconds since the epoch), such as "5 min ago"."""
    seconds = max(0.0, time.time() - time_ns / 1e9)
    for unit, size_s in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size_s:
            return f"{seconds / size_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
