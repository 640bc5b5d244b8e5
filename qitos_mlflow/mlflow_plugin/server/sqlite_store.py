"""Creates the database of a sqlite store in one step, also across processes that are killed.

Imports mlflow when there is something to create.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qitos_mlflow._inheritance import disown_in_child
from qitos_mlflow.delivery import RetryLater, let_forks_happen
from qitos_mlflow.delivery.sink import progressed
from qitos_mlflow.mlflow_plugin.server.tracking_uri import working_directory
from qitos_mlflow.mlflow_plugin.server.transport import readable

NEW = ".mlflow-new-"
"""Begins the names of directories in which stores are created."""
STUCK_S = 10.0
"""How long a process waits for another one that creates the store, without progress (seconds)."""
LOOK_S = 0.1
"""How often it looks (seconds)."""
MOST_S = 120.0
"""Longest wait for this MLflow's last migration: the store may be in use by an older one."""
LEFT_S = 3600.0
"""What a dead process left of a new store is removed after this long without a change (seconds)."""


def default_tracking_uri(cwd: str) -> str:
    """Where this version of MLflow logs when nothing is configured, as seen from `cwd`.

    What is configured now does not matter: it may be another place than the records were made for.
    """
    import mlflow
    from mlflow.utils.file_utils import path_to_local_sqlite_uri

    if cwd == working_directory() and not mlflow.is_tracking_uri_set():
        return str(mlflow.get_tracking_uri())
    # MLflow can be asked for no other directory: a folder with runs in it, else a database.
    folder = Path(cwd, "mlruns")
    if any(found.parent.name.isdigit() for found in folder.glob("*/meta.yaml")):
        return folder.as_uri()
    return str(path_to_local_sqlite_uri(str(Path(cwd, "mlflow.db"))))


def database_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for another store, and for one in memory."""
    from sqlalchemy.engine import make_url

    if not re.match(r"sqlite(\+pysqlite)?:///", uri):
        return None
    database = make_url(uri).database or ":memory:"  # Unquoted, from SQLAlchemy 2.1 on.
    return None if database.startswith("file:") or ":memory:" in database else Path(database)


def file_of(uri: str) -> tuple[int, int] | None:
    """Which file a sqlite store is in now; None if there is none, or if it is another store.

    Raises:
        RetryLater: its directory was deleted, which is not ours to bring back.
    """
    path = database_file(uri)
    if path is None:
        return None
    try:
        path.parent.stat()
        found = path.stat() if path.exists() else None
    except OSError as error:
        raise RetryLater(readable(error)) from error
    return (found.st_dev, found.st_ino) if found else None


def prepare_sqlite(uri: str) -> None:
    """Create the database of a sqlite store in one step, if there is none.

    MLflow creates one by dozens of migrations. A process that ends among them, or a second one
    that begins meanwhile, leaves a store that cannot be opened again. So the migrations run on a
    file beside it, which then takes its place. If the process ends before, the next one goes on.
    What MLflow itself creates meanwhile is waited for.

    Raises:
        RetryLater: another process creates it, and has got nowhere for `STUCK_S`.
    """
    target = database_file(uri)
    if target is None:
        return
    place = target.with_name(f"{NEW}{getattr(os, 'getuid', int)()}-{target.name}")
    others = _Others(place)
    while not target.exists():
        with _alone(place) as alone:
            if alone:
                with _AloneHere():
                    if not target.exists():
                        _make(uri, place / "new.db", target)
                shutil.rmtree(place, ignore_errors=True)
        if not alone and not others.make_progress():
            raise RetryLater(f"another process is creating it but makes no progress: see {place}")
    others, until = _Others(target), time.monotonic() + MOST_S
    while others.recently_active() and not _is_finished(target):
        if time.monotonic() > until or not others.make_progress():
            break
        time.sleep(LOOK_S)
    for left in target.parent.glob(f"{NEW}*"):  # By a process that died.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left)


class _Others:
    """Other processes that create a store at `place`: a file of sqlite's, or a directory of one."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._seen = 0
        self._until = 0.0

    def recently_active(self) -> bool:
        """Whether it has changed within `STUCK_S`."""
        return time.time() - self._changed_ns() / 1e9 < STUCK_S

    def make_progress(self) -> bool:
        """Whether it has changed within `STUCK_S`, counted from the call that saw the change."""
        let_forks_happen()
        progressed()
        if (now := self._changed_ns()) != self._seen:
            self._seen, self._until = now, time.monotonic() + STUCK_S
        return time.monotonic() < self._until

    def _changed_ns(self) -> int:
        try:
            # Each of sqlite's transactions writes the file, and creates one in the directory.
            return self._place.stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def _is_finished(target: Path) -> bool:
    """Whether a store has all of MLflow's migrations."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    try:
        with contextlib.closing(sqlite3.connect(target, timeout=LOOK_S)) as store:
            found = store.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.Error:  # No such table yet, or MLflow writes it.
        return False
    return found == [(_get_latest_schema_revision(),)]


class _AloneHere:
    """Keeps MLflow of this process from migrating, because Alembic has globals."""

    def __init__(self) -> None:
        from mlflow.tracking._tracking_service.registry import _building_store_lock

        self._lock: Any = _building_store_lock

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=LOOK_S):
            let_forks_happen()
        disown_in_child(self)

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def disown(self) -> None:
        """Have the child open stores of its own: the thread that holds the lock is not there."""
        self._lock._at_fork_reinit()


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Whether no other process is in this block for the directory `place`, which is made."""
    place.mkdir(parents=True, exist_ok=True)
    alone = False
    with contextlib.ExitStack() as at_end:
        try:  # A lock that ends with its process, wherever sqlite can work.
            lock = sqlite3.connect(place / "lock", timeout=0.1, isolation_level=None)
            at_end.callback(lock.close)
            lock.execute("BEGIN EXCLUSIVE")
            alone = True
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) and place.exists():  # Else its process has finished.
                raise
        yield alone


def _begin(connection: Any) -> None:
    # Not within a transaction: a forked child would take its lock for one of its own, for ever.
    let_forks_happen()
    connection.exec_driver_sql("BEGIN")


def _make(uri: str, made: Path, target: Path) -> None:
    """Finish the database `made`, which an earlier process may have begun, and move it."""
    from mlflow.store.db import utils
    from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store
    from sqlalchemy import create_engine, event, inspect
    from sqlalchemy.engine import make_url

    url = make_url(uri).set(database=str(made))
    engine = create_engine(url)
    # Each migration as a whole or not at all, which sqlite can and Python's driver prevents.
    event.listen(engine, "connect", lambda one, _: setattr(one, "isolation_level", None))
    event.listen(engine, "begin", _begin)
    event.listen(engine, "after_cursor_execute", lambda *_: progressed())
    try:
        begun = inspect(engine).has_table("alembic_version")
        (utils._upgrade_db if begun else utils._initialize_tables)(engine)
        engine.dispose()
        let_forks_happen()
        store = _get_sqlalchemy_store(url.render_as_string(), None)
        store.search_experiments(max_results=1)
        store.engine.dispose()
    except Exception:  # Such as the migrations of a newer MLflow: the next attempt begins anew.
        engine.dispose()
        made.unlink(missing_ok=True)
        raise
    try:
        os.link(made, target)
    except OSError:  # MLflow was faster, or the file system has no hard links.
        if target.exists():
            return
        with (
            contextlib.closing(sqlite3.connect(made)) as source,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)  # In one transaction.
