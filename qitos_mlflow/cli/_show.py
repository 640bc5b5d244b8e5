"""How the commands show things: error lines, tables, counts and ages."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import click

from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from rich.table import Table


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
                click.echo(f"{context.get_usage()}\nAll options: {help_command}\n", err=True)
            text, code = error.format_message(), error.exit_code
        except QitosMlflowError as error:
            text, code = str(error), 2
        except click.Abort:
            text, code = "aborted; nothing was changed", 1
        complain(text)
        sys.exit(code)


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
