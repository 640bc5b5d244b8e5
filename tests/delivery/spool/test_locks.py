"""Locks that end with their process, with the kernel's help and without."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qitos_mlflow.delivery.spool import locks
from qitos_mlflow.delivery.spool.files import open_file
from qitos_mlflow.delivery.spool.locks import FileLock, is_held

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def fail(descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_kernel_lock", fail)


def test_only_one_holds_it(tmp_path: Path) -> None:
    """A held lock cannot be taken again, in this process or another; a released one can."""
    path = tmp_path / "a.own"
    first, second = FileLock(path), FileLock(path)
    assert first.acquire()
    assert not second.acquire()
    assert is_held(path)
    assert not _other_process_acquires(path)
    first.release()
    assert not is_held(path)
    assert _other_process_acquires(path)
    assert second.acquire()
    second.release(remove=True)
    assert not path.exists()


def _other_process_acquires(path: Path) -> bool:
    code = (
        "import sys, pathlib; from qitos_mlflow.delivery.spool.locks import FileLock\n"
        "sys.exit(0 if FileLock(pathlib.Path(sys.argv[1])).acquire() else 3)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert result.returncode in (0, 3)
    return result.returncode == 0


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    """The lock of a process ends with SIGKILL, and no process has to judge it stale."""
    path = tmp_path / "a.own"
    code = (
        "import sys, pathlib, time; from qitos_mlflow.delivery.spool.locks import FileLock\n"
        "lock = FileLock(pathlib.Path(sys.argv[1])); lock.acquire(); print('held', flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_held(path)
        process.kill()
        process.wait()
    assert not is_held(path)


def test_a_lock_file_deleted_under_its_holder_is_taken_anew(tmp_path: Path) -> None:
    """A holder notices that its lock file was deleted when it asks for the lock again."""
    path = tmp_path / "a.own"
    lock = FileLock(path)
    assert lock.acquire()
    path.unlink()
    assert lock.acquire()
    assert path.exists()
    assert is_held(path)
    lock.release()


def test_a_lock_file_removed_while_it_is_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that finishes a segment deletes its lock; one that took it just then retries."""
    path = tmp_path / "a.own"
    removals, kernel_lock = [path], locks._kernel_lock

    def lock_after_removal(descriptor: int) -> bool:
        if removals:
            removals.pop().unlink()
        return kernel_lock(descriptor)

    opened: list[int] = []

    def open_after_closing(path: Path, flags: int) -> int:
        for descriptor in opened:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(descriptor)
        opened.append(open_file(path, flags))
        return opened[-1]

    monkeypatch.setattr(locks, "open_file", open_after_closing)
    monkeypatch.setattr(locks, "_kernel_lock", lock_after_removal)
    lock = FileLock(path)
    assert lock.acquire()
    assert path.exists()
    assert not _other_process_acquires(path)
    assert len(opened) == 2
    lock.release()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere no server reports it so late")
def test_a_late_error_of_the_file_system_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, closing a file may fail, but it is closed."""
    lock, close = FileLock(tmp_path / "x.own"), os.close
    assert lock.acquire()

    def close_badly(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close_badly)
        lock.release()
    assert not is_held(lock.path)


def test_looking_creates_nothing(tmp_path: Path) -> None:
    """Asking whether a lock is held leaves no file behind."""
    assert not is_held(tmp_path / "none.own")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_kernel_locks")
def test_without_kernel_locks_a_live_holder_is_respected(tmp_path: Path) -> None:
    """On a file system without locks, the holder's name in the file is the lock."""
    path = tmp_path / "a.own"
    first = FileLock(path)
    second = FileLock(path)
    assert first.acquire()
    locks._held.pop(str(path))  # As if the second were another process.
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


@pytest.mark.usefixtures("no_kernel_locks")
@pytest.mark.parametrize(
    ("changes", "lives"),
    [
        ({}, True),
        ({"pid": 2**22 + 1}, False),
        ({"boot": "another boot"}, False),
        ({"start": "another start"}, False),
        ({"host": "elsewhere"}, True),
    ],
)
def test_without_kernel_locks_a_dead_holder_is_known(
    tmp_path: Path, changes: dict[str, object], lives: bool
) -> None:
    """Here, pid, start and boot identify the holder; one on another machine is presumed alive."""
    path = tmp_path / "a.own"
    path.write_text(json.dumps({**locks._identity(os.getpid()), **changes}))
    lock = FileLock(path)
    assert lock.acquire() is not lives
    lock.release()


@pytest.mark.usefixtures("no_kernel_locks")
def test_without_kernel_locks_a_holder_elsewhere_grows_stale(tmp_path: Path) -> None:
    """A holder on another machine is presumed dead after a day without a sign."""
    path = tmp_path / "a.own"
    assert socket.gethostname() != "elsewhere"
    path.write_text(json.dumps({**locks._identity(os.getpid()), "host": "elsewhere"}))
    long_ago = time.time() - locks.STALE_S - 1
    os.utime(path, (long_ago, long_ago))
    lock = FileLock(path)
    assert lock.acquire()
    lock.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_holds_none_of_its_parents_locks(tmp_path: Path) -> None:
    """Whatever the parent had locked is free once the parent gives it up, while the child lives."""
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(done, b".")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        lock.release()
        assert FileLock(tmp_path / "lock").acquire()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(done)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_released_lock_is_free_although_a_child_has_a_copy(tmp_path: Path) -> None:
    """A child that is forked amid the release has a copy of the descriptor that nothing closes."""
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    assert lock._descriptor is not None
    copy = os.dup(lock._descriptor)  # As the child has it.
    lock.release()
    assert FileLock(tmp_path / "lock").acquire()
    os.close(copy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("no_kernel_locks")
def test_a_child_forked_amid_taking_a_lock_has_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernel locks this takes a moment; the lock is the parent's."""
    children = []

    def fork_meanwhile(seconds: float) -> None:
        if child := os.fork():
            children.append(child)
            return
        open_files = Path("/dev/fd").iterdir()
        os._exit(any(file.exists() and file.samefile(lock.path) for file in open_files))

    monkeypatch.setattr(time, "sleep", fork_meanwhile)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    monkeypatch.undo()
    [child] = children
    assert os.waitpid(child, 0)[1] == 0
    lock.release()
