"""What may be done for a segment: where it goes, and with which rights of the user who delivers it.

A segment is data from a disk. Whoever wrote it chose its destination. It gets credentials only for
a server that the user names. A segment of another origin may name no store of this machine either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qitos_mlflow.delivery import Paths
from qitos_mlflow.mlflow_plugin.server.tracking_uri import (
    is_http,
    is_local,
    names_place,
    on_disk,
)
from qitos_mlflow.redaction.redact import without_credentials
from qitos_mlflow.settings import default_spool


class Way(NamedTuple):
    """How a segment may be delivered.

    Attributes:
        uri: where it goes; None: MLflow's default store, as of the directory in its header.
        trusted: with the credentials of this process.
        files: its files may go where the server says, which may be somewhere else.
        needs: the option of `sync` without which it is not delivered; "": none.
    """

    uri: str | None
    trusted: bool
    files: bool
    needs: str = ""


@dataclass(frozen=True)
class Trust:
    """What the user who delivers has named and allowed.

    Attributes:
        named: the server or store of MLFLOW_TRACKING_URI or of the command line.
        given: it is that of the command line, so all segments go there.
        foreign: segments of another origin may write to this machine, too.
    """

    named: str | None
    given: bool = False
    foreign: bool = False

    def way(self, header: Mapping[str, Any], paths: Paths) -> Way:
        """How the segment with this header may be delivered."""
        recorded: str | None = header.get("tracking_uri")
        own = self.foreign or not is_foreign(paths)
        if self.given or self._names(recorded):
            return Way(self.named, trusted=True, files=own or is_local(self.named))
        if is_http(recorded):
            return Way(recorded, trusted=False, files=self.foreign)
        if not is_foreign(paths):
            return Way(recorded, trusted=True, files=True)
        if not is_local(recorded):  # Databases and Databricks take credentials of this machine.
            return Way(recorded, trusted=False, files=False, needs="--tracking-uri URI")
        needs = "" if self.foreign else "--trust"
        return Way(recorded, trusted=False, files=self.foreign, needs=needs)

    def _names(self, recorded: str | None) -> bool:
        if self.named is None or recorded is None:
            return False
        if without_credentials(self.named) == recorded:
            return names_place(recorded)
        place = on_disk(recorded)
        return place is not None and place == on_disk(self.named)


def is_foreign(paths: Paths) -> bool:
    """Whether another user may have made a segment, or chosen what is in it.

    All but the segments in this user's own spool are: the directory of `QITOS_MLFLOW_SPOOL_DIR` or
    of the command line may be shared, or come from anywhere.
    """
    return not is_own_spool(paths.directory) or not paths.all_own()


def is_own_spool(directory: Path) -> bool:
    """Whether it is the directory that no setting names."""
    try:
        return directory.samefile(default_spool())
    except OSError:
        return False
