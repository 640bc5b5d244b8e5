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

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.delivery.sink import progressed

NEW = ".mlflow-new-"
"""Begins the names of directories in which stores are created."""
STUCK_S = 10.0
"""How long a process waits for another one that creates the store, without progress (seconds)."""
LEFT_S = 3600.0
"""What a dead process left of a new store is removed after this long without a change (seconds)."""


def prepare_sqlite(uri: str) -> None:
    """Create the database of a sqlite store in one step, if there is none.

    MLflow creates one by dozens of migrations. A process that ends among them, or a second one
    that begins meanwhile, leaves a store that cannot be opened again. So the migrations run on a
    file beside it, which then takes its place. If the process ends before, the next one goes on.

    Raises:
        RetryLater: another process creates it, and has got nowhere for `STUCK_S`.
    """
    from mlflow.tracking._tracking_service.registry import _building_store_lock
    from sqlalchemy.engine import make_url

    if not re.match(r"sqlite(\+pysqlite)?:///", uri):
        return
    database = make_url(uri).database or ":memory:"  # Unquoted, from SQLAlchemy 2.1 on.
    if database.startswith("file:") or ":memory:" in database:
        return
    target, seen, until = Path(database), 0, 0.0
    place = target.with_name(f"{NEW}{getattr(os, 'getuid', int)()}-{target.name}")
    while not target.exists():
        with _alone(place) as alone:
            if alone:
                # Alembic has globals: MLflow of this process must not migrate meanwhile.
                with _building_store_lock:
                    if not target.exists():
                        _make(uri, place / "new.db", target)
                shutil.rmtree(place, ignore_errors=True)
        if not alone:
            if (now := _changed_ns(place)) != seen:
                seen, until = now, time.monotonic() + STUCK_S
            elif time.monotonic() > until:
                raise RetryLater(f"another process creates it, and does not get on: see {place}")
            progressed()
    for left in target.parent.glob(f"{NEW}*"):  # By a process that died.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left)


def _changed_ns(place: Path) -> int:
    try:
        return place.stat().st_mtime_ns  # Each of sqlite's transactions creates a file in it.
    except FileNotFoundError:
        return 0


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
    event.listen(engine, "begin", lambda one: one.exec_driver_sql("BEGIN"))
    event.listen(engine, "after_cursor_execute", lambda *_: progressed())
    try:
        begun = inspect(engine).has_table("alembic_version")
        (utils._upgrade_db if begun else utils._initialize_tables)(engine)
        engine.dispose()
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
