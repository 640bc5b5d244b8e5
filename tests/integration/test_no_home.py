"""A user without a name and a home, as in a container: the runs arrive, the spool is private."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.integration.logged import AGENT, ROOT, only_run, runs_of
from tests.integration.server import MlflowServer

if sys.platform == "win32" or os.getuid() != 0:
    pytest.skip("only root can become another user", allow_module_level=True)

import pwd

SCRIPT = f"""
import qitos_mlflow.auto
{AGENT}
agent.run("sum", render=False, trace=False)
"""
USERS = {entry.pw_uid for entry in pwd.getpwall()}
NAMELESS, OTHER = [uid for uid in range(54_321, 60_000) if uid not in USERS][:2]

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def python() -> list[str]:
    """A Python of this version that any user may start."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for program in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            as_nameless(
                [program, "-c", "import orjson, qitos_mlflow"], Path("/")
            ).check_returncode()
        except (OSError, subprocess.CalledProcessError):
            continue
        return [program, "-c", SCRIPT]
    pytest.skip("no other user may start this Python")


def as_nameless(command: list[str], cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user without a name and, unless `environ` has one, without a home."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_") or k == "PATH"}
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    return subprocess.run(
        command,
        user=NAMELESS,
        group=NAMELESS,
        extra_groups=[],
        cwd=cwd,
        env={**kept, "PYTHONPATH": path, "QITOS_TRACE_PLUGINS": "mlflow", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the user's, in it one for everyone's temporary files."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.chown(place, NAMELESS, NAMELESS)
        place.chmod(0o755)
        (place / "tmp").mkdir()
        (place / "tmp").chmod(0o1777)
        yield place


@pytest.fixture
def environ(place: Path, mlflow_server: MlflowServer, experiment_name: str) -> dict[str, str]:
    """Variables of a user without a home who logs to a server."""
    return {
        "TMPDIR": str(place / "tmp"),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "MLFLOW_EXPERIMENT_NAME": experiment_name,
        "QITOS_MLFLOW_EXIT_TIMEOUT_S": "60",  # These tests are not about slow machines.
    }


def logged_runs(environ: dict[str, str]) -> list[str]:
    """The status of each run on the server."""
    runs = runs_of(MlflowClient(environ["MLFLOW_TRACKING_URI"]), environ["MLFLOW_EXPERIMENT_NAME"])
    return [run.status for run in runs]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("home", [None, "/", "/no/such/home", "/proc"])
def test_a_user_without_a_home_has_a_private_spool(
    python: list[str], place: Path, environ: dict[str, str], home: str | None
) -> None:
    """The run arrives, one line names the spool, and only this user can read it."""
    if home is not None:
        environ["HOME"] = home
    done = as_nameless(python, place, **environ, QITOS_MLFLOW_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    spool = place / "tmp" / f"qitos-mlflow-{NAMELESS}"
    assert done.stderr.count("QITOS_MLFLOW_SPOOL_DIR") == 1
    assert f"sync {spool}" in done.stderr
    assert (spool.stat().st_uid, stat.S_IMODE(spool.stat().st_mode)) == (NAMELESS, 0o700)
    assert len(list(spool.glob("*.seg"))) == 1
    assert {path.name for path in place.iterdir()} == {"tmp"}
    # The same directory is found without a path.
    sync = [python[0], "-m", "qitos_mlflow.cli", "sync"]
    synced = as_nameless(sync, place, **environ)
    assert synced.returncode == 0, synced.stderr
    assert as_nameless(python, place, **environ).returncode == 0
    assert logged_runs(environ) == ["FINISHED", "FINISHED"]


@pytest.mark.timeout(400)
def test_a_local_store_needs_a_home_because_mlflow_does(python: list[str], place: Path) -> None:
    """The user reads what to set, and the run is delivered once it is."""
    done = as_nameless(python, place, TMPDIR=str(place / "tmp"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "set HOME" in done.stderr
    sync = [python[0], "-m", "qitos_mlflow.cli", "sync"]
    synced = as_nameless(sync, place, TMPDIR=f"{place}/tmp", HOME="/")
    assert synced.returncode == 0, synced.stderr
    assert only_run(MlflowClient(f"sqlite:///{place}/mlflow.db"), "qitos").status == "FINISHED"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("trap", ["directory", "link", "link to theirs"])
def test_a_spool_that_another_user_has_prepared_is_refused(
    python: list[str], place: Path, environ: dict[str, str], trap: str
) -> None:
    """The records are sent from memory; nothing of them is where the other user can read it."""
    spool, theirs = place / "tmp" / f"qitos-mlflow-{NAMELESS}", place / "theirs"
    theirs.mkdir()
    theirs.chmod(0o777)
    if trap == "directory":
        spool.mkdir()
        spool.chmod(0o777)
        os.chown(spool, OTHER, OTHER)
    else:
        spool.symlink_to(theirs)
        os.chown(spool, OTHER, OTHER, follow_symlinks=False)
        os.chown(theirs, NAMELESS if trap == "link" else OTHER, -1)
    done = as_nameless(python, place, **environ)
    assert done.returncode == 0, done.stderr
    assert "It belongs to another user" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(theirs.iterdir()) == []
    assert trap != "directory" or list(spool.iterdir()) == []
    assert logged_runs(environ) == ["FINISHED"]
    sync = as_nameless([python[0], "-m", "qitos_mlflow.cli", "sync"], place, **environ)
    assert sync.returncode == 2
    assert "It belongs to another user" in sync.stderr
