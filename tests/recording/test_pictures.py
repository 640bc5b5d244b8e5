"""Pictures in the records of spans: taken out, recorded once, and files read as the span ends."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest

from qitos_mlflow.recording import picture_files
from qitos_mlflow.recording.picture_files import Seen, with_picture_files
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.to_json import as_json, encode
from qitos_mlflow.redaction.pictures import REFERENCE, reference
from qitos_mlflow.settings import Settings
from tests.pictures import base64, data_url, png

LARGE = png(3, 400, compressed=False)
IS_LARGE = REFERENCE.fullmatch
MAX_BYTES = 1024 * 1024


@pytest.fixture
def pipeline(tmp_path: Path) -> RecordPipeline:
    made = RecordPipeline(b"{}", "key", Settings(offline=True, spool_dir=tmp_path))
    made.field_bytes = 1024 * 1024
    return made


def recorded(pipeline: RecordPipeline, trace_id: str = "t", **fields: Any) -> dict[str, Any]:
    """A span as it goes to disk."""
    span = {"kind": "span", "trace_id": trace_id, "span_id": "s", "type": "tool", **fields}
    data = pipeline.normalize(encode(span))
    assert data is not None
    record: dict[str, Any] = orjson.loads(data)
    return record


def test_a_trace_has_a_picture_once(pipeline: RecordPipeline) -> None:
    """Later records refer to it, whatever form it comes in; another trace has it for itself."""
    first = recorded(pipeline, output=data_url(LARGE))
    found = IS_LARGE(first["output"])
    assert found is not None
    assert first["pictures"] == {found["id"]: base64(LARGE)}
    block = {"mime_type": "image/png", "data": base64(LARGE)}
    second = recorded(pipeline, data={"tool_args": [block, {"images": [base64(LARGE)]}]})
    assert "pictures" not in second
    args = second["data"]["tool_args"]
    again = [IS_LARGE(text) for text in (args[0]["data"], args[1]["images"][0])]
    assert [one and one["id"] for one in again] == [found["id"]] * 2
    assert recorded(pipeline, "other", output=data_url(LARGE))["pictures"] == first["pictures"]


def test_a_picture_that_was_lost_is_recorded_again(pipeline: RecordPipeline) -> None:
    first = recorded(pipeline, output=data_url(LARGE))
    pipeline.lost(orjson.dumps(first), "disk_full")
    assert recorded(pipeline, output=data_url(LARGE))["pictures"] == first["pictures"]


def test_small_ones_stay_unless_they_are_too_many(pipeline: RecordPipeline) -> None:
    """A few are inlined; of many, none is cut and no text is cut for them."""
    small = data_url(png(1, 100, compressed=False))
    assert recorded(pipeline, output=small)["output"] == small
    pipeline.field_bytes = 100_000
    many = recorded(pipeline, output=["text " * 1_000, *[small] * 50])
    assert many["output"][0] == "text " * 1_000
    assert all(IS_LARGE(text) for text in many["output"][1:])
    assert len(many["pictures"]) == 1


def test_a_trace_that_has_ended_leaves_nothing(pipeline: RecordPipeline) -> None:
    """Also if a span of it ends after it."""
    for fields in ({}, {"kind": "trace_end"}, {"late": 1}):
        record = recorded(pipeline, output=data_url(LARGE), **fields)
    assert len(record["pictures"]) == 1
    assert pipeline._pictures._known == {}


def test_a_span_that_is_not_shown_needs_none(pipeline: RecordPipeline) -> None:
    """Such as one that MLflow's own tracer shows; large pictures would fill the spool."""
    small = data_url(png(1))
    record = recorded(pipeline, output=[data_url(LARGE), small], no_pictures=True)
    assert record["output"] == [f"[image/png, {len(data_url(LARGE))} characters]", small]
    assert record.keys().isdisjoint({"pictures", "no_pictures"})


@pytest.mark.parametrize("most", [0, 1000])
def test_larger_ones_than_wanted_are_notes(pipeline: RecordPipeline, most: int) -> None:
    pipeline._pictures.max_bytes = most
    record = recorded(pipeline, output=data_url(LARGE))
    assert record["output"] == f"[image/png, {len(data_url(LARGE))} characters]"
    assert "pictures" not in record


@pytest.mark.parametrize(
    "output",
    [
        {"name": "api_key", "value": data_url(LARGE)},
        {"password": data_url(LARGE)},
        ["--api-key", data_url(LARGE)],
        {"api_key": {"mime_type": "image/png", "data": base64(LARGE)}},
    ],
)
def test_what_is_redacted_is_no_picture(pipeline: RecordPipeline, output: Any) -> None:
    """What stands where a credential does goes nowhere, whatever it is."""
    record = recorded(pipeline, output=output)
    assert "pictures" not in record
    assert base64(LARGE)[:100] not in orjson.dumps(record).decode()


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64,no picture! " + "x" * 40_000,
        "data:text/plain;base64," + "QUFB" * 20_000,
        {"mime_type": "application/pdf", "data": "QUFB" * 20_000},
        {"mime_type": "image/png", "data": "a long text " * 4_000},
        {"images": ["QUFB" * 20_000, 7, None]},
    ],
)
def test_what_is_no_picture(pipeline: RecordPipeline, text: Any) -> None:
    assert "pictures" not in recorded(pipeline, output=text)


# -- files -----------------------------------------------------------------------------------


def naming(*paths: Path | str, **fields: Any) -> bytes:
    """A span's record that names files."""
    blocks = [{"type": "image_file", "path": str(path), **fields} for path in paths]
    span = {"kind": "span", "trace_id": "t", "type": "generation"}
    return encode({**span, "data": {"input_content": [{"role": "user", "content": blocks}]}})


def files_in(payload: bytes) -> Any:
    return orjson.loads(as_json(payload)).get("picture_files")


@pytest.fixture(autouse=True)
def none_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "_late", None)


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    made = tmp_path / 'a "quoted" screen.png'
    made.write_bytes(LARGE)
    return made


def test_a_file_is_read_once_while_it_stays_the_same(
    screen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace's next records refer to it."""
    monkeypatch.setattr(picture_files, "SETTLED_NS", -1)
    seen: Seen = {}
    payload = naming(screen, detail="high")
    first = files_in(with_picture_files(payload, seen, MAX_BYTES))
    assert first == {str(screen): {"data": base64(LARGE), "mime_type": "image/png"}}
    second = files_in(with_picture_files(payload, seen, MAX_BYTES))
    assert second[str(screen)]["data"] == reference(LARGE, "image/png")
    screen.write_bytes(png(4))
    third = files_in(with_picture_files(payload, seen, MAX_BYTES))
    assert third[str(screen)]["data"] == base64(png(4))


def test_a_file_that_was_just_written_is_read_again(screen: Path) -> None:
    """By its size and times, it is the same as the next screenshot if that comes at once."""
    seen: Seen = {}
    for _ in range(2):
        found = files_in(with_picture_files(naming(screen), seen, MAX_BYTES))
        assert found[str(screen)]["data"] == base64(LARGE)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has these files")
@pytest.mark.parametrize("instead", ["link", "fifo", "device"])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, screen: Path, instead: str) -> None:
    """The span goes without it, and without a wait."""
    named = tmp_path / "named.png"
    if instead == "fifo":
        os.mkfifo(named)
    else:
        named.symlink_to(screen if instead == "link" else "/dev/zero")
    payload = naming(named, screen)
    assert {*files_in(with_picture_files(payload, {}, MAX_BYTES))} == {str(screen)}
    assert picture_files._late is None


def test_a_text_about_image_files_costs_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a block of that type has its record searched for paths, on the agent's thread."""
    monkeypatch.delattr(picture_files, "_paths")
    payload = encode({"kind": "span", "data": {"input_content": 'type == "image_file"'}})
    assert with_picture_files(payload, {}, MAX_BYTES) is payload


def test_all_files_of_a_span_have_one_bound(tmp_path: Path) -> None:
    """Many large ones would fill the queue, and cost spans."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(png(number, 400, compressed=False))
    found = files_in(with_picture_files(naming(*paths), {}, 2 * len(LARGE) + 1000))
    assert {*found} == {*map(str, paths[2:])}


def test_agents_in_other_threads_read_at_the_same_time(
    screen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading that is going on, and is not late, keeps no other one from its picture."""
    began, go_on, read = threading.Event(), threading.Event(), picture_files._Reading._read

    def first_waits(self: Any, path: str) -> None:
        if not began.is_set():
            began.set()
            assert go_on.wait(20)
        read(self, path)

    monkeypatch.setattr(picture_files._Reading, "_read", first_waits)
    monkeypatch.setattr(picture_files, "WAIT_S", 20.0)
    payload = naming(screen)
    seen: list[Any] = []
    other = threading.Thread(
        target=lambda: seen.append(files_in(with_picture_files(payload, {}, MAX_BYTES)))
    )
    other.start()
    assert began.wait(20)
    assert files_in(with_picture_files(payload, {}, MAX_BYTES))
    go_on.set()
    other.join(20)
    assert seen[0]


def test_the_block_has_the_picture(pipeline: RecordPipeline, screen: Path) -> None:
    """Its other fields stay; a block of a file that is not there stays as it is."""
    payload = with_picture_files(naming(screen, "gone.png", detail="high"), {}, MAX_BYTES)
    data = pipeline.normalize(payload)
    assert data is not None
    record = orjson.loads(data)
    there, gone = record["data"]["input_content"][0]["content"]
    assert IS_LARGE(there.pop("data"))
    about = {"type": "image_file", "detail": "high"}
    assert there == {**about, "path": str(screen), "mime_type": "image/png"}
    assert gone == {**about, "path": "gone.png"}
    assert [*record["pictures"].values()] == [base64(LARGE)]
    assert "picture_files" not in record


def test_what_is_not_read(tmp_path: Path, screen: Path) -> None:
    """Addresses, texts, empty and large files, directories and FIFOs."""
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "text.png").write_text("-----BEGIN PRIVATE KEY-----")
    (tmp_path / "empty.png").touch()
    names = [tmp_path, tmp_path / "fifo.png", tmp_path / "text.png", tmp_path / "empty.png"]
    payload = naming(*names, "https://example.test/a.png", "with\0null")
    assert with_picture_files(payload, {}, MAX_BYTES) == payload
    large = naming(screen)
    assert with_picture_files(large, {}, 1000) == large


def test_only_the_newest_files_are_read(tmp_path: Path) -> None:
    """A bound, however many a conversation names."""
    paths = [tmp_path / f"{number}.png" for number in range(picture_files.MAX_FILES + 5)]
    for number, path in enumerate(paths):
        path.write_bytes(png(number))
    found = files_in(with_picture_files(naming(*paths), {}, MAX_BYTES))
    assert {*found} == {*map(str, paths[5:])}


def test_a_read_that_hangs_holds_the_agent_once(
    screen: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent goes on without the picture, and tries no other one for a while."""
    gone, began = threading.Event(), []

    def hang(self: Any, path: str) -> None:
        began.append(path)
        assert gone.wait(20)

    with monkeypatch.context() as patched:
        patched.setattr(picture_files._Reading, "_read", hang)
        patched.setattr(picture_files, "WAIT_S", 0.01)
        payload = naming(screen)
        for _ in range(3):
            assert with_picture_files(payload, {}, MAX_BYTES) == payload
        gone.set()
        assert picture_files._late is not None
        picture_files._late.join(20)
        assert with_picture_files(payload, {}, MAX_BYTES) == payload, "a slow disk costs a little"
    assert began == [str(screen)]
    assert "cannot be read in time" in caplog.text
    assert screen.name not in caplog.text, "names of files may hold anything"
    monkeypatch.setattr(picture_files, "PAUSE_S", 0.0)
    assert files_in(with_picture_files(payload, {}, MAX_BYTES))
