"""The command `qitos-mlflow`. Each subcommand is a module that imports what is slow when it runs.

The library needs nothing of this package. Importing it imports neither mlflow nor qitos, so
`qitos-mlflow --help` answers at once. Error lines and warnings begin with "qitos-mlflow: ".
"""

from __future__ import annotations

import click

from qitos_mlflow.cli._show import Group
from qitos_mlflow.cli.compare import compare_command
from qitos_mlflow.cli.demo import demo
from qitos_mlflow.cli.plugins import plugins
from qitos_mlflow.cli.run import run
from qitos_mlflow.cli.spool import spool
from qitos_mlflow.cli.status import status
from qitos_mlflow.cli.sync import sync


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qitos-mlflow", prog_name="qitos-mlflow")
def main() -> None:
    """QitOS agent runs in MLflow.

    Begin with `demo`, then start your own agent with `run`. Records that an agent could not deliver
    wait in the spool, a directory on this machine. `status` shows them, `sync` delivers them.
    """


for _command in (compare_command, demo, plugins, run, spool, status, sync):
    main.add_command(_command)
