"""What a forked child inherits and must not use: descriptors and, with gevent, threads.

The child closes its copies of our files and sockets at once. Python would close them later by their
numbers, which files of the program may have by then. With gevent, threads are greenlets and go on
in the child: ours end there after the wait that they are in.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Forked(BaseException):
    """Ends a thread in a forked child. Not an `Exception`: nothing handles it on the way."""


here = threading.local()
"""`pid` is that of the process for which a thread of ours works; None or missing elsewhere."""
_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def check() -> None:
    """End a thread of the parent process. Called after all that waits, before anything is done."""
    if getattr(here, "pid", None) not in (None, os.getpid()):
        raise Forked


def disown_in_child(owner: Any) -> None:
    """Have a forked child call `owner.disown`, which closes copies and takes no lock."""
    _owners.add(owner)


def _after_in_child() -> None:
    here.pid = None  # A plugin that forks on a thread of ours goes on there.
    for owner in list(_owners):
        with suppress(Exception):  # Such as a descriptor that is closed already.
            owner.disown()
    _owners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
