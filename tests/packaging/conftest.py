"""The wheel under test, and virtual environments to install it into."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment of its own, with nothing in it, made from the Python in use."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory)
        self.python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site_packages = Path(self.run("-c", where).strip())

    def run(self, *arguments: str, **environment: str) -> str:
        """Run its Python, which must succeed without a word on stderr; returns its stdout."""
        return self._run(self.python, *arguments, **environment)

    def _run(self, *command: str | Path, **environment: str) -> str:
        done = subprocess.run(
            command,
            env={**_plain_environment(), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: str) -> str:
        """Run pip for it, quietly and without a look at other versions of itself.

        The pip of the Python in use: to give each environment its own takes 4 s.
        """
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        return self._run(*pip, "--quiet", "--disable-pip-version-check", *arguments)

    def startup_files(self) -> list[str]:
        """The start-up files of ours at the root of its site-packages."""
        return sorted(path.name for path in self.site_packages.glob("qitos_mlflow.*"))


def _plain_environment() -> dict[str, str]:
    """The environment without what would lead the other Python to this one's packages."""
    unwanted = {"PYTHONPATH", "VIRTUAL_ENV", "QITOS_TRACE_PLUGINS"}
    return {name: value for name, value in os.environ.items() if name not in unwanted}


@pytest.fixture(scope="session")
def source_tree() -> Path:
    """The project as checked out; CI runs the tests from a copy that lacks the package."""
    return Path(os.environ.get("SOURCE_TREE", ROOT))


@pytest.fixture(scope="session")
def wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that CI tests, or one built now."""
    if given := os.environ.get("WHEEL_UNDER_TEST"):
        return Path(given)
    pytest.importorskip("build", reason="`build` is not installed, and no wheel was given")
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", f"--outdir={directory}", str(source_tree)]
    subprocess.run(command, check=True, capture_output=True)
    return next(directory.glob("*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A virtual environment of the test's own, empty."""
    return Environment(tmp_path / "venv")
