"""A snapshot becomes the record on disk: times, stacks, files, and no credentials."""

from __future__ import annotations

import errno
import json
import os
import sys
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow.recording import normalize as normalizing
from qitos_mlflow.recording.normalize import nanoseconds, normalize
from qitos_mlflow.recording.record import RECORD_VERSION
from qitos_mlflow.recording.snapshot import describe
from qitos_mlflow.recording.to_json import encode
from qitos_mlflow.redaction.redact import MARKER
from qitos_mlflow.redaction.trim import cut

ROOM = 1_000_000


def normalized(record: dict[str, Any], field_bytes: int = ROOM) -> Any:
    """The record that goes to disk, without its version; None if there is none."""
    payload = normalize(encode({"kind": "span", **record}), field_bytes)
    if payload is None:
        return None
    found = orjson.loads(payload)
    assert found.pop("version") == RECORD_VERSION
    return found


# -- times -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1970-01-01T00:00:00+00:00", 0),
        ("2026-11-22T10:00:00.123456+00:00", 1_795_341_600_123_456_000),
        ("2026-11-22T10:00:00.123456Z", 1_795_341_600_123_456_000),
        ("2026-11-22T10:00:00.123456", 1_795_341_600_123_456_000),
        ("2026-11-22T12:00:00.123456+02:00", 1_795_341_600_123_456_000),
        ("2026-11-22T10:00:00", 1_795_341_600_000_000_000),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_times_are_exact(text: str | None, ns: int | None) -> None:
    """An ISO time becomes exact nanoseconds; a time without a zone is UTC."""
    assert nanoseconds(text) == ns


@given(
    moment=st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)),
    zone=st.sampled_from([timezone.utc, timezone(timedelta(hours=5, minutes=30))]),
)
def test_any_time_comes_back(moment: datetime, zone: timezone) -> None:
    """Every time in every zone is exact to the microsecond."""
    moment = moment.replace(tzinfo=zone)
    since = moment - datetime(1970, 1, 1, tzinfo=timezone.utc)
    assert nanoseconds(moment.isoformat()) == since // timedelta(microseconds=1) * 1_000


def test_a_spans_times_are_numbers() -> None:
    """Start and end are nanoseconds in the record; a missing time stays missing."""
    record = normalized({"started_at": "1970-01-01T00:00:01+00:00", "ended_at": None})
    assert record == {"kind": "span", "start_ns": 1_000_000_000, "end_ns": None}


# -- credentials and sizes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    ["data", "metadata", "output", "error", "exception", "name", "group_id", "user", "settings"],
)
def test_credentials_are_nowhere_in_a_record(where: str) -> None:
    """Credentials are redacted in every part of a record, by name and by shape."""
    number = uuid.uuid4().hex
    secret = f"sk-{number}{number}"
    for value in (secret, {"api_key": number}, {"deep": [{"password": number, "text": secret}]}):
        text = orjson.dumps(normalized({where: value})).decode()
        assert MARKER in text
        assert number not in text


def test_ids_and_words_of_ours_pass() -> None:
    """The record's own ids and words are not mistaken for credentials."""
    ids = {"trace_id": "a" * 64, "span_id": "sk-" + "b" * 40, "type": "tool", "step": 3}
    assert normalized(ids) == {"kind": "span", **ids}


def test_large_fields_are_trimmed_after_redaction() -> None:
    """A field is cut if it is too large, and no cut leaves half a credential."""
    number = uuid.uuid4().hex
    text = "x" * 990 + f" api_key={number}{number} " + "y" * 5_000
    record = normalized({"output": text, "data": {"short": "kept"}}, field_bytes=1_024)
    assert len(record["output"].encode()) <= 1_024
    assert number[:8] not in record["output"]
    assert "characters in all" in record["output"]
    assert record["data"] == {"short": "kept"}


def test_a_record_within_its_limit_is_not_touched() -> None:
    """Only a record that is too large is trimmed at all."""
    record = {"output": "x" * 900, "data": {"list": ["y" * 50]}}
    assert normalized(record, field_bytes=1_024) == {"kind": "span", **record}


def test_ids_and_settings_are_never_cut() -> None:
    """With the smallest field limit, a record still has its ids and the settings of its run."""
    record = {
        "trace_id": "a" * 64,
        "settings": {"experiment_name": "runs", "tags": {"a": "b" * 99}},
    }
    assert normalized({**record, "output": "x" * 5_000}, field_bytes=50) == {
        "kind": "span",
        **record,
        "output": "x" * 17 + "… [cut: 5000 characters in all]",
    }


# -- pictures --------------------------------------------------------------------------------

BASE64 = "iVBORw0KGgo" + "A" * 400_000
DATA_URL = f"data:image/png;base64,{BASE64}"
URL_NOTE = f"[image/png, {len(DATA_URL)} characters]"
NOTE = f"[image/png, {len(BASE64)} characters]"


@pytest.mark.parametrize("pictures", [1, 3, 12, 40])
def test_pictures_do_not_count_against_a_chat(pictures: int) -> None:
    """Any number of pictures become notes of their true sizes, and no text is cut."""
    system = {"role": "system", "content": "You see. " * 5_000}
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA_URL}}]}
    record = normalized({"data": {"input_content": [system, *[picture] * pictures]}})
    first, *others = record["data"]["input_content"]
    assert first == system
    assert len(others) == pictures
    assert all(one["content"][0]["image_url"]["url"] == URL_NOTE for one in others)


@pytest.mark.parametrize(
    ("block", "noted"),
    [
        (
            {"type": "image", "source": {"media_type": "image/png", "data": BASE64}},
            {"type": "image", "source": {"media_type": "image/png", "data": NOTE}},
        ),
        (
            {"inlineData": {"mimeType": "image/png", "data": BASE64}},
            {"inlineData": {"mimeType": "image/png", "data": NOTE}},
        ),
        (
            {"inline_data": {"mime_type": "image/png", "data": BASE64}},
            {"inline_data": {"mime_type": "image/png", "data": NOTE}},
        ),
        (
            {"input_audio": {"format": "wav", "data": BASE64}},
            {"input_audio": {"format": "wav", "data": NOTE.replace("image/png", "wav")}},
        ),
        ({"images": [BASE64]}, {"images": [NOTE.replace("image/png", "image")]}),
        ({"file": DATA_URL.replace("image/png", "")}, {"file": f"[data, {len(DATA_URL) - 9} "
                                                               "characters]"}),
    ],
)  # fmt: skip
def test_large_files_become_notes_wherever_they_are(block: Any, noted: Any) -> None:
    """Base64 beside its media type, as each provider has it, is a file too."""
    assert normalized({"data": {"tool_args": [block]}})["data"]["tool_args"] == [noted]


@pytest.mark.parametrize(
    "value",
    [
        {"format": "json", "data": '{"a": "b"} ' * 10_000},
        {"mimeType": "text/html", "data": "<p>text</p>" * 10_000},
        "data: it is text " * 10_000,
        {"data": BASE64},
        "A" * 100_000,
    ],
)
def test_long_texts_are_no_files(value: Any) -> None:
    """Readable text stays, also in a place where files are usual."""
    assert normalized({"output": value})["output"] == value


def test_small_pictures_go_whole_or_not_at_all() -> None:
    """Pictures that are too many for the field are never cut, nor is a text cut before them."""
    url = DATA_URL[:30_000]
    messages = [{"role": "system", "content": "s" * 5_000}, *[{"url": url}] * 40]
    first, *others = normalized({"data": {"input_content": messages}})["data"]["input_content"]
    assert first == messages[0]
    assert {one["url"] for one in others} == {"[image/png, 30000 characters]"}


def test_a_picture_that_the_snapshot_cut_has_its_true_size_in_its_note() -> None:
    """A tool may return nothing but a picture that is longer than the field."""
    assert normalized({"output": cut(DATA_URL, 100_000)})["output"] == URL_NOTE


def test_no_secret_comes_through_a_picture() -> None:
    """A note has no content of the file, and its media type is redacted too."""
    number = uuid.uuid4().hex
    secret = f"sk-{number}{number}"
    for value in (
        f"data:text/plain,api_key={number} " + "x" * 40_000,
        f"data:{secret}/{secret};base64," + "A" * 40_000,
        {"mime_type": secret, "data": "A" * 40_000},
        {"mime_type": f"https://user:{number}@host/", "data": "A" * 40_000},
        {"name": "api_key", "value": DATA_URL + number},
        ["--api-key", DATA_URL + number],
    ):
        assert number not in orjson.dumps(normalized({"output": value})).decode()


def test_a_picture_as_the_answer_is_a_whole_file() -> None:
    """Artifacts are never cut, pictures in them neither."""
    record = {"kind": "artifact", "path": "final_answer.txt", "content": DATA_URL}
    assert normalized(record)["content"] == DATA_URL


# -- exceptions ------------------------------------------------------------------------------


def caught() -> Exception:
    try:
        raise ValueError("api_key=0123456789abcdef")  # The line itself holds what must not go.
    except ValueError as error:
        return error


def test_a_stack_has_the_source_and_no_credentials() -> None:
    """The stack reads as Python prints it, with source lines, redacted like everything else."""
    record = normalized({"exception": describe(caught(), True), "error": describe(caught(), True)})
    for part in (record["exception"], record["error"]):
        lines = part["stacktrace"].splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[1].startswith(f'  File "{__file__}", line ')
        assert lines[1].endswith(", in caught")
        assert lines[2].startswith("    raise ValueError(")
        assert "0123456789abcdef" not in part["stacktrace"] + part["message"]
        assert "frames" not in part


def test_a_failure_without_a_stack_has_none() -> None:
    """With content off an exception has its type only."""
    failure = {"type": "ValueError", "message": "[content off]"}
    assert normalized({"exception": failure})["exception"] == failure


# -- files -----------------------------------------------------------------------------------


def test_a_file_travels_with_its_run(tmp_path: Path) -> None:
    """A file is read and redacted here, and never cut; a missing file makes no record."""
    file = tmp_path / "events.jsonl"
    number = uuid.uuid4().hex
    file.write_text('{"text": "' + "x" * 5_000 + f'", "api_key": "{number}"}}\n')
    record = {"kind": "artifact", "trace_id": "t", "path": "qitos/events.jsonl", "file": str(file)}
    content = normalized(record, field_bytes=1_000)["content"]
    assert content.startswith('{"text": "xxx')
    assert len(content) > 5_000
    assert number not in content
    file.unlink()
    assert normalized(record) is None


def test_a_json_file_stays_json(tmp_path: Path) -> None:
    """Each line of QitOS's own files can be read afterwards; a torn last line is text."""
    number = uuid.uuid4().hex
    event = {"payload": {"cookies": {"sid": number}, "password": 7, "text": f"x\nauth={number}"}}
    plain = '{"ok":   true}'
    torn = f'{{"payload": {{"password": "{number}"'
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join([json.dumps(event), plain, torn]))
    record = {"kind": "artifact", "path": "qitos/events.jsonl", "file": str(file)}
    first, second, third = normalized(record)["content"].split("\n")
    assert json.loads(first)["payload"] == {
        "cookies": MARKER,
        "password": MARKER,
        "text": f"x\nauth={MARKER}",
    }
    assert second == plain
    assert third == torn.replace(number, MARKER)
    file.write_text(json.dumps(event, indent=2))
    record["path"] = "qitos/manifest.json"
    assert json.loads(normalized(record)["content"]) == json.loads(first)


def test_a_huge_file_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beyond the limit is not copied; the artifact says where it is."""
    monkeypatch.setattr(normalizing, "MAX_FILE_BYTES", 10)
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"x" * 11)
    content = normalized({"kind": "artifact", "path": "p", "file": str(file)})["content"]
    assert str(file) in content
    assert "xxx" not in content


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has these files")
@pytest.mark.parametrize("instead", ["link", "link to a device", "fifo", "directory"])
def test_what_is_no_file_of_the_run_is_not_stored(tmp_path: Path, instead: str) -> None:
    """A tool that puts a link into the run directory uploads nothing of what the link names."""
    secret, file = tmp_path / "secret", tmp_path / "events.jsonl"
    secret.write_text("of the user's")
    if instead == "fifo":
        os.mkfifo(file)
    elif instead == "directory":
        file.mkdir()
    else:
        file.symlink_to(secret if instead == "link" else "/dev/zero")
    content = normalized({"kind": "artifact", "path": "p", "file": str(file)})["content"]
    assert content == f"{file} is a link or no regular file, so it is not stored\n"


def test_a_file_in_another_encoding_is_readable(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are replaced, the rest arrives."""
    file = tmp_path / "steps.jsonl"
    file.write_bytes(b"good \xff good")
    content = normalized({"kind": "artifact", "path": "p", "file": str(file)})["content"]
    assert content == "good \ufffd good"


def test_a_file_keeps_its_newlines(tmp_path: Path) -> None:
    """What is logged is what the file holds."""
    file = tmp_path / "steps.txt"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    content = normalized({"kind": "artifact", "path": "p", "file": str(file)})["content"]
    assert content.encode() == file.read_bytes()


def test_a_file_in_no_directory_is_no_loss(tmp_path: Path) -> None:
    """What is called the run directory need not be one."""
    (tmp_path / "file").touch()
    assert normalized({"kind": "artifact", "file": str(tmp_path / "file" / "steps.jsonl")}) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_a_loss(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable file raises, so that the spooling thread counts it as lost."""
    file = tmp_path / "events.jsonl"
    file.touch()

    def fail(path: Path) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(normalizing, "open_regular", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        normalized({"kind": "artifact", "file": str(file)})
