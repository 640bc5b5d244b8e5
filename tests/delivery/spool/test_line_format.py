"""The line format: any bytes, any damage, both versions."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

from hypothesis import example, given
from hypothesis import strategies as st

from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.writer import SegmentWriter

KINDS = st.sampled_from([line_format.FILE, line_format.CALLER, line_format.RECORD, line_format.ACK])


@given(KINDS, st.binary(max_size=300), st.integers(min_value=0, max_value=2**63 - 1))
@example(line_format.RECORD, b"\n", 0)
@example(line_format.RECORD, b"\x1b0\n\x1b1", 1)
@example(line_format.RECORD, b"", 1)
def test_round_trip(kind: bytes, payload: bytes, time_ns: int) -> None:
    """Any payload comes back as it was, from exactly one line."""
    line = line_format.encode(kind, payload, time_ns)
    assert line.endswith(line_format.LF)
    assert line.count(line_format.LF) == 1
    assert line_format.decode(line[:-1]) == line_format.Line(kind, time_ns, payload)


@given(st.binary(max_size=40), st.data())
def test_every_changed_byte_is_noticed(payload: bytes, data: st.DataObject) -> None:
    """A line with one byte changed, wherever, is never taken for an intact one."""
    line = line_format.encode(line_format.RECORD, payload, 1_800_000_000_000_000_000)[:-1]
    at = data.draw(st.integers(0, len(line) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != line[at]))
    assert line_format.decode(line[:at] + bytes([byte]) + line[at + 1 :]) is None


@given(st.binary(max_size=40), st.data())
def test_every_cut_is_noticed(payload: bytes, data: st.DataObject) -> None:
    """The beginning of a line is never taken for the line."""
    line = line_format.encode(line_format.RECORD, payload, 12345)[:-1]
    assert line_format.decode(line[: data.draw(st.integers(0, len(line) - 1))]) is None


@given(st.binary())
def test_decode_is_total(raw: bytes) -> None:
    """Whatever is in a file, decoding it raises nothing."""
    line_format.decode_all(raw)


@given(st.lists(st.binary(max_size=30).filter(lambda p: b"\n" not in p), min_size=2, max_size=5))
def test_lines_run_together_are_found(payloads: list[bytes]) -> None:
    """Lines whose line feeds were overwritten are all found again."""
    lines = [line_format.encode(line_format.RECORD, payload, 7)[:-1] for payload in payloads]
    found, intact = line_format.decode_all(b"\x00".join(lines))
    assert [line.payload for line in found] == payloads
    assert not intact


def test_head_lines_are_of_version_2_and_those_of_version_1_are_read() -> None:
    """Version 0.1.0 takes a segment whose head lines say 2 for one without a header."""
    for kind in (line_format.FILE, line_format.CALLER):
        line = line_format.encode(kind, b"{}", 7)[:-1]
        assert line.startswith(b"2" + kind)
        head = b"1%b 7 2 " % kind
        old = b"%b%08x {}" % (head, crc32(b"{}", crc32(head)))
        assert line_format.decode(old) == line_format.decode(line)
    for kind in (line_format.RECORD, line_format.ACK):
        assert line_format.encode(kind, b"{}", 7).startswith(b"1" + kind)
    assert line_format.decode(b"3" + line_format.encode(line_format.FILE, b"{}", 7)[1:-1]) is None


def test_a_segment_is_as_docs_spool_md_says(tmp_path: Path) -> None:
    """Whoever reads the page can read the file: tags, lengths, checksums, escapes, head lines."""
    segment = SegmentWriter(tmp_path, b"{}", offline=True, cap_bytes=10**6, memory_bytes=0)
    records = [b'{"n":1}', b"line\nfeed\x1b", b"\x1bplain"]
    assert segment.append([(record, False) for record in records], 0x1234) == []
    segment.close(delete=False)
    [(_, path)] = segment.paths.parts()
    lines = [line.split(b" ", 4) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [tag for tag, *_ in lines] == [b"2h", b"2c", b"2h", b"2c", b"1r", b"1R", b"1r"]
    for tag, time, length, crc, payload in lines:
        assert (int(time, 16), int(length, 16)) == (0x1234, len(payload))
        assert int(crc, 16) == crc32(b"%b %b %b " % (tag, time, length) + payload)
    assert json.loads(lines[0][4]).keys() == {"host", "pid", "offline"}
    escaped = lines[5][4].replace(b"\x1b0", b"\n").replace(b"\x1b1", b"\x1b")
    assert [lines[4][4], escaped, lines[6][4]] == records
