"""Pictures of spans, taken out of their records. Used by one thread.

A model is sent all pictures of a conversation again with every step. Each is recorded once for each
trace; the other records refer to it.
"""

from __future__ import annotations

from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.redaction.pictures import Pictures, take_pictures
from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS

MAX_KNOWN = 10_000
"""Pictures of one trace that are remembered. After so many, all are recorded once more."""


class TakenPictures:
    """Takes pictures out of records, and remembers which are recorded.

    Args:
        max_bytes: a larger picture is left out of the record (bytes); 0: all are left as they are.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._known: dict[str, set[str]] = {}

    def take(self, record: dict[str, Any], least_chars: int = MAX_INLINED_CHARS) -> Pictures:
        """Replace the pictures of a span's record by references; returns their contents.

        Args:
            record: it is changed.
            least_chars: shorter ones stay inlined (characters).
        """
        found: Pictures = {}
        if self.max_bytes and record["kind"] == "span":
            for part in ("data", "output"):
                if part in record:
                    record[part] = take_pictures(record[part], least_chars, self.max_bytes, found)
        return found

    def keep(self, record: dict[str, Any], found: Pictures) -> None:
        """Add to the record the pictures that it still refers to and its trace does not have yet.

        If a reference was redacted or cut, its picture is left out, too.
        """
        if found:
            text, known = _json.dumps(record), self._known.setdefault(record["trace_id"], set())
            if len(known) > MAX_KNOWN:
                known.clear()
            new = {key: base64 for key, base64 in found.items() if key.encode() in text}
            if new := {key: base64 for key, base64 in new.items() if key not in known}:
                record["pictures"] = new
                known.update(new)
        if record["kind"] == "trace_end" or "late" in record:
            self._known.pop(record["trace_id"], None)

    def forget(self, record: dict[str, Any]) -> None:
        """A record was lost: the next one that refers to its pictures has them again."""
        if known := self._known.get(record["trace_id"]):
            known.difference_update(record.get("pictures", ()))
