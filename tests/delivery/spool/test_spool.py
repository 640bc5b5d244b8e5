"""The spool on disk: every intact record comes back, whatever happened to the file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import paths as spool_paths
from qitos_mlflow.delivery.spool import reader as reader_module
from qitos_mlflow.delivery.spool import writer as writer_module
from qitos_mlflow.delivery.spool.counts import (
    ASIDE_FULL,
    DISK_FULL,
    SPOOL_FULL,
    SPOOL_REMOVED,
    SPOOL_UNREADABLE,
    SPOOL_UNWRITABLE,
    Counts,
)
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter
from qitos_mlflow.delivery.spool.files import replace_private
from qitos_mlflow.delivery.spool.parts import DiskPart
from qitos_mlflow.delivery.spool.paths import Paths, find_segments
from qitos_mlflow.delivery.spool.reader import SegmentReader, load_ack
from qitos_mlflow.delivery.spool.segments import (
    HEAD_LINES,
    claim,
    inspect_segment,
    purge,
    read_head,
    send_again,
    waiting_records,
)
from qitos_mlflow.delivery.spool.writer import SegmentWriter
from tests.fakes.sink import MIB, numbered

NOW = 1_800_000_000_000_000_000
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""For examples by the hundred, where waiting for the disk proves nothing."""


def make_segment(directory: Path, **changes: int) -> SegmentWriter:
    options = {"cap_bytes": 1024 * MIB, "memory_bytes": MIB, **changes}
    part_bytes = options.pop("part_bytes", SegmentWriter.part_bytes)
    segment = SegmentWriter(directory, b'{"to":"x"}', offline=False, **options)
    segment.part_bytes = part_bytes
    return segment


def append(segment: SegmentWriter, records: list[bytes], *, keep: bool = False) -> list[str]:
    return [reason for _, reason in segment.append([(r, keep) for r in records], NOW)]


def own_reader(segment: SegmentWriter, stats: Counts | None = None) -> SegmentReader:
    return SegmentReader(segment.paths, segment.parts, stats or Counts())


def read_all(reader: SegmentReader, end: int, *, ack: bool = True) -> list[bytes]:
    records: list[bytes] = []
    while True:
        chunk = reader.read(end=end, sealed=True, max_records=3)
        if chunk.end == reader.position:
            return records
        records += chunk.records
        if ack:
            reader.acknowledge(chunk, b"state", ())
        else:
            reader.position = chunk.end


def crash(segment: SegmentWriter) -> None:
    """Leave the segment as a dead process does: files as they are, locks free."""
    segment.close(delete=False)


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """Directory 0700 and files 0600, whatever the umask says."""
    directory = tmp_path / "spool"
    for umask in (0o000, 0o777):
        before = os.umask(umask)
        try:
            segment = make_segment(directory / f"{umask:o}")
            append(segment, numbered(2))
            reader = own_reader(segment)
            chunk = reader.read(end=segment.end, sealed=True, max_records=9)
            reader.acknowledge(chunk, b"s", [DeadLetter(b"x", "refused")])
        finally:
            os.umask(before)
        files = list((directory / f"{umask:o}").iterdir())
        assert {path.suffix for path in files} == {
            ".seg", ".ack", ".own", ".ship", ".dead"
        }  # fmt: skip
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert stat.S_IMODE((directory / f"{umask:o}").stat().st_mode) == 0o700
        segment.close(delete=True)


def test_parts_rotate_and_acknowledged_ones_are_deleted(tmp_path: Path) -> None:
    """A long run takes the disk only for what is not acknowledged, and a part more."""
    segment = make_segment(tmp_path, part_bytes=500)
    records = numbered(50)
    for record in records:
        append(segment, [record])
    assert len(segment.paths.parts()) > 5
    reader = own_reader(segment)
    assert read_all(reader, segment.end) == records
    assert len(segment.paths.parts()) == 1
    append(segment, [b"later"])
    assert read_all(reader, segment.end) == [b"later"]
    segment.close(delete=True)
    assert list(tmp_path.iterdir()) == []


def test_reading_goes_on_at_the_acknowledgement(tmp_path: Path) -> None:
    """Another process finds exactly what was not acknowledged, and the sink's state there."""
    segment = make_segment(tmp_path, part_bytes=300)
    for record in numbered(20):
        append(segment, [record])
    reader = own_reader(segment)
    chunk = reader.read(end=segment.end, sealed=True, max_records=7)
    reader.acknowledge(chunk, b"any\nstate\x1b\x00", ())
    done = len(chunk.records)
    assert done > 0
    crash(segment)
    ack = load_ack(segment.paths)
    assert ack.state == b"any\nstate\x1b\x00"
    assert ack.time_ns == NOW
    assert list(waiting_records(segment.paths)) == numbered(20)[done:]


def test_a_new_segment_is_begun_without_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's thread may begin one, so no file is touched before the first append."""

    def touched(path: object, *_: object, **__: object) -> None:
        pytest.fail(f"{path} was opened")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", touched)
        patch.setattr(Path, "open", touched)
        patch.setattr(Path, "read_bytes", touched)
        segment = make_segment(tmp_path)
        own_reader(segment)
    append(segment, [b"one"])
    segment.close(delete=True)


def test_nothing_is_deleted_that_is_not_acknowledged_on_disk(tmp_path: Path) -> None:
    """Where the acknowledgement cannot be written, the parts stay: they are all there is."""
    segment = make_segment(tmp_path, part_bytes=300)
    for record in numbered(20):
        append(segment, [record])
    parts = len(segment.paths.parts())
    segment.paths.ack.mkdir()
    assert read_all(own_reader(segment), segment.end) == numbered(20)
    assert len(segment.paths.parts()) == parts
    crash(segment)
    assert list(waiting_records(segment.paths)) == numbered(20)


def test_an_acknowledgement_that_is_the_last_copy_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a part is gone the sink's state cannot be made again: a power cut must not empty it."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    segment = make_segment(tmp_path, part_bytes=300)
    reader = own_reader(segment)
    append(segment, numbered(1))
    read_all(reader, segment.end)
    assert synced == []  # The records are still there.
    for count, record in enumerate(numbered(20), start=1):
        append(segment, [record])
        goes = len(segment.parts()) > 1  # Then its directory is brought to the disk as well.
        gone = goes or segment.parts()[0].base > 0
        before = len(synced)
        read_all(reader, segment.end)
        assert len(synced) == before + gone + goes, count
    assert gone
    segment.close(delete=True)


def test_a_line_under_way_is_left_until_it_is_complete(tmp_path: Path) -> None:
    """While the owner appends, an incomplete last line is no torn one."""
    segment = make_segment(tmp_path)
    append(segment, [b"one", b"two"])
    crash(segment)
    [(_, path)] = segment.paths.parts()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    stats = Counts()
    reader = SegmentReader(segment.paths, segment.parts, stats)
    chunk = reader.read(end=None, sealed=False, max_records=9)
    assert (chunk.records, chunk.damaged) == ([b"one"], [])
    reader.position = chunk.end
    path.write_bytes(whole)
    chunk = reader.read(end=None, sealed=False, max_records=9)
    assert (chunk.records, chunk.damaged) == ([b"two"], [])


def test_a_record_longer_than_a_read_comes_back(tmp_path: Path) -> None:
    """Records may be larger than what is read at once."""
    segment = make_segment(tmp_path)
    records = [b"x" * (3 * MIB), b"y", b"z" * (MIB + 1)]
    append(segment, records)
    assert read_all(own_reader(segment), segment.end) == records
    segment.close(delete=True)


PAYLOADS = st.lists(st.binary(max_size=12), min_size=1, max_size=4)


@settings(max_examples=25)
@given(PAYLOADS)
def test_cut_anywhere(payloads: list[bytes]) -> None:
    """A segment cut at any byte gives back every record whose line is whole; the rest is kept."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        segment = make_segment(Path(name))
        append(segment, payloads)
        crash(segment)
        [(_, path)] = segment.paths.parts()
        whole = path.read_bytes()
        ends = [i + 1 for i, byte in enumerate(whole) if byte == 0x0A][HEAD_LINES:]
        for cut in range(len(whole)):
            path.write_bytes(whole[:cut])
            stats = Counts()
            reader = SegmentReader(segment.paths, segment.parts, stats)
            got = read_all(reader, len(whole), ack=False)
            intact = sum(end <= cut for end in ends)
            # The line of which only the line feed is missing is intact as well.
            assert got in (payloads[:intact], payloads[: intact + (cut + 1 in ends)])


@settings(max_examples=15)
@given(PAYLOADS, st.integers(1, 255))
def test_corrupt_anywhere(payloads: list[bytes], flip: int) -> None:
    """One damaged byte, wherever it is, costs the record it is in and no other."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        segment = make_segment(Path(name))
        append(segment, payloads)
        crash(segment)
        [(_, path)] = segment.paths.parts()
        whole = path.read_bytes()
        lines = [line + b"\n" for line in whole.split(b"\n")[:-1]]
        starts = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            stats = Counts()
            reader = SegmentReader(segment.paths, segment.parts, stats)
            got = read_all(reader, len(whole), ack=False)
            hit = next(n for n in range(len(lines)) if at < starts[n + 1]) - HEAD_LINES
            others = [p for n, p in enumerate(payloads) if n != hit]
            assert got in (others, payloads)


def test_damaged_lines_are_counted_and_kept_aside(tmp_path: Path) -> None:
    """What cannot be read is a dead letter, whose reason says where it was."""
    segment = make_segment(tmp_path)
    append(segment, [b"one", b"two", b"three"])
    crash(segment)
    [(_, path)] = segment.paths.parts()
    damaged = path.read_bytes().replace(b" two\n", b" tvo\n")
    path.write_bytes(damaged)
    stats = Counts()
    assert read_all(own_reader(segment, stats), segment.end) == [b"one", b"three"]
    assert stats.dead_letters == 1
    kept = json.loads(segment.paths.dead.read_bytes())
    line = kept["record"].encode()
    assert line.endswith(b" tvo")
    reason = f"damaged line of the spool, at byte {damaged.index(line)} of {path.name}"
    assert kept["reason"] == reason
    assert inspect_segment(segment.paths).dead_letters == {reason: 1}


def test_damage_that_another_version_kept_is_counted(tmp_path: Path) -> None:
    """Version 0.1.0 kept the lines as they were, without their places, until they are purged."""
    paths = Paths(tmp_path, "host-1-abc-ff")
    paths.bad.write_bytes(b"1r torn\n\xff\n")
    assert inspect_segment(paths).dead_letters == {"damaged line of the spool": 2}
    assert purge(paths)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_acknowledgement_is_no_acknowledgement(tmp_path: Path) -> None:
    """Everything is sent again rather than anything left out."""
    segment = make_segment(tmp_path)
    append(segment, numbered(5))
    read_all(own_reader(segment), segment.end)
    crash(segment)
    raw = bytearray(segment.paths.ack.read_bytes())
    raw[3] ^= 1
    segment.paths.ack.write_bytes(bytes(raw))
    assert list(waiting_records(segment.paths)) == numbered(5)


def test_dead_letters_are_kept_with_their_reasons(tmp_path: Path) -> None:
    """One JSON line each: reason, time and the record, in base64 when it is no text."""
    segment = make_segment(tmp_path)
    stats = Counts()
    reader = own_reader(segment, stats)
    append(segment, [b"text", b"\xff\xfe"])
    chunk = reader.read(end=segment.end, sealed=True, max_records=9)
    reader.acknowledge(chunk, b"s", [DeadLetter(b"text", "too long"), DeadLetter(b"\xff", "no")])
    first, second = map(json.loads, segment.paths.dead.read_text().splitlines())
    assert (first["reason"], first["record"]) == ("too long", "text")
    assert (second["reason"], second["record_base64"]) == ("no", "/w==")
    assert stats.dead_letters == 2
    assert stats.delivered == 0
    segment.close(delete=True)
    assert [path.suffix for path in tmp_path.iterdir()] == [".dead"]


def test_one_record_that_makes_many_dead_letters_is_one_not_delivered(tmp_path: Path) -> None:
    """What the server refuses are parts of records; deliveries are never less than none."""
    segment, stats = make_segment(tmp_path), Counts()
    reader = own_reader(segment, stats)
    append(segment, [b"one"])
    chunk = reader.read(end=segment.end, sealed=True, max_records=500)
    reader.acknowledge(chunk, b"s", [DeadLetter(b"item %d" % n, "no") for n in range(5)])
    assert (stats.delivered, stats.dead_letters) == (0, 5)
    segment.close(delete=True)


def test_what_is_kept_aside_has_a_bound_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it dead letters are counted, where other processes see them."""
    monkeypatch.setattr(reader_module, "ASIDE_BYTES", 1000)
    segment, stats = make_segment(tmp_path), Counts()
    reader = SegmentReader(segment.paths, segment.parts, stats)
    append(segment, numbered(4))
    chunk = reader.read(end=segment.end, sealed=True, max_records=9)
    chunk.damaged += [DeadLetter(b"x" * 700, "damaged"), DeadLetter(b"y" * 700, "damaged")]
    reader.acknowledge(chunk, b"s", [DeadLetter(b"z" * 100, "no")] * 4)
    info = inspect_segment(segment.paths)
    assert info.dead_letters == {"no": 4}
    assert info.losses == stats.dropped == {ASIDE_FULL: 2}
    assert stats.dead_letters == 4
    crash(segment)
    assert purge(segment.paths)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_letter_with_a_header_is_sent_again(tmp_path: Path) -> None:
    """It moves to a segment of its own, once nothing uses its own one; all others stay."""
    segment = make_segment(tmp_path)
    append(segment, [b"1", b"2", b"3"])
    reader = own_reader(segment)
    chunk = reader.read(end=segment.end, sealed=True, max_records=9)
    again = [DeadLetter(b"a file", "no", b"header"), DeadLetter(b"another", "no", b"header")]
    reader.acknowledge(chunk, b"s", [DeadLetter(b"no more", "refused"), *again])
    assert send_again(segment.paths) is None
    crash(segment)
    new = send_again(segment.paths)
    assert new is not None
    assert list(waiting_records(new)) == [b"a file", b"another"]
    head = read_head(new)
    assert (head.caller, head.offline) == (b"header", False)
    assert inspect_segment(new).owner_alive is False
    assert inspect_segment(segment.paths).dead_letters == {"refused": 1}
    assert send_again(segment.paths) is None


def test_a_dead_letter_that_cannot_be_moved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full costs none of them."""
    segment = make_segment(tmp_path)
    append(segment, [b"1"])
    own_reader(segment).bury([DeadLetter(b"a file", "no", b"header")])
    crash(segment)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DiskPart, "create", full)
    with pytest.raises(OSError, match="disk_full"):
        send_again(segment.paths)
    monkeypatch.undo()
    assert inspect_segment(segment.paths).dead_letters == {"no": 1}
    assert send_again(segment.paths) is not None


def test_losses_are_saved_once(tmp_path: Path) -> None:
    """Each loss is in one segment's file, whatever could not be written before."""
    stats = Counts()
    first, second = (Paths(tmp_path / "spool", stem) for stem in ("a", "b"))
    stats.drop(SPOOL_FULL)
    stats.save_losses(first)  # There is no directory.
    (tmp_path / "spool").mkdir()
    stats.save_losses(first)
    stats.drop(DISK_FULL, 2)
    stats.save_losses(second)
    others = Counts()
    others.drop(DISK_FULL)
    others.save_losses(second)
    found = [inspect_segment(paths).losses for paths in (first, second)]
    assert found == [{SPOOL_FULL: 1}, {DISK_FULL: 3}]


def test_the_cap_refuses_spans_first(tmp_path: Path) -> None:
    """At the cap spans are refused; what is to be kept is taken up to 110 % of it, then not."""
    segment = make_segment(tmp_path, cap_bytes=10_000, memory_bytes=0)
    filler = b"x" * 950
    refused = [append(segment, [filler]) for _ in range(12)]
    assert refused[:8] == [[]] * 8
    assert refused[-1] == [SPOOL_FULL]
    kept = [append(segment, [filler], keep=True) for _ in range(4)]
    assert kept[0] == []
    assert kept[-1] == [SPOOL_FULL]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 10_000 - 1100 < size <= 11_000
    segment.close(delete=True)


def test_a_record_too_large_for_what_is_left_costs_no_other(tmp_path: Path) -> None:
    """Offline, where no memory stands in, what fits is still taken."""
    segment = make_segment(tmp_path, cap_bytes=10_000, memory_bytes=0)
    assert append(segment, [b"first"]) == []
    assert append(segment, [b"x" * 20_000, b"second"]) == [SPOOL_FULL]
    assert append(segment, [b"third"]) == []
    assert list(waiting_records(segment.paths)) == [b"first", b"second", b"third"]
    segment.close(delete=True)


def test_the_cap_is_for_the_whole_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What other processes have spooled counts as well, and the warning says how to deliver it."""
    (tmp_path / "other-1-2-3.0000000000000000.seg").write_bytes(b"x" * 10_000)
    segment = make_segment(tmp_path, cap_bytes=10_000, memory_bytes=0)
    assert append(segment, [b"x"]) == [SPOOL_FULL]
    assert "(spool_full)" in caplog.text
    assert "qitos-mlflow sync" in caplog.text
    segment.close(delete=True)


def test_a_full_directory_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records go on in order from memory, up to its bound, and to the disk when it has room."""
    monkeypatch.setattr(spool_paths, "SCAN_S", 0.0)
    monkeypatch.setattr(writer_module, "DISK_RETRY_S", 0.0)
    backlog = tmp_path / "other-1-2-3.0000000000000000.seg"
    backlog.write_bytes(b"x" * 9_000)
    segment = make_segment(tmp_path, cap_bytes=10_000, memory_bytes=3000)
    reader = own_reader(segment)
    assert append(segment, [b"on disk", b"x" * 1000, b"in memory"]) == []
    assert append(segment, [b"y" * 3000, b"more"]) == [SPOOL_FULL]
    assert segment.unsaved == 3
    assert read_all(reader, segment.end) == [b"on disk", b"x" * 1000, b"in memory", b"more"]
    backlog.unlink()
    assert append(segment, [b"on disk again"]) == []
    assert segment.unsaved == 0
    crash(segment)
    assert list(waiting_records(segment.paths)) == [b"on disk again"]


def test_a_full_directory_takes_what_ends_a_run(tmp_path: Path) -> None:
    """Between 100 % and 110 % of the cap starts and ends are on disk, in order with the rest."""
    (tmp_path / "other-1-2-3.0000000000000000.seg").write_bytes(b"x" * 10_000)
    segment = make_segment(tmp_path, cap_bytes=10_000)
    reader = own_reader(segment)
    for record in numbered(3):
        assert append(segment, [b"start"], keep=True) == []
        assert append(segment, [record]) == []
    assert append(segment, [b"x" * 1000], keep=True) == []
    assert segment.unsaved == 4
    assert list(waiting_records(segment.paths)) == [b"start"] * 3
    expected = [record for span in numbered(3) for record in (b"start", span)]
    assert read_all(reader, segment.end) == [*expected, b"x" * 1000]
    segment.close(delete=True)


def test_what_is_kept_aside_does_not_keep_records_out(tmp_path: Path) -> None:
    """Dead letters of any process do not count to the cap of the records."""
    for suffix in ("dead", "bad"):
        (tmp_path / f"other-1-2-3.{suffix}").write_bytes(b"x" * 20_000)
    segment = make_segment(tmp_path, cap_bytes=10_000, memory_bytes=0)
    assert append(segment, [b"x"]) == []
    segment.close(delete=True)


def test_a_directory_that_cannot_be_made_means_memory(tmp_path: Path) -> None:
    """Records go on in order from memory, up to its bound; beyond it they are losses."""
    (tmp_path / "file").write_text("in the way")
    segment = make_segment(tmp_path / "file" / "spool", memory_bytes=3000)
    reader = own_reader(segment)
    assert append(segment, numbered(10)) == []
    assert read_all(reader, segment.end) == numbered(10)
    assert append(segment, [b"x" * 5000, b"small"]) == [SPOOL_UNWRITABLE]
    assert read_all(reader, segment.end) == [b"small"]


def test_memory_has_room_for_what_is_to_be_kept(tmp_path: Path) -> None:
    """Starts and ends of traces go in beyond the bound, in order, apart from the rest."""
    (tmp_path / "file").write_text("in the way")
    segment = make_segment(tmp_path / "file" / "spool", memory_bytes=3000)
    reader = own_reader(segment)
    assert append(segment, [b"x" * 2900]) == []
    assert append(segment, [b"y" * 2900]) == [SPOOL_UNWRITABLE]
    assert append(segment, [b"end", b"start"], keep=True) == []
    assert append(segment, [b"z" * 2900]) == [SPOOL_UNWRITABLE]
    assert segment.unsaved == 3
    assert read_all(reader, segment.end) == [b"x" * 2900, b"end", b"start"]
    assert segment.unsaved == 0


def test_memory_is_freed_as_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the disk gone for good, an agent can go on for ever within the bound."""
    monkeypatch.setattr(writer_module, "MEMORY_PART_BYTES", 1000)
    (tmp_path / "file").write_text("in the way")
    segment = make_segment(tmp_path / "file" / "spool", memory_bytes=3000)
    reader = own_reader(segment)
    for n in range(100):
        assert append(segment, [b"%03d" % n + b"x" * 300]) == []
        assert len(read_all(reader, segment.end)) == 1


def test_the_disk_is_used_again_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order is kept across disk, memory and disk, and a crash loses only what was in memory."""
    monkeypatch.setattr(writer_module, "DISK_RETRY_S", 0.0)
    (tmp_path / "spool").write_text("in the way")
    segment = make_segment(tmp_path / "spool")
    assert append(segment, [b"in memory"]) == []
    (tmp_path / "spool").unlink()
    assert append(segment, [b"on disk"]) == []
    assert read_all(own_reader(segment), segment.end, ack=False) == [b"in memory", b"on disk"]
    crash(segment)
    assert list(waiting_records(segment.paths)) == [b"on disk"]


def test_a_disk_that_fails_is_one_line_until_it_has_worked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is tried meanwhile, and however long that takes."""
    monkeypatch.setattr(writer_module, "DISK_RETRY_S", 0.0)
    monkeypatch.setattr(_guard, "LOG_EVERY_S", 0.0)
    spool = tmp_path / "spool"
    spool.write_text("in the way")
    segment = make_segment(spool)
    for number in range(1, 3):
        for _ in range(5):
            assert append(segment, [b"in memory"]) == []
        lines = [line for line in caplog.messages if "cannot be written" in line]
        assert len(lines) == number
        assert "Not a directory" in lines[-1], "the system's reason"
        spool.unlink()
        assert append(segment, [b"on disk"]) == []
        shutil.rmtree(spool)
        spool.write_text("in the way")
    crash(segment)


def test_what_was_in_memory_between_two_parts_is_no_deleted_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that delivers for a dead one cannot know whether that was delivered."""
    monkeypatch.setattr(writer_module, "DISK_RETRY_S", 0.0)
    segment, stats = make_segment(tmp_path), Counts()
    append(segment, [b"one"])

    def fail(part: DiskPart, lines: list[bytes]) -> int:
        part.failure = SPOOL_UNWRITABLE
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(DiskPart, "append", fail)
        append(segment, [b"in memory"])
    append(segment, [b"three"])
    assert read_all(own_reader(segment), segment.end, ack=False) == [b"one", b"in memory", b"three"]
    crash(segment)
    taken = claim(segment.paths, stats)
    assert taken is not None
    assert read_all(taken.reader, segment.end) == [b"one", b"three"]
    assert stats.dropped == {}
    taken.finish()
    assert list(tmp_path.iterdir()) == []


def test_files_deleted_under_the_process_are_made_anew(tmp_path: Path) -> None:
    """Emptying the spool loses what was in it; what comes after is safe again."""
    segment = make_segment(tmp_path / "spool")
    stats = Counts()
    reader = own_reader(segment, stats)
    append(segment, numbered(4))
    chunk = reader.read(end=segment.end, sealed=True, max_records=1)
    reader.acknowledge(chunk, b"s", ())
    for path in (tmp_path / "spool").iterdir():
        path.unlink()
    append(segment, [b"after"])
    assert inspect_segment(segment.paths).owner_alive
    assert read_all(reader, segment.end) == [b"after"]
    assert stats.dropped == {"spool_removed": 3}
    segment.close(delete=True)


@pytest.mark.parametrize("left", [0, 150])
def test_a_file_cut_short_under_the_process_costs_what_was_in_it(tmp_path: Path, left: int) -> None:
    """Emptying it to free the disk: its records are counted, what follows arrives."""
    segment, stats = make_segment(tmp_path), Counts()
    reader = own_reader(segment, stats)
    append(segment, numbered(4))
    chunk = reader.read(end=segment.end, sealed=True, max_records=1)
    reader.acknowledge(chunk, b"s", ())
    [(_, path)] = segment.paths.parts()
    os.truncate(path, left)
    assert read_all(reader, segment.end) == []
    assert reader.position == segment.end
    append(segment, [b"after"])
    assert read_all(reader, segment.end) == [b"after"]
    assert stats.dropped == {SPOOL_REMOVED: 3}
    segment.close(delete=True)


def test_a_file_cut_short_between_two_records_is_not_written_on(tmp_path: Path) -> None:
    """What came before the cut and what comes after arrives; what was cut off is counted."""
    segment, stats = make_segment(tmp_path), Counts()
    reader = own_reader(segment, stats)
    append(segment, numbered(1))
    whole = segment.end
    append(segment, numbered(2, start=1))
    [(_, path)] = segment.paths.parts()
    os.truncate(path, whole)
    append(segment, [b"after"])
    assert read_all(reader, segment.end) == [*numbered(1), b"after"]
    assert stats.dropped == {SPOOL_REMOVED: 2}
    segment.close(delete=True)


def test_a_file_deleted_while_it_is_read_costs_what_was_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of a chunk that are read before the file goes are delivered, and not counted lost."""
    monkeypatch.setattr(reader_module, "READ_BYTES", 300)
    segment, stats = make_segment(tmp_path), Counts()
    append(segment, numbered(20))
    [(_, path)] = segment.paths.parts()
    read = DiskPart.read

    def read_and_delete(part: DiskPart, offset: int, size: int) -> bytes:
        data = read(part, offset, size)
        path.unlink()
        return data

    monkeypatch.setattr(DiskPart, "read", read_and_delete)
    reader = own_reader(segment, stats)
    chunk = reader.read(end=segment.end, sealed=True, max_records=500)
    assert chunk.records == numbered(len(chunk.records))
    assert 0 < len(chunk.records) < 20
    reader.acknowledge(chunk, b"s", ())
    assert stats.dropped == {SPOOL_REMOVED: 20 - len(chunk.records)}
    segment.close(delete=True)


def test_a_file_that_cannot_be_closed_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk that close() reports as well: the rest goes to memory, later to disk again."""
    segment = make_segment(tmp_path)
    append(segment, [b"one"])
    [part] = segment.parts()
    assert isinstance(part, DiskPart)
    full, write, close = part._descriptor, os.write, os.close

    def write_or_fail(descriptor: int, data: bytes) -> int:
        if descriptor == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    def close_and_fail(descriptor: int) -> None:
        close(descriptor)
        if descriptor == full:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_or_fail)
        patch.setattr(os, "close", close_and_fail)
        assert append(segment, [b"two"]) == []
    assert append(segment, [b"three"]) == []
    assert read_all(own_reader(segment), segment.end) == [b"one", b"two", b"three"]
    segment.close(delete=True)


def test_locks_are_given_up_whatever_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment whose files cannot be removed is there for others to finish."""
    segment = make_segment(tmp_path)
    append(segment, [b"one"])
    read_all(own_reader(segment), segment.end)

    def fail(part: DiskPart) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(DiskPart, "remove", fail)
        with pytest.raises(OSError, match="Input/output"):
            segment.close(delete=True)
    assert purge(segment.paths)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_whole_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that stops in mid-line leaves the lines before it, and the rest goes to memory."""
    segment = make_segment(tmp_path)
    append(segment, [b"one"])
    write, written = os.write, []

    def write_some(descriptor: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data[:-3]))
        return written[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        assert append(segment, [b"two", b"three"]) == []
    assert [part.failure for part in segment.parts()] == [DISK_FULL] * 2
    assert list(waiting_records(segment.paths)) == [b"one", b"two"]
    assert b"thr" not in segment.paths.parts()[0][1].read_bytes()
    assert read_all(own_reader(segment), segment.end) == [b"one", b"two", b"three"]
    segment.close(delete=True)


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    """The spool knows its own files by their names and touches no others."""
    for name in ("notes.txt", "x.seg", "a b.ack", ".hidden", "x.0000000000000000.own"):
        (tmp_path / name).write_text("mine")
    segment = make_segment(tmp_path)
    append(segment, [b"one"])
    crash(segment)
    assert find_segments(tmp_path) == [segment.paths]
    assert find_segments(segment.paths.parts()[0][1]) == [segment.paths]
    assert purge(segment.paths)
    assert len(list(tmp_path.iterdir())) == 5


def test_an_acknowledgement_half_written_goes_with_its_segment(tmp_path: Path) -> None:
    """What a kill leaves beside the acknowledgement belongs to the segment."""
    segment = make_segment(tmp_path)
    append(segment, [b"one"])
    crash(segment)
    half = tmp_path / f"{segment.paths.ack.name}.tmp"
    half.write_bytes(b"the sink's state")
    assert find_segments(half) == [segment.paths]
    assert purge(segment.paths)
    assert list(tmp_path.iterdir()) == []


def test_an_acknowledgement_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is not filled further by what could not be written to it."""

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        replace_private(tmp_path / "x.ack", [b"state"], durable=False)
    assert list(tmp_path.iterdir()) == []


def test_many_segments_take_one_look_at_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at thousands of segments does not read a directory of thousands for each."""
    for number in range(5):
        segment = make_segment(tmp_path)
        append(segment, numbered(3))
        crash(segment)
        (tmp_path / f"delivered-1-{number}-2.dead").touch()
    looks: list[Path] = []
    listdir = os.listdir

    def counted(path: Path) -> list[str]:
        looks.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    found = [inspect_segment(paths) for paths in find_segments(tmp_path)]
    assert sorted(info.waiting for info in found) == [0] * 5 + [3] * 5
    assert looks == [tmp_path]


def unreadable(paths: Paths, monkeypatch: pytest.MonkeyPatch, code: int = errno.EIO) -> Path:
    """Makes an error of every read of the first part there is now."""
    [(_, path), *_] = paths.parts(now=True)
    read = DiskPart.read

    def read_or_fail(part: DiskPart, offset: int, size: int) -> bytes:
        if part.path == path and path.exists():
            raise OSError(code, os.strerror(code))
        return read(part, offset, size)

    monkeypatch.setattr(DiskPart, "read", read_or_fail)
    return path


@pytest.mark.parametrize("part_bytes", [300, MIB])
def test_a_part_that_cannot_be_read_does_not_hold_up_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """It is tried again for a while, then kept aside, what was in it counted; the rest arrives."""
    monkeypatch.setattr(reader_module, "READ_S", 0.0)
    segment, stats = make_segment(tmp_path, part_bytes=part_bytes), Counts()
    reader = own_reader(segment, stats)
    append(segment, numbered(4))
    chunk = reader.read(end=segment.end, sealed=True, max_records=1)
    reader.acknowledge(chunk, b"s", ())
    path = unreadable(segment.paths, monkeypatch)
    append(segment, [b"in the part" if part_bytes == MIB else b"in the next"])
    for _ in range(reader_module.READ_TRIES - 1):
        with pytest.raises(OSError, match="Input/output"):
            read_all(reader, segment.end)
    assert read_all(reader, segment.end) == ([] if part_bytes == MIB else [b"in the next"])
    append(segment, [b"after"])
    assert read_all(reader, segment.end) == [b"after"]
    lost = 4 if part_bytes == MIB else 3
    assert stats.dropped == {SPOOL_UNREADABLE: lost}
    info = inspect_segment(segment.paths)
    assert (info.waiting, info.losses) == (0, {SPOOL_UNREADABLE: lost})
    aside = path.with_suffix(".bad")
    assert b'"n":3' in aside.read_bytes()
    assert find_segments(aside) == [segment.paths]
    crash(segment)
    assert purge(segment.paths)
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_part_of_a_dead_process_is_one_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who delivers it cannot know how many records were in it; the other parts arrive."""
    monkeypatch.setattr(reader_module, "READ_S", 0.0)
    segment, stats = make_segment(tmp_path, part_bytes=300), Counts()
    append(segment, numbered(4))
    append(segment, [b"in the next"])
    crash(segment)
    taken = claim(segment.paths, stats)
    assert taken is not None
    path = unreadable(segment.paths, monkeypatch)
    for _ in range(reader_module.READ_TRIES - 1):
        with pytest.raises(OSError, match="Input/output"):
            read_all(taken.reader, segment.end)
    assert read_all(taken.reader, segment.end) == [b"in the next"]
    assert stats.dropped == {SPOOL_UNREADABLE: 1}
    assert path.with_suffix(".bad").exists()
    taken.release()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_that_has_run_out_of_files_gives_no_part_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """What the process lacks is no reason to give up what is on the disk, however long it lasts."""
    monkeypatch.setattr(reader_module, "READ_S", 0.0)
    segment, stats = make_segment(tmp_path), Counts()
    reader = own_reader(segment, stats)
    append(segment, numbered(4))
    with monkeypatch.context() as patch:
        unreadable(segment.paths, patch, code)
        for _ in range(2 * reader_module.READ_TRIES):
            with pytest.raises(OSError, match=os.strerror(code)):
                read_all(reader, segment.end)
    assert read_all(reader, segment.end) == numbered(4)
    assert stats.dropped == {}
    segment.close(delete=True)


def test_a_claim_that_runs_out_of_files_leaves_the_segment_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It neither keeps the lock nor goes on without the state of the sink."""
    segment = make_segment(tmp_path)
    append(segment, numbered(4))
    read_all(own_reader(segment), segment.end)
    crash(segment)
    [paths] = find_segments(tmp_path)

    def exhausted(path: Path, most: int) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(reader_module, "read_whole", exhausted)
        with pytest.raises(OSError, match="Too many"):
            claim(paths, Counts())
    taken = claim(paths, Counts())
    assert taken is not None
    assert taken.reader.state == b"state"
    taken.release()


def test_what_cannot_be_read_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking skips an unreadable part at once, and changes nothing."""
    segment = make_segment(tmp_path, part_bytes=300)
    append(segment, numbered(4))
    append(segment, [b"next"])
    path = unreadable(segment.paths, monkeypatch)
    assert list(waiting_records(segment.paths)) == [b"next"]
    assert inspect_segment(segment.paths).waiting == 1
    assert path.exists()
    segment.close(delete=True)
