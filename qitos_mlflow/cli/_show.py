"""How the commands show things: the one way to stdout and stderr, with clean texts.

A name, a reason or an address may be a server's, a plugin's or a file's of the spool.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any, NoReturn

import click

from qitos_mlflow._texts import clean, traceback_of
from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

MOST_CHARS = 1_000_000
"""Of what a command prints at once."""


class Group(click.Group):
    """A group of commands whose errors are lines of `complain`, never tracebacks."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, except that the error about an unknown name lists the commands."""
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            known = ", ".join(names)
            raise click.UsageError(f"no command {args[0]!r}; the commands are: {known}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line and exit."""
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}) or 0)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            if context is not None:
                help_command = f"{context.command_path} --help"
                echo(f"{context.get_usage()}\nAll options: {help_command}\n", err=True, lines=True)
            text, code = error.format_message(), error.exit_code
        except QitosMlflowError as error:
            text, code = str(error), 2
        except click.Abort:
            text, code = "aborted; nothing was changed", 1
        except Exception as error:
            echo(traceback_of(error), err=True, lines=True)
            text, code = "this is a bug in qitos-mlflow; the traceback is above", 1
        complain(text)
        sys.exit(code)


def echo(text: str, *, err: bool = False, lines: bool = False, own: bool = False) -> None:
    """Print a line, or several; `own` as in `clean`."""
    click.echo(clean(text, MOST_CHARS, lines=lines, own=own), err=err)


def echo_json(value: Any) -> None:
    """Print a value as JSON."""
    from qitos_mlflow.redaction.redact import redact

    click.echo(json.dumps(redact(value), indent=2))  # With \\u… for all that is not ASCII.


def complain(text: str, *, own: bool = False) -> None:
    """Print an error or a warning on stderr, with the program's name in front of it."""
    click.echo(f"qitos-mlflow: {clean(text, own=own)}", err=True)


def show(table: Table) -> None:
    """Print a table whose cells are from `row`."""
    from rich.console import Console

    Console().print(table)


def in_plain(table: Table, width: int) -> str:
    """Such a table as text."""
    from rich.console import Console

    plain = StringIO()
    Console(file=plain, width=width).print(table)
    return plain.getvalue()


def fact(label: str, text: str) -> None:
    """Print a line with a label."""
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((label, "bold"), "  ", clean(text))
    Console().print(line, soft_wrap=True)


@contextmanager
def spinner(text: str = "") -> Iterator[Callable[[str], None]]:
    """Show the text that was given last, if stdout is a terminal."""
    from rich.console import Console
    from rich.markup import escape

    with Console().status(clean(text), spinner="line") as status:
        yield lambda text: status.update(escape(clean(text)))


def row(table: Table, *cells: str | Text) -> None:
    """Add a row to a table."""
    from rich.text import Text

    made = (Text(clean(cell)) if isinstance(cell, str) else cell for cell in cells)
    table.add_row(*made)


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
