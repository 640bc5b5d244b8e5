"""What failures of a local store, or of a place for artifacts, mean."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.store.artifact import artifact_repository_registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from sqlalchemy import event
from sqlalchemy.engine import make_url

from qitos_mlflow import _forks
from qitos_mlflow.delivery import Hopeless, RetryLater
from qitos_mlflow.mlflow_plugin import server
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunData, RunRef
from qitos_mlflow.mlflow_plugin.server import mlflow_client, sqlite_store
from qitos_mlflow.mlflow_plugin.server.mlflow_client import StoreTransport
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.sqlite_store import default_tracking_uri
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned, Refused, Transport
from tests.integration.made_store import make_store

SECRET = "s3cr3t-of-a-user"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StoreTransport:
    """A local store."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_store(database)
    return StoreTransport(f"sqlite:///{database}")


@pytest.mark.parametrize("here", ["", "a b", "/", "old"])
@pytest.mark.parametrize("there", ["", "a b", "50%20/ü", "/", "old"])
def test_the_default_store_is_that_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, there: str
) -> None:
    """Delivery finds the store that MLflow has in a directory, from whatever directory it runs."""
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for place in (tmp_path / here, tmp_path / there):
        place.mkdir(parents=True, exist_ok=True)
    # The folder of runs of an earlier MLflow stays the default in its directory.
    folder = tmp_path / "old" / "mlruns" / "0"
    folder.mkdir(parents=True)
    (folder / "meta.yaml").touch()
    monkeypatch.chdir(tmp_path / there)
    wanted = mlflow.get_tracking_uri()
    monkeypatch.chdir(tmp_path / here)
    assert default_tracking_uri(str(tmp_path / there)) == wanted


def test_the_default_store_is_not_what_is_configured_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records for no server go to none, whatever whoever delivers them has in the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.usefixtures("made_at_once")
@pytest.mark.parametrize("name", ["a b", "50%20"])
def test_the_directory_of_a_new_store_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is logged in a directory with a space in its name is where MLflow looks for it."""
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    made = StoreTransport(default_tracking_uri(str(Path.cwd()))).experiment_id("ours", 1.0)
    found = mlflow.MlflowClient().get_experiment_by_name("ours")
    assert found is not None
    assert found.experiment_id == made


def uris(directory: Path) -> dict[str, str]:
    """Tracking URIs of a new sqlite store, each with the file that SQLAlchemy opens for it."""
    return {
        f"sqlite:///{directory}/m.db?timeout=60": f"{directory}/m.db",
        f"sqlite:///{directory}/%41.db": make_url(f"sqlite:///{directory}/%41.db").database or "",
        f"sqlite+pysqlite:///{directory}/p.db": f"{directory}/p.db",
        f"sqlite:///{directory}/new/m.db": f"{directory}/new/m.db",
        f"sqlite:///file:{directory}/u.db?uri=true": f"{directory}/u.db",
    }


def schema(file: Path) -> set[str]:
    """What a database has, whatever order its constraints are in."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        made = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    return {f"{name}: {sorted((sql or '').replace(',', '').split())}" for name, sql in made}


@pytest.mark.usefixtures("made_at_once")
@pytest.mark.parametrize("number", range(5))
def test_a_store_is_made_where_mlflow_looks_for_it(tmp_path: Path, number: int) -> None:
    """As SQLAlchemy reads the URI, whatever is in it; what it was made of is removed."""
    uri, file = list(uris(tmp_path).items())[number]
    made = StoreTransport(uri).experiment_id("ours", 1.0)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        found = connection.execute("SELECT experiment_id, name FROM experiments").fetchall()
    assert (int(made), "ours") in found
    assert not list(Path(file).parent.glob(".mlflow-new-*"))


@pytest.fixture
def link_fails(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links."""

    def refuse(*args: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("link_fails", "made_at_once")
@pytest.mark.parametrize("link_fails", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK], indirect=True)
def test_a_file_system_without_hard_links_has_a_store_too(tmp_path: Path) -> None:
    """The store is whole, as MLflow makes it, and what it was made of is removed."""
    made = StoreTransport(f"sqlite:///{tmp_path}/m.db").experiment_id("ours", 1.0)
    assert StoreTransport(f"sqlite:///{tmp_path}/m.db").experiment_id("ours", 1.0) == made
    assert [path.name for path in tmp_path.iterdir()] == ["m.db"]


def test_a_store_is_as_mlflow_makes_it(tmp_path: Path) -> None:
    """The same tables, revision and default experiment as without us."""
    StoreTransport(f"sqlite:///{tmp_path}/ours.db")
    make_store(tmp_path / "theirs.db")
    mlflow.MlflowClient(f"sqlite:///{tmp_path}/theirs.db").search_experiments()
    assert schema(tmp_path / "ours.db") == schema(tmp_path / "theirs.db")
    questions = ("SELECT version_num FROM alembic_version", "SELECT name FROM experiments")
    for question in questions:
        with (
            contextlib.closing(sqlite3.connect(tmp_path / "ours.db")) as ours,
            contextlib.closing(sqlite3.connect(tmp_path / "theirs.db")) as theirs,
        ):
            assert ours.execute(question).fetchall() == theirs.execute(question).fetchall()


@pytest.mark.usefixtures("made_at_once")
@pytest.mark.parametrize("left", ["of another version", "no database"])
def test_a_half_made_store_that_is_of_no_use_is_made_anew(tmp_path: Path, left: str) -> None:
    """The first attempt fails and removes it, the next one makes the store."""
    place = tmp_path / f".mlflow-new-{getattr(os, 'getuid', int)()}-m.db"
    place.mkdir()
    if left == "no database":
        (place / "new.db").write_bytes(b"no database" * 100)
    else:
        with contextlib.closing(sqlite3.connect(place / "new.db")) as connection:
            connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
            connection.execute("INSERT INTO alembic_version VALUES ('of-the-future')")
            connection.commit()
    uri = f"sqlite:///{tmp_path}/m.db"
    with pytest.raises(RetryLater, match="cannot be opened"):
        StoreTransport(uri)
    StoreTransport(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["m.db"]


@pytest.mark.usefixtures("made_at_once")
def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """After a while, whatever its name; what another process may be at work on stays."""
    names = [".mlflow-new-abc12345", ".mlflow-new-0-other.db"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.db").touch()
    os.utime(tmp_path / names[0], (1, 1))
    StoreTransport(f"sqlite:///{tmp_path}/m.db")
    assert {path.name for path in tmp_path.iterdir()} == {"m.db", names[1]}


@pytest.mark.usefixtures("made_at_once")
def test_a_deleted_store_is_made_again_while_forks_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that finds it gone fails, so that all that is known of it is asked for again."""
    store = StoreTransport(f"sqlite:///{tmp_path}/m.db")
    store.experiment_id("ours", 1.0)
    (tmp_path / "m.db").unlink()
    forks_wait: list[bool] = []
    prepare = mlflow_client.prepare_sqlite

    def watched(uri: str) -> None:
        forks_wait.append(bool(_forks._under_way))  # Migrations are imported.
        prepare(uri)

    monkeypatch.setattr(mlflow_client, "prepare_sqlite", watched)
    with pytest.raises(RetryLater, match="deleted or replaced") as later:
        store.experiment_id("ours", 1.0)
    assert not isinstance(later.value, Hopeless)
    assert forks_wait == [True]
    made = store.experiment_id("ours", 1.0)
    store.create_run(NewRun(made, "n", 1, []), 1.0)
    with contextlib.closing(sqlite3.connect(tmp_path / "m.db")) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (1,)


@pytest.mark.usefixtures("made_at_once")
def test_a_deleted_directory_is_not_brought_back(tmp_path: Path) -> None:
    """Its records wait for as long as it is gone."""
    directory = tmp_path / "of a test"
    store = StoreTransport(f"sqlite:///{directory}/m.db")
    shutil.rmtree(directory)
    with pytest.raises(RetryLater, match="No such file or directory"):
        store.experiment_id("ours", 1.0)
    assert not directory.exists()
    directory.mkdir()
    with pytest.raises(RetryLater, match="deleted or replaced"):
        store.experiment_id("ours", 1.0)
    store.experiment_id("ours", 1.0)


@pytest.mark.usefixtures("made_at_once")
def test_a_store_that_is_replaced_by_an_older_one_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow refuses its schema when it opens it, and so do we in mid-life.

    At first its last migrations may still be under way, and are waited for.
    """
    monkeypatch.setattr(sqlite_store, "STUCK_S", 0.5)
    store = StoreTransport(f"sqlite:///{tmp_path}/m.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        with contextlib.closing(sqlite3.connect(tmp_path / "m.db")) as newest:
            newest.backup(connection)
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        connection.commit()
    (tmp_path / "old.db").replace(tmp_path / "m.db")
    for _ in range(2):
        with pytest.raises(RetryLater, match=r"cannot be opened.*out-of-date"):
            store.experiment_id("ours", 1.0)


class CloudError(Exception):
    """Of a cloud's own client: neither MLflow's nor the operating system's."""


@pytest.mark.parametrize(
    "uri",
    [
        "htp://user:{}@localhost:5000",
        "user:{}@localhost:5000",
        "postgresqlx://user:{}@host/db",
        "mysql+nodriver://user:{}@host/db",
        "sqlite:////dev/null/x.db",
    ],
)
def test_a_store_that_cannot_be_opened_loses_nothing(uri: str) -> None:
    """Records wait until it has the right name or exists; no message has its password."""
    with pytest.raises(RetryLater) as later:
        StoreTransport(uri.format(SECRET))
    assert SECRET not in str(later.value)


def test_a_database_that_fails_is_not_refusing(
    store: StoreTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a free connection MLflow's store speaks of a bad request."""

    def fail(*args: object, **options: object) -> None:
        raise MlflowException("QueuePool limit of size 5 overflow 10 reached", BAD_REQUEST)

    monkeypatch.setattr(store._mlflow, "log_batch", fail)
    with pytest.raises(Poisoned):
        store.log_batch("run", RunData(), 1.0)


@pytest.mark.parametrize("raised", [UserWarning("deprecated"), MemoryError(), OSError(28, "full")])
def test_what_this_process_raises_is_no_failure_of_the_store(
    store: StoreTransport, raised: Exception
) -> None:
    """A warning that the program has raised passes through MLflow as an internal error."""

    def fail(*args: object) -> None:
        raise raised

    engine = store._tracing.store.engine
    event.listen(engine, "before_cursor_execute", fail)
    try:
        with pytest.raises(RetryLater, match=type(raised).__name__):
            store.log_batch("run", RunData(tags=[("a", "b")]), 1.0)
    finally:
        event.remove(engine, "before_cursor_execute", fail)


def test_a_warning_that_keeps_a_store_closed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the program has warnings raised, the reason says so; the next attempt may succeed."""

    def warn(uri: str) -> None:
        raise DeprecationWarning("a loader")  # As `warnings.warn` does then.

    monkeypatch.setattr(mlflow_client, "prepare_sqlite", warn)
    with pytest.raises(RetryLater, match="warnings are errors in this process") as later:
        StoreTransport(f"sqlite:///{tmp_path}/mlflow.db")
    assert not isinstance(later.value, Hopeless)


def test_what_was_logged_is_stored_also_where_the_user_logs_asynchronously(
    store: StoreTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal reaches us whatever MLflow's switch for the user's own calls says."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    with pytest.raises(Refused):
        store.log_batch("0" * 32, RunData(params=[("param", "value")]), 1.0)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), Refused),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), Refused),
        (ModuleNotFoundError("No module named 'boto3'"), Refused),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RetryLater),
        (CloudError("no connection"), Poisoned),
        (OSError("no libjvm"), RetryLater),
        (DeprecationWarning("an old call"), RetryLater),
        (CloudError("ReadTimeoutError"), RetryLater),
        (MlflowException("no such thing"), Poisoned),
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_a_place_for_artifacts_fails_as_servers_do(
    store: StoreTransport,
    local: bool,
    error: Exception,
    meaning: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What can never be written is refused, what may pass is tried again, nothing is a bug."""

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(LocalArtifactRepository, "log_artifact", fail)
    run = RunRef("r", "0", "n", (tmp_path / "artifacts").as_uri(), 0)
    transport: Transport = store if local else RestTransport("http://host")
    with pytest.raises(meaning):
        transport.write_artifact(run, "a/b.txt", b"b", 1.0)


def test_a_repository_that_needs_a_password_does_not_tell_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason of a refusal is kept with the dead letter."""

    def missing(uri: str, **_: object) -> None:
        raise ModuleNotFoundError(f"No module for {uri}")

    monkeypatch.setattr(artifact_repository_registry, "get_artifact_repository", missing)
    run = RunRef("r", "0", "n", f"sftp://user:{SECRET}@host/a", 0)
    with pytest.raises(Refused) as refusal:
        RestTransport("http://host").write_artifact(run, "b.txt", b"b", 1.0)
    assert "sftp://host/a" in str(refusal.value)
    assert SECRET not in str(refusal.value)


def test_no_fork_splits_the_import_of_mlflow_for_an_artifact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To a server that stores no artifacts itself, mlflow is imported once one is written."""
    name = "qitos_mlflow.mlflow_plugin.server.mlflow_client"
    forks_wait: list[bool] = []

    class Finder:
        @staticmethod
        def find_spec(module: str, *_: object) -> None:
            if module == name:
                forks_wait.append(bool(_forks._under_way))

    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(server, "mlflow_client")  # Put back like the module itself.
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    run = RunRef("r", "0", "n", tmp_path.as_uri(), 0)
    RestTransport("http://host").write_artifact(run, "a.txt", b"a", 1.0)
    assert forks_wait == [True]
    assert (tmp_path / "a.txt").read_bytes() == b"a"


@pytest.mark.parametrize("trace_id", ["it's", 'say "so"', "a' OR 'b"])
def test_runs_are_found_by_any_id(store: StoreTransport, trace_id: str) -> None:
    """An id with quotes in it is no other question."""
    experiment = store.experiment_id("quotes", 1.0)
    run = store.create_run(NewRun(experiment, "n", 1, [("qitos.trace_id", trace_id)]), 1.0)
    assert [found.run_id for found in store.find_runs(experiment, trace_id, 1.0)] == [run.run_id]
    assert store.find_runs(experiment, trace_id + "'\"", 1.0) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_exits_leaves_the_parents_upload_alone(tmp_path: Path) -> None:
    """The file that is being uploaded is still there when a child forked meanwhile has ended."""
    code = f"""
import os, threading, warnings
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from qitos_mlflow.mlflow_plugin.server.mlflow_client import write_artifact
warnings.simplefilter("ignore", DeprecationWarning)  # Forking with threads is the point here.
log_artifact = LocalArtifactRepository.log_artifact
uploading, go_on = threading.Event(), threading.Event()
def slow(*args):
    uploading.set()
    go_on.wait(30)
    log_artifact(*args)
LocalArtifactRepository.log_artifact = slow
where = {(tmp_path / "to").as_uri()!r}
thread = threading.Thread(target=write_artifact, args=(where, "a/file", b"content", "sqlite://"))
thread.daemon = True  # The child does not wait for it.
thread.start()
assert uploading.wait(30)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "to/a/file").read_bytes() == b"content"
