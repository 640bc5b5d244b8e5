"""Which process appends to a segment and which sends it: locks that end with the process.

The kernel keeps the lock (`flock`, on Windows `msvcrt.locking`), so there is no stale one to judge.
The `filelock` package does this too, but releasing its lock in a forked child unlocks the parent.

If the file system has no locks (some NFS mounts: ENOLCK, ENOTSUP), the lock file names its holder
instead: machine, boot, pid and the process's start. A holder on this machine is checked exactly.
One on another machine counts as alive until its lock file has been untouched for `STALE_S`. If two
processes take over from a dead holder at the same moment, the one that wrote last has the lock.
Should both go on regardless, records are sent twice, which sinks make harmless.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from qitos_mlflow._inheritance import check, disown_in_child
from qitos_mlflow.delivery.spool.files import Untrusted, is_at, json_object, open_file, write_all

STALE_S = 24 * 3600.0
"""Without kernel locks: a holder on another machine is presumed dead after this long (seconds)."""
SETTLE_S = 0.05
"""Without kernel locks: a taker checks this long after writing its name that it is still there
(seconds)."""

LOCK_TRIES = 3
LOCK_RETRY_S = 0.02
"""`is_held` has a lock for a few microseconds: taking it is tried again after this (seconds)."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_held: dict[str, FileLock] = {}
"""Lock files held by this process: testing them through the kernel could release them (NFS)."""


if sys.platform == "win32":
    import msvcrt

    def _kernel_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # Locked bytes cannot be read: lock none in use.
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        return True

else:
    import fcntl

    def _kernel_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class FileLock:
    """An exclusive lock on `path`, held from `acquire` to `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire_patiently(self) -> bool:
        """Like `acquire`, but waits for a process that only tests whether the lock is held."""
        for _ in range(LOCK_TRIES):
            if self.acquire():
                return True
            time.sleep(LOCK_RETRY_S)
            check()
        return self.acquire()

    def acquire(self, *, create: bool = True) -> bool:
        """Take the lock without waiting; False when another holder has it.

        Args:
            create: create the lock file; otherwise one that is missing cannot be taken.

        Raises:
            OSError: the lock file cannot be opened.
        """
        if self._descriptor is not None:
            if is_at(self._descriptor, self.path):
                return True
            self.release()  # The file was deleted: no other process can see this lock.
        if str(self.path) in _held:
            return False
        while True:
            try:
                descriptor = open_file(self.path, os.O_RDWR | (os.O_CREAT if create else 0))
            except FileNotFoundError:
                if create:
                    raise
                return False
            self._descriptor = descriptor
            disown_in_child(self)
            taken = held = False
            try:
                taken = self._take(descriptor)
                held = taken and is_at(descriptor, self.path)
            finally:
                if not held:
                    self.disown()
            if held:
                _held[str(self.path)] = self
                return True
            if not taken:
                return False
            # Its last holder has deleted the file meanwhile: take the new one.

    def disown(self) -> None:
        """Close the file. In a forked child: releases nothing while the parent has its own open."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            if _held.get(str(self.path)) is self:
                del _held[str(self.path)]
            os.close(descriptor)

    def _take(self, descriptor: int) -> bool:
        try:
            return _kernel_lock(descriptor)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        if _holder_lives(descriptor):
            return False
        mine = json.dumps({**_identity(os.getpid()), "token": secrets.token_hex(8)}).encode()
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        write_all(descriptor, mine)
        time.sleep(SETTLE_S)
        check()
        return _content(descriptor) == mine

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up; with `remove`, delete its file before another process can take it."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        if sys.platform == "win32":
            os.close(descriptor)  # An open file cannot be removed there.
        with suppress(OSError):  # The lock goes with the descriptor in any case.
            if remove:
                self.path.unlink(missing_ok=True)
            elif sys.platform != "win32" and _content(descriptor):
                os.ftruncate(descriptor, 0)  # Without kernel locks, the holder's name is the lock.
        _held.pop(str(self.path), None)
        if sys.platform != "win32":
            with suppress(OSError):  # A child forked just now may have a copy that nothing closes.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            with suppress(OSError):  # NFS may report an error of earlier; the descriptor is closed.
                os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether any process holds the lock on `path` now. Takes it for a moment to find out."""
    if str(path) in _held:
        return True
    probe = FileLock(path)
    try:
        taken = probe.acquire(create=False)
    except Untrusted:
        return False  # None of ours can hold it.
    except OSError:
        return True  # It cannot be tested, so a holder must not be disturbed.
    probe.release()
    return not taken and path.exists()


def _content(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 4096)


def _holder_lives(descriptor: int) -> bool:
    holder = json_object(_content(descriptor))
    pid, machine = holder.get("pid"), holder.get("host")
    if not isinstance(machine, str) or type(pid) is not int or not 0 < pid < 1 << 31:
        return False  # Released, or never held.
    if machine != socket.gethostname():
        return time.time() - os.fstat(descriptor).st_mtime < STALE_S
    return all(holder.get(key) == value for key, value in _identity(pid).items())


def _identity(pid: int) -> dict[str, object]:
    """Identifies the process `pid` of this machine; differs once that process is gone."""
    boot = start = ""  # They stay empty on systems that do not say.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError, IndexError):  # Field 22; the second one may hold spaces and parentheses.
        start = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    if not start:
        try:
            os.kill(pid, 0)
        except OSError as error:
            start = "gone" if isinstance(error, ProcessLookupError) else ""
    return {"host": socket.gethostname(), "boot": boot, "pid": pid, "start": start}
