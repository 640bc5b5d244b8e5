"""The conversation in a record, of which each message is worked on once.

A model is sent its whole conversation again with each call, so most of a record is known: its list
of messages begins with a whole list from before. `Conversations` remembers the JSON of the last
lists, and what came of them, and takes that part out of a record before it is parsed. The other
messages it knows, or does not, by their own JSON: so a conversation that was edited, compacted or
put in another order is worked on anew only where it differs.

The spooling thread redacts with one of these, the sending thread makes MLflow's form with another.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from secrets import randbits
from typing import Any, NamedTuple

from qitos_mlflow import _json

MAX_LISTS, LISTS_BYTES = 32, 8 * 1024 * 1024
"""How many conversations are remembered at once, and what they may take in all (bytes)."""
MESSAGES_BYTES = 2 * 1024 * 1024
"""What single messages may take in all (bytes)."""

_FIELD = b'"input_content":'
_LIST = re.compile(_FIELD + rb'(?:\{"messages":)?\[(?=\{)')
"""Where a conversation begins. Not in a text: JSON escapes quotes there."""
_MARK = randbits(62)
"""Stands for the messages that are taken out. Random, so that no record has it."""
_MARKED = b"[%d]" % _MARK

Work = Callable[[dict[str, Any], bytes], "bytes | None"]


class Read(NamedTuple):
    """A record whose conversation has been worked on."""

    record: dict[str, Any]
    """The record; in its list of messages is nothing but `result`'s mark."""
    result: bytes
    """What came of the messages, joined."""
    rest: bytes
    """The record's JSON without the messages that were known."""


class Conversations:
    """Reads records, and works on those messages in them that are new. One thread.

    Args:
        work: gets a message and its JSON, and returns what comes of it. None: that depends on more
            than the message.
        joint: what stands between the results of two messages.
    """

    def __init__(self, work: Work, joint: bytes = b"") -> None:
        self._work, self._joint = work, joint
        self._lists: list[tuple[bytes, bytes]] = []  # The last one used is the last.
        self._lists_bytes = 0
        self._messages: OrderedDict[bytes, bytes] = OrderedDict()
        self._messages_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What it remembers (bytes)."""
        return self._lists_bytes + self._messages_bytes

    def read(self, data: bytes, loads: Callable[[bytes], Any] = _json.loads) -> Read | None:
        """The record `data`, with its conversation worked on. None: it is to be read as a whole.

        Raises:
            MemoryError, JSONDecodeError: as `loads`.
        """
        begins = _LIST.match(data, at) if (at := data.find(_FIELD)) >= 0 else None
        if begins is None or _json.is_limited():  # Then each look at the memory takes longer.
            return None
        at = start = begins.end()
        text = result = b""
        if (known := self._known(data, at)) is not None:
            text, result = self._lists[known]
            at += len(text)
        comma = b"" if text else b","
        rest = b"%b%d%b%b" % (data[:start], _MARK, comma, data[at:])
        record = loads(rest)
        messages = marked(record)
        if messages is None:
            return None
        texts = [text] if text else []
        results = [result] if text else []
        for message in messages[1:]:
            if type(message) is not dict:
                return None
            try:
                own = _exact(_json.dumps_strict(message))
            except TypeError:  # More levels than orjson writes: not from this program.
                return None
            if (done := self._remembered(own, message)) is None:
                return None
            texts.append(own)
            results.append(done)
        text, result = b",".join(texts), self._joint.join(results)
        # Else it was written in another way, and will be again.
        end = start + len(text)
        if data.startswith(text, start) and data[end : end + 1] == b"]":
            self._remember(known, text, result)
        messages[:] = [_MARK]
        return Read(record, result, rest)

    def _known(self, data: bytes, at: int) -> int | None:
        """Index of the longest list that the one at `at` begins with."""
        found, longest = None, 0
        for index, (text, _) in enumerate(self._lists):
            size = len(text)
            goes_on = data[at + size : at + size + 1] in (b",", b"]")
            if size > longest and goes_on and data.startswith(text, at):
                found, longest = index, size
        return found

    def _remember(self, known: int | None, text: bytes, result: bytes) -> None:
        """Keep a list in the place of the one that it continues."""
        if known is not None:
            self._forget(known)
        self._lists.append((text, result))
        self._lists_bytes += len(text) + len(result)
        while self._lists_bytes > LISTS_BYTES or len(self._lists) > MAX_LISTS:
            self._forget(0)

    def _forget(self, index: int) -> None:
        self._lists_bytes -= sum(map(len, self._lists.pop(index)))

    def _remembered(self, text: bytes, message: dict[str, Any]) -> bytes | None:
        """What comes of a message."""
        result = self._messages.get(text)
        if result is not None:
            self._messages.move_to_end(text)
            return result
        result = self._work(message, text)
        if result is not None:
            self._messages[text] = result = _exact(result)
            self._messages_bytes += len(text) + len(result)
            while self._messages_bytes > MESSAGES_BYTES:
                self._messages_bytes -= sum(map(len, self._messages.popitem(last=False)))
        return result


def _exact(data: bytes) -> bytes:
    """A copy of what orjson made, which keeps the room that was reserved: up to eight times."""
    return bytes(memoryview(data))


def marked(record: Any) -> list[Any] | None:
    """The list of messages in a record if it begins with the mark."""
    found = record["data"] if type(record) is dict and "data" in record else None
    found = found.get("input_content") if type(found) is dict else None
    found = found.get("messages") if type(found) is dict else found
    return found if type(found) is list and found[:1] == [_MARK] else None


def put_back(data: bytes, result: bytes) -> bytes:
    """The JSON of a marked record with its messages, as JSON, in the place of the mark."""
    return data.replace(_MARKED, b"[%b]" % result, 1)
