"""The command `qitos-mlflow`. Each subcommand is one module, imported when it is used.

The library needs nothing of this package. Importing it imports neither mlflow nor qitos, so
`qitos-mlflow --help` answers at once. Error lines and warnings begin with "qitos-mlflow: ".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import click

from qitos_mlflow.cli._show import complain
from qitos_mlflow.errors import QitosMlflowError

COMMANDS = ("demo", "plugins", "run", "spool", "status", "sync")
"""Modules of this package. Each has a click command of the same name."""


class Refused(QitosMlflowError):
    """The command cannot do what was asked. The text names the value and the next step."""


class Handover(BaseException):
    """Ends click's part; `Commands.main` then calls `then` outside of all handlers."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then


class Group(click.Group):
    """A group whose error about an unknown command lists the commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, except that the error about an unknown name lists the commands."""
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

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line and exit, or call the function that a command handed over.

        Errors of this package become messages instead of tracebacks.
        """
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.exit(code or 0)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            if context is not None:
                help_command = f"{context.command_path} --help"
                click.echo(f"{context.get_usage()}\nAll options: {help_command}\n", err=True)
            complain(error.format_message())
            sys.exit(error.exit_code)
        except QitosMlflowError as error:
            complain(str(error))
            sys.exit(2)
        except click.Abort:
            complain("aborted; nothing was changed")
            sys.exit(1)
        except Handover as handover:
            then = handover.then
        # Outside of the handlers, so that a script's own exception has no context of ours.
        then()
        sys.exit(0)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qitos-mlflow", prog_name="qitos-mlflow")
def main() -> None:
    """QitOS agent runs in MLflow.

    Begin with `demo`, then start your own agent with `run`. Records that an agent could not deliver
    wait in the spool, a directory on this machine. `status` shows them, `sync` delivers them.
    """
