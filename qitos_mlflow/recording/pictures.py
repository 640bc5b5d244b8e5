"""Pictures of one pipeline's spans, taken out of their records. Spooling thread.

A model is sent all pictures of a conversation again with every step. Each is recorded once for each
trace; the other records refer to it.
"""

from __future__ import annotations

from typing import Any

import orjson

from qitos_mlflow.redaction.pictures import Pictures, take_pictures
from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS

MAX_KNOWN = 10_000
"""Pictures that are remembered; one that is forgotten is recorded once more."""


class TakenPictures:
    """Takes pictures out of records, and remembers which are recorded.

    Args:
        max_bytes: a larger picture is left out of the record (bytes); 0: all are left as they are.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._known: dict[tuple[str, str], None] = {}

    def take(self, record: dict[str, Any], *, all_sizes: bool) -> Pictures:
        """Replace the record's pictures by references; returns their contents.

        Args:
            record: a span's; changed.
            all_sizes: also those that may stay inlined.
        """
        found: Pictures = {}
        if self.max_bytes and record["kind"] == "span":
            least_chars = 0 if all_sizes else MAX_INLINED_CHARS
            for part in ("data", "output"):
                if part in record:
                    record[part] = take_pictures(record[part], least_chars, self.max_bytes, found)
        return found

    def keep(self, record: dict[str, Any], found: Pictures) -> None:
        """Add those to the record that it still refers to and that its trace does not have yet.

        What was redacted or cut is no longer there: its picture stays out, too.
        """
        if not found:
            return
        text, trace_id = orjson.dumps(record), record["trace_id"]
        new = {
            key: content
            for key, content in found.items()
            if (trace_id, key) not in self._known and key.encode() in text
        }
        if new:
            record["pictures"] = new
            self._known.update(dict.fromkeys((trace_id, key) for key in new))
            while len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]

    def forget(self, record: dict[str, Any]) -> None:
        """A record was lost: the next one that refers to its pictures has them again."""
        for key in record.get("pictures", ()):
            self._known.pop((record["trace_id"], key), None)
