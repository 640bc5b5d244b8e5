"""Writes docs/cli.md from the commands' own help: `python -m tests.cli.page`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qitos_mlflow.cli import main

WIDTH = 80

HEAD = """\
# The command line

This page is generated from `--help` by `python -m tests.cli.page`; a test compares the two.
If the `qitos-mlflow` script is not on the PATH, use `python -m qitos_mlflow.cli`.

Exit codes: 0 done; 1 not everything could be done, the last line says what is left; 2 an argument
or a setting cannot be used, the message names it. `run` exits with the script's own code. `sync`,
`status`, `compare` and `spool purge` exit with 130 after Ctrl-C and 143 after SIGTERM.
`sync --follow` has no other end: it exits with 0 then, unless it has to break off a request that
takes longer than half a second. Errors and warnings are written to stderr and begin with
`qitos-mlflow: `.
"""


def page() -> str:
    """The text of docs/cli.md."""
    return "\n".join([HEAD, *_sections(main, "qitos-mlflow", None)])


def _sections(command: click.Command, name: str, parent: click.Context | None) -> list[str]:
    context = command.make_context(
        name, [], parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    path = context.command_path
    sections = [f"## {path}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for sub_name in command.list_commands(context):
            sub = command.get_command(context, sub_name)
            if sub is not None:
                sections += _sections(sub, sub_name, context)
    return sections


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/cli.md").write_text(page(), encoding="utf-8")
