"""A snapshot becomes the record that goes to disk: times, stacks, redaction, contributions.

Runs on the spooling thread. This is the only place where secrets are taken out: every record passes
`normalize` before it reaches the spool or a server. Contributions are values that other plugins
have and this package does not log itself: docs/extending.md.
"""

from __future__ import annotations

import linecache
import os
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qitos_mlflow import _json, tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.delivery import Untrusted, open_regular
from qitos_mlflow.recording.conversation import Conversations, Read, marked, put_back
from qitos_mlflow.recording.picture_files import put_files
from qitos_mlflow.recording.pictures import TakenPictures
from qitos_mlflow.recording.record import RECORD_VERSION
from qitos_mlflow.recording.to_json import Snapshot, as_json, encode
from qitos_mlflow.redaction.pictures import Pictures, take_pictures
from qitos_mlflow.redaction.redact import redact, redact_json
from qitos_mlflow.redaction.structures import is_in_key
from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS, note_large, trim_fields

OURS = frozenset(
    {"kind", "trace_id", "span_id", "parent_id", "type", "step", "time_ns", "start_ns", "end_ns"}
    | {"version"}
)
"""Fields with our own ids, times and words. They are neither redacted nor cut."""

PARTS = ("attributes", "metrics", "tags")
"""What a plugin may add to a record."""

RESERVED = ("mlflow.", "qitos.")
"""Names that begin so have a meaning for MLflow or for this package."""

KINDS = frozenset({"trace_start", "span", "trace_end"})
"""Kinds of records that plugins are asked about."""

MAX_FILE_BYTES = 16 * 1024 * 1024
"""A larger file of a run stays where it is; the artifact gives its path and size."""

UNCUT = OURS | {"settings"}

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

MAX_ANSWERS = 1_000
"""Answers of plugins that the second thread has not asked for yet."""

_answers: dict[tuple[Any, Any], dict[str, Any]] = {}
_asking = threading.RLock()


def _after_fork() -> None:
    global _asking
    _asking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def normalize(
    snapshot: Snapshot | bytes,
    field_bytes: int,
    complete: Callable[[dict[str, Any]], None] = lambda record: None,
    pictures: TakenPictures | None = None,
    conversations: Conversations | None = None,
) -> bytes | None:
    """The redacted record of one snapshot; None if the snapshot names a file that does not exist.

    Args:
        snapshot: of one event; or its JSON.
        field_bytes: largest size of one field; a larger one is cut (bytes). Files are never cut.
        complete: writes into the record what is known only now: what was lost before it.
        pictures: takes pictures out; None: large ones become notes.
        conversations: has `redacted_message` work on each message once.

    Raises:
        OSError: a file of the run cannot be read.
    """
    data = as_json(snapshot)
    found = None
    if conversations is not None and not _takes_pictures(data, field_bytes):
        found = conversations.read(data)
    record = _json.loads(data) if found is None else found.record
    record["version"] = RECORD_VERSION
    if record["kind"] == "artifact":
        return _json.dumps(_redacted_file(record)) if _read_file(record) else None
    complete(record)
    pictures = None if record.pop("no_pictures", False) else pictures
    record = safe(record, len(data), field_bytes, pictures, found)
    record |= additions(record, field_bytes, found)
    stored = _json.dumps(record)
    return stored if found is None else put_back(stored, found.result)


def _takes_pictures(data: bytes, field_bytes: int) -> bool:
    """Whether `safe` may take pictures out of messages that `redacted_message` leaves in."""
    if b'"picture_files":' in data:
        return True
    return len(data) > field_bytes and (b"image/" in data or b'"images"' in data)


def redacted_message(message: dict[str, Any], text: bytes, max_picture_bytes: int) -> bytes | None:
    """A message of a conversation as JSON without credentials; None: what is around it matters.

    Does to it what `safe` does. It takes out no pictures: they belong to the record.
    """
    if len(text) > MAX_INLINED_CHARS:
        pictures: Pictures = {}
        take_pictures(message, MAX_INLINED_CHARS, max_picture_bytes, pictures)
        if pictures:
            return None
        message = note_large(message)
    return None if is_in_key(message, False) else _json.dumps(redact(message))


def read(snapshot: Snapshot | bytes) -> tuple[dict[str, Any], int]:
    """The record of a snapshot, with nothing but what JSON has, and its size as JSON (bytes)."""
    data = as_json(snapshot)
    return _json.loads(data), len(data)


def safe(
    record: dict[str, Any],
    size: int,
    field_bytes: int,
    pictures: TakenPictures | None = None,
    messages: Read | None = None,
) -> dict[str, Any]:
    """The record with times as numbers, without credentials, and cut; a file has a way of its own.

    Args:
        record: as `read` returns it; it is changed.
        size: as `read` returns it (bytes).
        field_bytes: largest size of one field (bytes).
        pictures: as in `normalize`.
        messages: those that are taken out of the record.
    """
    _spell_out(record)
    put_files(record)
    # Pictures first: they cost no search for credentials then, and no text is cut for them.
    taken: Pictures = {}
    if size > MAX_INLINED_CHARS:
        if pictures is not None:
            taken = pictures.take(record, 0 if size > field_bytes else MAX_INLINED_CHARS)
        record = note_large(record)
    record = _redacted(record)
    # Cut last: a cut could leave half a secret, which nothing recognises.
    if size > field_bytes:
        if messages is not None and (marked_list := marked(record)) is not None:
            marked_list[:] = _json.loads(b"[%b]" % messages.result)
        content = {name: value for name, value in record.items() if name not in UNCUT}
        record |= trim_fields(content, field_bytes)
    if pictures is not None:
        pictures.keep(record, taken)
    return record


def additions(
    record: dict[str, Any], field_bytes: int, messages: Read | None = None
) -> dict[str, Any]:
    """The field `added` of a redacted record with what plugins add, or nothing.

    Two threads ask for one that is `shared`; the plugins are asked once. Plugins see the messages
    that are taken out of the record, too.
    """
    key, shared = (record.get("trace_id"), record.get("span_id")), record.pop("shared", False)
    if not asked():
        return {}
    with _asking:  # Plugins expect one call at a time.
        found = _answers.pop(key, None) if shared else None
        if found is None:
            shown = {name: value for name, value in record.items() if name != "pictures"}
            if messages is not None:
                shown = _json.loads(put_back(_json.dumps(shown), messages.result))
            found = _ask_plugins(shown)
            if shared:
                _answers[key] = found
                while len(_answers) > MAX_ANSWERS:  # The other thread has lost its record.
                    del _answers[next(iter(_answers))]
    if not found:
        return {}
    own = record.get("added", {})
    merged = {part: {**own.get(part, {}), **found.get(part, {})} for part in {**own, **found}}
    return trim_fields({"added": redact(merged)}, field_bytes)


def _read_file(record: dict[str, Any]) -> bool:
    """Replace the path in `file`, if `record` has one, by the content; False if no file is there.

    Newlines stay as they are; bytes that are not UTF-8 become U+FFFD.

    Raises:
        OSError: the file exists and cannot be read.
    """
    if "file" in record:
        path = Path(record.pop("file"))
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    large = f"{path} has {size} bytes; files over {MAX_FILE_BYTES} stay there\n"
                    record["content"] = large
                else:
                    record["content"] = file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except Untrusted:  # What a link names is no file of the run.
            record["content"] = f"{path} is a link or no regular file, so it is not stored\n"
    return True


def asked() -> list[Any]:
    """The processors of the global provider with plugins that look at records."""
    return [one for one in tracing.processors() if getattr(one, "wants_records", False)]


def _ask_plugins(record: dict[str, Any]) -> dict[str, Any]:
    """What the plugins attached to the global provider add to `record`, as plain JSON.

    If two plugins give the same name, the one that is asked last wins. A plugin that returns
    something wrong adds nothing to this record, and is named in the log.
    """
    found: dict[str, Any] = {}
    if record["kind"] not in KINDS:
        return found
    for processor in asked():
        answers = []
        with shield(f"{type(processor).__qualname__}.on_record"):
            answers = [*processor.on_record(record)]
        for plugin, returned in answers:
            with shield(plugin):  # The record is kept without.
                for part, values in _checked(returned).items():
                    found.setdefault(part, {}).update(_json.loads(as_json(encode(values))))
    return found


def _checked(returned: Any) -> dict[str, dict[str, Any]]:
    """What a plugin returned, as dicts.

    Raises:
        TypeError: it does not have the form that the hook asks for; the text says what is wrong.
        ValueError: a part is unknown, or a name is reserved.
    """
    if not isinstance(returned, Mapping) or not all(
        isinstance(values, Mapping) for values in returned.values()
    ):
        raise TypeError(f"qitos_record returned {returned!r:.200}, not a dict of dicts")
    if unknown := set(returned) - set(PARTS):
        raise ValueError(f"qitos_record returned {sorted(map(str, unknown))}, not in {PARTS}")
    for part, values in returned.items():
        for name in values:
            if not isinstance(name, str) or name.startswith(RESERVED):
                raise ValueError(f"{name!r} cannot be a name among the {part} of a plugin")
    return {part: dict(values) for part, values in returned.items()}


def _spell_out(record: dict[str, Any]) -> None:
    """Replace times as text by nanoseconds, and stack frames by the text of the traceback."""
    for text, number in (("started_at", "start_ns"), ("ended_at", "end_ns")):
        if text in record:
            record[number] = nanoseconds(record.pop(text))
    for key in ("exception", "error"):
        failure = record.get(key)
        if isinstance(failure, dict) and "frames" in failure:
            failure["stacktrace"] = _stack(failure)


def _redacted(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if value is None or name in OURS else redact(value)
        for name, value in record.items()
    }


def _redacted_file(record: dict[str, Any]) -> dict[str, Any]:
    """A file of the run without credentials; JSON is redacted by its structure and stays JSON."""
    content = record.get("content")
    path = str(record.get("path"))
    if not isinstance(content, str) or not path.endswith((".json", ".jsonl")):
        return _redacted(record)
    lines = content.split("\n") if path.endswith(".jsonl") else [content]
    return {
        **_redacted({**record, "content": None}),
        "content": "\n".join(redact_json(line) for line in lines),
    }


def nanoseconds(iso: str | None) -> int | None:
    """Nanoseconds since the epoch of an ISO 8601 time; a time without a zone is UTC."""
    if not isinstance(iso, str):
        return None
    try:
        moment = datetime.fromisoformat(iso[:-1] + "+00:00" if iso[-1:] == "Z" else iso)
    except ValueError:
        return None
    since = moment - (_EPOCH if moment.tzinfo else _EPOCH.replace(tzinfo=None))
    # Integers only: a float of nanoseconds is off by hundreds.
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1_000


def _stack(failure: dict[str, Any]) -> str:
    """The traceback as Python prints it, with source lines; takes `frames` out of `failure`."""
    lines = ["Traceback (most recent call last):"]
    for file, number, function in failure.pop("frames"):
        lines.append(f'  File "{file}", line {number}, in {function}')
        if source := linecache.getline(file, number).strip():
            lines.append(f"    {source}")
    lines.append(f"{failure.get('type')}: {failure.get('message')}")
    return "\n".join(lines)
