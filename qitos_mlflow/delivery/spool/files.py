"""How the spool opens, makes, replaces and reads files and directories: the one place for it.

Other users of the machine may put things where ours are expected. Only regular files are opened,
never through a link and without waiting (a FIFO has a file wait for a writer), and only those of
trusted users: this one, root, and those that the setting `spool_owners` names. What is read at once
has a bound.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE_BYTES = 128 * 1024 * 1024
"""No file of the spool becomes as large as this: parts and dead letters have lower bounds."""

_PRIVATE_FILE = 0o600
_PRIVATE_DIRECTORY = 0o700
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SAFELY = 0
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _SAFELY |= getattr(os, _name, 0)
_NO_FILE = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR}
"""How opening a link (also on BSD), a FIFO or socket, and a directory fails."""

_trusted: set[int] = set()


class Untrusted(PermissionError):
    """What is at a path was not put there by a process of ours. Waiting does not help."""


def trust(owners: Iterable[int]) -> None:
    """From now on trust files and directories of these users (their ids), in the whole process.

    A directory that group or others may write is accepted then: each file's owner is checked.
    """
    _trusted.update(owners)


def check_directory(directory: Path, *, repair: bool = False) -> None:
    """Raise `Untrusted` if users who are not trusted own `directory` or may write to it.

    A link in its place must be of a trusted user, too. A directory that does not exist passes.

    Args:
        directory: the spool.
        repair: take the permission to write from group and others if this user owns it.
    """
    try:
        link, status = directory.lstat(), directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    for one in (link, status):
        if not _is_trusted(one):
            told = f"It belongs to another user (uid {one.st_uid}, {_mode(one)})"
            raise Untrusted(errno.EPERM, f"{told}: {_instead(one.st_uid)}", str(directory))
    if _trusted or not status.st_mode & _OTHERS_WRITE or sys.platform == "win32":
        return
    ours = status.st_uid == os.geteuid()
    if repair and ours:
        with suppress(OSError):  # It is on a read-only disk.
            directory.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
        check_directory(directory)  # Some file systems have no modes.
        return
    told = f"Other users may write to it (uid {status.st_uid}, {_mode(status)})"
    first = "run `chmod go-w` on it, " if ours else ""
    raise Untrusted(errno.EPERM, f"{told}: {first}{_instead(os.geteuid())}", str(directory))


def check_file(path: Path | os.DirEntry[str]) -> int:
    """The size of a file, after the checks of `open_file`, and that it is not too large.

    Raises:
        OSError: there is none, or it cannot have been written by a process of ours.
    """
    status = path.stat(follow_symlinks=False)
    _check(status, path)
    if status.st_size > FILE_BYTES:
        raise _too_large(path, FILE_BYTES)
    return status.st_size


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the regular file at `path`, for its owner only when this creates it.

    Raises:
        Untrusted: it is no regular file, or its owner or that of a directory to create it in is
            not trusted, or it is to be written and has another name, too.
        OSError: it cannot be opened.
    """
    if flags & os.O_CREAT:
        check_directory(path.parent)
    descriptor = open_regular(path, flags & ~os.O_TRUNC)
    try:
        if not flags & os.O_EXCL:  # What it has made.
            status = os.fstat(descriptor)
            _check(status, path)
            # Where the system allows it, another user makes a hard link to any file of this one.
            if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
                raise Untrusted(errno.EPERM, "It is a hard link: remove it", os.fspath(path))
        if hasattr(os, "fchmod") and flags & os.O_CREAT:
            with suppress(OSError):  # Some network file systems have no modes.
                os.fchmod(descriptor, _PRIVATE_FILE)
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        _undo(descriptor, path, flags)
        raise
    return descriptor


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of the regular file at `path`, whoever owns it. Follows no link in its place.

    Raises:
        Untrusted: it is no regular file.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | _SAFELY, _PRIVATE_FILE)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _irregular(path) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _irregular(path)
    except BaseException:
        _undo(descriptor, path, flags)
        raise
    return descriptor


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """`open_file` for a block."""
    descriptor = open_file(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes of a file; fewer only at its end. Keeps nothing open."""
    with opened(path) as descriptor:
        size = min(size, os.fstat(descriptor).st_size - offset)
        data = b""
        if size > 0:
            os.lseek(descriptor, offset, os.SEEK_SET)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data


def read_whole(path: Path, most: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, or has more than `most` bytes.
    """
    data = read_at(path, 0, most + 1)
    if len(data) > most:
        raise _too_large(path, most)
    return data


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; empty if it is anything else, or names what is no character."""
    try:
        found = json.loads(data)
        if b"\\u" in data:
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_directory(directory: Path, *, fsync: bool = False) -> None:
    """Create `directory`, with the parents that it lacks, for its owner only.

    An existing one of this user is taken from all others who may write to it. With `fsync`, it and
    its parents are on the disk.

    Raises:
        OSError: it cannot be created, or `check_directory` refuses it.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(made):
        try:
            path.mkdir(mode=_PRIVATE_DIRECTORY)
        except FileExistsError:
            continue
        path.chmod(_PRIVATE_DIRECTORY)  # The umask may have taken even the owner's rights.
    check_directory(directory, repair=True)
    for path in made if fsync else ():
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring to the disk which files `directory` has: what was created, renamed and deleted."""
    if sys.platform == "win32":  # It has no such call.
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network file systems.
            raise
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: it was neither deleted nor replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; a short write is continued, so that its cause is raised."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_private(path: Path, data: Iterable[bytes], *, durable: bool) -> None:
    """Replace the content of `path` as a whole: a reader sees the old or the new one.

    With `durable`, `data` is on the disk before it takes the place of the old content.
    """
    check_directory(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            for some in data:
                write_all(descriptor, some)
            if durable:
                os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # What another user has put there, too, or the next time fails.
            temporary.unlink()
        raise


def _undo(descriptor: int, path: Path, flags: int) -> None:
    """Close a file, and delete it if it is new: the next try makes it again."""
    with suppress(OSError):
        os.close(descriptor)
    if flags & os.O_EXCL:
        with suppress(OSError):
            path.unlink()


def _is_trusted(status: os.stat_result) -> bool:
    if sys.platform == "win32":
        return True
    return status.st_uid in (0, os.geteuid()) or status.st_uid in _trusted


def _check(status: os.stat_result, path: os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _irregular(path)
    if not _is_trusted(status):
        told = (
            f"It belongs to another user (uid {status.st_uid}): remove it, {_trust(status.st_uid)}"
        )
        raise Untrusted(errno.EPERM, told, os.fspath(path))


def _irregular(path: os.PathLike[str]) -> Untrusted:
    return Untrusted(errno.EPERM, "It is no regular file: remove it", os.fspath(path))


def _too_large(path: os.PathLike[str], most: int) -> OSError:
    return OSError(
        errno.EFBIG, f"It has more than {most} bytes, so it is none of ours", os.fspath(path)
    )


def _mode(status: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(status.st_mode):04o}"


def _instead(owner: int) -> str:
    return f"name another directory with QITOS_MLFLOW_SPOOL_DIR, {_trust(owner)}"


def _trust(owner: int) -> str:
    return f"or name the users whose files you trust, such as QITOS_MLFLOW_SPOOL_OWNERS={owner}"
