"""Records read from the spool, with the messages of model calls in MLflow's form."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping import chat_messages
from qitos_mlflow.mlflow_plugin.mapping.attachments import may_show
from qitos_mlflow.mlflow_plugin.mapping.content_blocks import Encoded
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import encode_messages
from qitos_mlflow.recording.conversation import Conversations, marked
from qitos_mlflow.recording.record import Record


class Decoded(NamedTuple):
    """A record."""

    record: Record
    """Its messages may be `Encoded`."""
    rest: bytes
    """Its JSON without the messages that were known."""


class RecordReader:
    """Reads records of a segment, and works on each message of a conversation once. One thread."""

    def __init__(self) -> None:
        self._conversations = Conversations(_encoded)

    def read(self, data: bytes) -> Decoded:
        """The record `data`.

        Raises:
            MemoryError, JSONDecodeError: as `_json.loads_foreign`.
        """
        found = self._conversations.read(data, _json.loads_foreign)
        messages = None if found is None else marked(found.record)
        if found is None or messages is None or may_show(found.rest):
            return Decoded(_json.loads_foreign(data), data)
        messages[:] = [Encoded(found.result)]
        return Decoded(cast("Record", found.record), found.rest)


def _encoded(message: dict[str, Any], text: bytes) -> bytes | None:
    """A message in MLflow's form; None: it may have pictures, which belong to a trace."""
    return None if may_show(text) else encode_messages(chat_messages.request([message])[0])
