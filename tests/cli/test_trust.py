"""`sync` and `status` on segments that another user may have made: what these may not have done."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from qitos_mlflow.cli import main
from qitos_mlflow.delivery import find_segments
from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header, tracking_uri
from qitos_mlflow.mlflow_plugin.trust import Trust, Way, is_foreign
from qitos_mlflow.settings import Settings
from tests.cli.conftest import environment, run_cli, run_python, runs_in
from tests.cli.test_spool import trace, write_segment
from tests.fakes.https import RecordingServer, recording_server
from tests.fakes.sink import make_pipeline
from tests.integration.made_store import make_store
from tests.integration.server import MlflowServer
from tests.waiting import eventually

SECRET = "s3cr3t-of-a-user"


def invoke(*args: str | Path) -> Result:
    """Run `qitos-mlflow args…` in this process."""
    return CliRunner().invoke(main, [*map(str, args)])


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A directory that somebody else has filled: segments are made in its `spool`."""
    directory = tmp_path / "archive"
    directory.mkdir()
    return directory


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    """A web server that records what it gets."""
    with recording_server() as server:
        yield server


def plant(archive: Path, header: dict[str, Any], *records: bytes) -> Path:
    """Leave a segment with this header, in the directory that is returned."""
    whole = {"tracking_uri": None, "cwd": str(archive), "headers": {}, "asked": True, **header}
    pipeline = make_pipeline(archive / "spool", None, header=json.dumps(whole).encode())
    for record in records or trace("planted"):
        assert pipeline.offer(record, keep=True)
    pipeline.close(60.0)
    return archive / "spool"


def files_in(directory: Path) -> list[str]:
    """The names of what is in a directory, but for its spool."""
    return sorted(path.name for path in directory.iterdir() if path.name != "spool")


STORES = ["sqlite:///{}/planted.db", "{}/runs", "file://{}/runs", None]


@pytest.mark.usefixtures("made_at_once")
@pytest.mark.parametrize("uri", STORES)
def test_a_local_store_is_written_only_when_asked_for(archive: Path, uri: str | None) -> None:
    """The error names segment, store and command. That command delivers, where MLflow can."""
    spool = plant(archive, {"tracking_uri": uri and uri.format(archive)})
    [paths] = find_segments(spool)
    done = invoke("sync", spool)
    assert done.exit_code == 1
    assert files_in(archive) == []
    said = " ".join(done.output.split())
    assert f"segment {paths.stem}: not delivered to {(uri or 'MLflow').format(archive)}" in said
    assert f"qitos-mlflow sync --trust {spool}" in said
    assert said.endswith("1 segment not delivered")  # The same command would do no more later.
    asked = invoke("sync", "--trust", spool)
    assert files_in(archive) or "cannot be opened" in asked.output  # MLflow 3.17: no file stores.
    if str(uri).startswith("sqlite"):
        assert asked.exit_code == 0, asked.output
        assert len(runs_in(f"sqlite:///{archive}/planted.db", "planted")) == 1


@pytest.mark.usefixtures("made_at_once")
@pytest.mark.parametrize(
    "name", ["sqlite:///{}/planted.db", "sqlite:///{}/../archive/./planted.db"]
)
def test_a_store_that_the_environment_names_is_asked_for(
    archive: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is the user's own word, however the path is written."""
    spool = plant(archive, {"tracking_uri": f"sqlite:///{archive}/planted.db"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", name.format(archive))
    done = invoke("sync", spool)
    assert done.exit_code == 0, done.output
    assert len(runs_in(f"sqlite:///{archive}/planted.db", "planted")) == 1


@pytest.mark.parametrize("uri", ["postgresql://127.0.0.1:{}/x", "mysql+pymysql://127.0.0.1:{}/x"])
def test_no_database_server_is_asked(archive: Path, uri: str) -> None:
    """Clients of databases send passwords and read files of this machine if a server asks."""
    with socket.create_server(("127.0.0.1", 0)) as database:
        database.setblocking(False)
        spool = plant(archive, {"tracking_uri": uri.format(database.getsockname()[1])})
        done = invoke("sync", "--trust", spool)
        assert done.exit_code == 1
        assert f"qitos-mlflow sync --tracking-uri URI {spool}" in " ".join(done.output.split())
        with pytest.raises(BlockingIOError):
            database.accept()


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "uc:profile"])
def test_no_profile_of_the_user_is_used(archive: Path, uri: str) -> None:
    """A profile has credentials; a segment cannot have them used, even if it is trusted."""
    spool = plant(archive, {"tracking_uri": uri})
    done = invoke("sync", "--trust", spool)
    assert (done.exit_code, "--tracking-uri URI" in done.output) == (1, True)


@pytest.mark.parametrize("options", [(), ("--trust",)])
@pytest.mark.parametrize("command", ["sync", "status"])
def test_the_address_in_a_segment_gets_no_credentials(
    archive: Path,
    server: RecordingServer,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: tuple[str, ...],
) -> None:
    """Not a token, a password, a workspace, nor what ~/.netrc has; not even if it is trusted."""
    monkeypatch.setenv("HOME", str(archive))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_WORKSPACE", SECRET)
    (archive / ".mlflow").mkdir()
    (archive / ".mlflow" / "credentials").write_text(f"[mlflow]\nmlflow_tracking_password={SECRET}")
    (archive / ".netrc").write_text(f"default login u password {SECRET}\n")
    (archive / ".netrc").chmod(0o600)
    spool = plant(archive, {"tracking_uri": server.uri, "headers": None, "asked": False})
    given = options if command == "sync" else ()
    invoke(command, *given, *(["--patience", "0"] if command == "sync" else []), spool)
    assert server.heads
    assert SECRET not in str(server.heads)
    assert "authorization" not in {name for head in server.heads for name in head}


def test_a_server_cannot_have_a_file_of_this_machine_written(
    archive: Path, tmp_path: Path, shared_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the user's own: anyone may have made an experiment there with such a place."""
    place = archive / ".ssh"
    name = f"keys-{tmp_path.parent.name}"
    shared_server.client.create_experiment(name, artifact_location=place.as_uri())
    start, end = map(json.loads, trace(name))
    key = {"kind": "artifact", "path": "authorized_keys", "content": "ssh-ed25519 AAAA"}
    key["trace_id"] = start["trace_id"]
    spool = plant(archive, {"tracking_uri": shared_server.uri}, *map(_encoded, (start, key, end)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_server.uri)
    done = invoke("sync", spool)
    assert not place.exists()
    assert (done.exit_code, len(runs_in(shared_server.uri, name))) == (1, 1)
    [reason] = json.loads(invoke("status", "--json", spool).output)["dead_letters"]
    assert "`qitos-mlflow sync --trust`" in reason
    assert invoke("sync", "--trust", spool).exit_code == 0
    [written] = place.rglob("authorized_keys")
    assert written.read_text() == "ssh-ed25519 AAAA"


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()


def test_a_sidecar_is_as_careful(archive: Path) -> None:
    """`sync --follow` leaves such a segment alone, says so, and delivers the others."""
    well = f"sqlite:///{archive}/well.db"
    make_store(archive / "well.db")
    spool = plant(archive, {"tracking_uri": f"sqlite:///{archive}/planted.db"})
    plant(archive, {"tracking_uri": well}, *trace("well"))
    command = [sys.executable, "-m", "qitos_mlflow.cli", "sync", "--follow", str(spool)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(MLFLOW_TRACKING_URI=well),
    ) as sidecar:
        assert sidecar.stderr is not None
        said = [sidecar.stderr.readline(), sidecar.stderr.readline()]
        eventually(lambda: len(find_segments(spool)) == 1)
        sidecar.terminate()
    assert "sync --trust" in said[1], said
    assert "planted.db" not in files_in(archive)
    assert len(runs_in(well, "well")) == 1


AGENT = """\
import sys
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.tracing import add_trace_processor, create_trace

uri = sys.argv[1] if len(sys.argv) > 1 else None
deadlines = {"exit_timeout_s": 0.0, "local_exit_timeout_s": 0.0, "start_timeout_s": 0.0}
add_trace_processor(MlflowTraceProcessor(experiment_name="e", tracking_uri=uri, **deadlines))
with create_trace("x"):
    pass
"""


@pytest.mark.parametrize("uri", ["sqlite:///{}/mine.db", None])
def test_the_command_at_an_agents_exit_works(archive: Path, uri: str | None) -> None:
    """It names the local store, or trusts the agent's own segment alone. So does `status`."""
    (archive / "agent.py").write_text(AGENT)
    make_store(archive / ("mine.db" if uri else "mlflow.db"))
    args = [uri.format(archive)] if uri else []
    elsewhere = {"QITOS_MLFLOW_SPOOL_DIR": str(archive / "spool")}
    done = run_python("agent.py", *args, cwd=archive, **elsewhere)
    assert done.returncode == 0, done.stderr
    command = done.stderr.rpartition("deliver with: ")[2].strip()
    assert command.startswith("MLFLOW_TRACKING_URI=" if uri else "qitos-mlflow sync --trust ")
    plant(archive, {"tracking_uri": f"sqlite:///{archive}/planted.db"})
    words = shlex.split(command)
    environ = dict(word.split("=", 1) for word in words if word.startswith("MLFLOW_"))
    shown = invoke("status", archive / "spool").output
    assert f"qitos-mlflow sync --trust {archive / 'spool'}" in " ".join(shown.split())
    run_cli(*words[words.index("sync") :], **environ)
    assert "planted.db" not in files_in(archive)
    [store] = [name for name in files_in(archive) if name.endswith(".db")]
    assert len(MlflowClient(f"sqlite:///{archive}/{store}").search_runs(["1"])) == 1


@pytest.mark.usefixtures("made_at_once")
def test_the_users_own_spool_needs_no_option(tmp_path: Path) -> None:
    """Segments of this user in the directory that no setting names are the user's own."""
    part = write_segment(tmp_path, f"sqlite:///{tmp_path}/own.db", *trace("own"))
    [paths] = find_segments(part.parent)
    assert not is_foreign(paths)
    done = invoke("sync")
    assert done.exit_code == 0, done.output
    assert len(runs_in(f"sqlite:///{tmp_path}/own.db", "own")) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_file_of_another_user_is_foreign_anywhere(tmp_path: Path) -> None:
    """Even in the user's own spool."""
    part = write_segment(tmp_path, f"sqlite:///{tmp_path}/own.db", *trace("own"))
    os.chown(part, 12345, -1)
    [paths] = find_segments(part.parent)
    assert is_foreign(paths)


HTTP, LOCAL, OTHER = "http://host:5000", "sqlite:////srv/x.db", "postgresql://host/db"


@pytest.mark.parametrize(
    ("trust", "own", "uri", "way"),
    [
        (Trust(None), True, HTTP, Way(HTTP, False, False)),
        (Trust(None), True, LOCAL, Way(LOCAL, True, True)),
        (Trust(None), True, OTHER, Way(OTHER, True, True)),
        (Trust(None), False, HTTP, Way(HTTP, False, False)),
        (Trust(None), False, LOCAL, Way(LOCAL, False, False, "--trust")),
        (Trust(None), False, OTHER, Way(OTHER, False, False, "--tracking-uri URI")),
        (Trust(None), False, None, Way(None, False, False, "--trust")),
        (Trust(None, foreign=True), False, HTTP, Way(HTTP, False, True)),
        (Trust(None, foreign=True), False, LOCAL, Way(LOCAL, False, True)),
        (Trust(None, foreign=True), False, None, Way(None, False, True)),
        (Trust(HTTP), True, HTTP, Way(HTTP, True, True)),
        (Trust(HTTP), False, HTTP, Way(HTTP, True, False)),
        (Trust(HTTP, foreign=True), False, HTTP, Way(HTTP, True, True)),
        (Trust("http://u:p@host:5000"), False, HTTP, Way("http://u:p@host:5000", True, False)),
        (Trust(HTTP), False, f"{HTTP}.evil", Way(f"{HTTP}.evil", False, False)),
        (Trust(HTTP), False, None, Way(None, False, False, "--trust")),
        (Trust(HTTP, given=True), False, LOCAL, Way(HTTP, True, False)),
        (Trust(OTHER), False, OTHER, Way(OTHER, True, False)),
    ],
)
def test_what_may_be_done(
    tmp_path: Path, trust: Trust, own: bool, uri: str | None, way: Way
) -> None:
    """Credentials go to what is named; a stranger's segment writes to this machine if trusted."""
    spool = tmp_path if own else tmp_path / "archive"
    write_segment(spool, HTTP, *trace("x"))
    [paths] = find_segments(spool / "spool")
    assert trust.way({"tracking_uri": uri}, paths) == way


def test_the_header_of_this_version_is_understood(tmp_path: Path) -> None:
    """What an agent writes for a server is what `Trust` compares."""
    to = tracking_uri(Settings.resolve(tracking_uri="http://u:p@host:5000/"))
    header = json.loads(segment_header(Destination.of(to)))
    write_segment(tmp_path, HTTP, *trace("x"))
    [paths] = find_segments(tmp_path / "spool")
    assert Trust(to).way(header, paths).trusted
