"""`qitos-mlflow`: what a person types. A file a command, imported when that command is asked for.

Nothing here is needed by the library, and importing this package imports neither mlflow nor qitos,
so that `qitos-mlflow --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from qitos_mlflow.errors import QitosMlflowError

COMMANDS = ("demo", "plugins", "run", "spool", "status", "sync")
"""Each is a module of this package that holds the click command of the same name."""


class Refused(click.ClickException):
    """What was asked for cannot be done; the text names the value and the next step."""

    exit_code = 2


class Handover(BaseException):
    """Ends click's part of the work; `Commands.main` then calls `then` with nothing around it."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then


class Group(click.Group):
    """A group that tells which commands there are when an unknown one is given."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's answer, but an unknown name is told which ones there are."""
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            known = ", ".join(names)
            raise click.UsageError(f"no command {args[0]!r}; the commands are: {known}", ctx)
        return super().resolve_command(ctx, args)


class Commands(Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, its module imported now; None when there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; our own errors are shown as messages, not as tracebacks."""
        try:
            return super().invoke(ctx)
        except QitosMlflowError as error:  # Their texts are written for whoever reads this.
            raise Refused(str(error)) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Click's work, and then whatever a command handed over."""
        try:
            return super().main(*args, **kwargs)
        except Handover as handover:
            then = handover.then
        # Outside of the handler and of click: what an agent's script raises is its own affair.
        return then()


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qitos-mlflow", prog_name="qitos-mlflow")
def main() -> None:
    """QitOS agent runs in MLflow.

    Begin with `demo`, then start your own agent with `run`. What an agent could not deliver waits
    in the spool, a directory on this machine: `status` shows it, `sync` delivers it.
    """
