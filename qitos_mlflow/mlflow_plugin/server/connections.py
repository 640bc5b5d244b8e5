"""Connections to a server that a forked child closes at once, also one that is in use.

Nothing is sent over them: the connection, the request under way and TLS go on in the parent.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.exceptions import InsecureRequestWarning

from qitos_mlflow._inheritance import check, disown_in_child


class _Watched:
    """Mixed into a urllib3 connection. While it connects, a child cannot close it."""

    sock: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        disown_in_child(self)

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        check()

    def disown(self) -> None:
        sock, self.sock = self.sock, None
        # It may be within an object that speaks TLS: through a proxy, or with pyOpenSSL.
        if sock is not None and (descriptor := getattr(sock, "socket", sock).detach()) >= 0:
            os.close(descriptor)


class _Tolerant:
    """Mixed into a urllib3 pool. Its warning of unverified requests may be raised as an error."""

    def _validate_conn(self, connection: Any) -> None:
        with suppress(InsecureRequestWarning):
            super()._validate_conn(connection)  # type: ignore[misc]


class WatchedAdapter(HTTPAdapter):
    """What `requests` connects with. Versions before 2.32 call `get_connection`."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        return _watched(super().get_connection_with_tls_context(*args, **options))

    def get_connection(self, *args: Any, **options: Any) -> Any:  # noqa: D102
        return _watched(super().get_connection(*args, **options))

    def close(self) -> None:
        """Close connections also while the interpreter ends: urllib3 no longer does then."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for pool in list(manager.pools._container.values()):
                pool.close()
        super().close()


def _watched(pool: Any) -> Any:
    kind = pool.ConnectionCls
    if not issubclass(kind, _Watched):
        pool.ConnectionCls = type(kind.__name__, (_Watched, kind), {})
        pool.__class__ = type(type(pool).__name__, (_Tolerant, type(pool)), {})
    return pool
