"""Help, versions and the page that is written from them."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qitos_mlflow import cli
from qitos_mlflow.cli import main
from tests.cli.conftest import Run
from tests.cli.page import page

ROOT = Path(__file__).parents[2]


def test_the_page_in_docs_is_the_help_there_is() -> None:
    """docs/cli.md is what `python -m tests.cli.page` writes now."""
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page()


def test_every_command_is_a_module_and_in_the_help() -> None:
    """The list of commands, their modules and the help agree."""
    modules = {path.stem for path in Path(cli.__file__).parent.glob("[a-z]*.py")}
    assert modules == set(main.commands)
    shown = CliRunner().invoke(main, ["--help"]).output
    assert re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE) == list(main.commands)


def test_help_imports_neither_mlflow_nor_qitos(python: Run) -> None:
    """The help of everything is there at once: the two slow imports do not happen."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.cli.page import page\n"
        "page()\n"
        "print([name for name in ('mlflow', 'qitos', 'rich', 'requests') if name in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout == "[]\n", done.stderr


def test_the_error_about_an_unknown_command_lists_the_commands(python: Run) -> None:
    """A mistyped command exits with 2 and the list of commands."""
    got = python("-m", "qitos_mlflow.cli", "snyc")
    assert got.returncode == 2
    assert "no command 'snyc'; the commands are: compare, demo, plugins, run" in got.stderr


@pytest.mark.parametrize("option", ["--tracking-uri", "--experiment-name"])
def test_shared_options_mean_the_same_everywhere(option: str) -> None:
    """A shared option has one type and one meaning in every command that has it."""
    kinds = set()
    for command in main.commands.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and option in parameter.opts:
                assert parameter.help is not None
                kinds.add((type(parameter.type).__name__, parameter.help.split("  [default")[0]))
    assert len(kinds) == 1


def test_a_setting_that_cannot_be_used_is_named_without_a_traceback(python: Run) -> None:
    """The error names a wrong environment variable and its value; the exit code is 2."""
    got = python("-m", "qitos_mlflow.cli", "demo", QITOS_MLFLOW_EXIT_TIMEOUT_S="soon")
    assert got.returncode == 2
    assert "QITOS_MLFLOW_EXIT_TIMEOUT_S='soon' cannot be used" in got.stderr
    assert "Traceback" not in got.stderr


@pytest.mark.parametrize("args", [("snyc",), ("status", "no"), ("sync", "--no")])
def test_error_lines_begin_with_the_name_of_the_program(args: tuple[str, ...]) -> None:
    """The last line of an error says who speaks, whatever kind of error it is."""
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2
    assert done.output.splitlines()[-1].startswith("qitos-mlflow: ")
