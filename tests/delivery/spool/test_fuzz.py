"""Files of the spool with any damage, by chance or with a right checksum, beside good segments."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qitos_mlflow import _guard
from qitos_mlflow.delivery import Counts, Paths, find_segments, inspect_segment, send_again, take
from qitos_mlflow.delivery.leftovers import Deliveries
from qitos_mlflow.delivery.spool import line_format
from tests.delivery.spool.test_hostile_files import GOOD, Tolerant, _taken, delivered
from tests.fakes.hostile import CALLER, HEAD, NAMES, TRACE_END, file_of, line
from tests.fakes.sink import MIB, FakeServer, left_behind

if sys.platform == "win32":
    pytest.skip("measures memory as POSIX does", allow_module_level=True)

import resource

Changes = list[tuple[str, int, int, bytes]]
Damage = list[tuple[str, bool, Changes]]

SEGMENTS, SOAK_EXAMPLES = 5, 1_000
"""5,000 segments, in each at least two changed files."""
MEMORY_BYTES = 200 * MIB
ROUNDS = 3

TOKENS = [
    *(b"null", b"-1", b"zz", b"\n", b"\x1b0", b"1e400", b"NaN", b'"\\ud800"', b"\0" * 100),
    *(b"[" * 3000, b"9" * 400, b"1r 0 ffffff 00000000 ", b"{}", b'{"a":' * 2000, b"\xff"),
]
PLACES = st.integers(min_value=0, max_value=2**16)
CHANGES = st.tuples(
    st.sampled_from(["flip", "cut", "put", "again", "end"]),
    PLACES,
    PLACES,
    st.binary(max_size=30) | st.sampled_from(TOKENS),
)
DAMAGE = st.lists(
    st.tuples(st.sampled_from(NAMES), st.booleans(), st.lists(CHANGES, min_size=1, max_size=4)),
    min_size=2,
    max_size=3,
)
"""The changes of some files; whether the checksum of the line is right all the same."""

LETTER = b'{"time_ns": 1, "reason": "NO_ARTIFACTS: x", "record": "{}", "header": "{}"}\n'
WHOLE = {
    "seg": (line(b"h", HEAD) + line(b"c", CALLER)) * 2
    + b"".join(line(b"r", one) for one in (b'{"bad":"record"}', TRACE_END % b'{"queue_full": 2}')),
    "ack": line(b"a", b"0 7") * 2,
    "own": b'{"host": "h", "boot": "b", "pid": 4711, "start": "1", "token": "t"}',
    "ship": b"",
    "dead": LETTER * 2 + LETTER.replace(b"NO_ARTIFACTS", b"other").replace(b"header", b"time"),
    "lost": b'{"queue_full": 3, "disk_full": 1}',
}


def changed(data: bytes, changes: Changes) -> bytes:
    """`data` after all changes."""
    for what, place, other, content in changes:
        at = place % (len(data) + 1)
        upto = at + other % 400
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 + other % 255)]) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + data[upto:]
        elif what == "put":
            data = data[:at] + content + data[at:]
        elif what == "again":
            data = data[:upto] + data[at:]
        elif what == "end":
            data = data[:at]
    return data


def with_right_checksum(data: bytes, changes: Changes) -> bytes:
    """`data` with changes in the content of one of its lines, whose checksum is right again."""
    lines = data.split(b"\n")
    at = changes[0][1] % len(lines)
    if (found := line_format.decode(lines[at])) is None:
        return changed(data, changes)
    lines[at] = line(found.kind, changed(found.payload, changes))[:-1]
    return b"\n".join(lines)


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory if there is one: a disk takes longer than all else here."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)


def survive(directory: Path, damage: list[Damage]) -> None:
    """All that reads the spool goes on, nothing is reported as a bug, the good ones arrive."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        spool = Path(name)
        left_behind(spool, GOOD[:1], CALLER)
        for number, some in enumerate(damage):
            bad, contents = Paths(spool, f"bad-1-{number}-3"), dict(WHOLE)
            for file, right, changes in some:
                change = with_right_checksum if right else changed
                contents[file] = change(contents[file], changes)
            for file, content in contents.items():
                file_of(bad, file).write_bytes(content)
        left_behind(spool, GOOD[1:], CALLER)
        for paths in find_segments(spool):
            inspect_segment(paths)
            with suppress(OSError):
                send_again(paths)
        server = FakeServer()

        def open_sink(header: bytes) -> Tolerant:
            return Tolerant(server)

        taking = Deliveries(spool, lambda one: _taken(take(one, open_sink, Counts(), b"{}")))
        with closing(taking):
            for _ in range(ROUNDS):
                list(taking.round())
        assert sorted(delivered(server)) == GOOD


def fuzz(directory: Path, examples: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(DAMAGE, min_size=SEGMENTS, max_size=SEGMENTS))
    def each(damage: list[Damage]) -> None:
        _guard._last_logged.clear()
        survive(directory, damage)

    each()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY_BYTES


def test_any_damage_costs_its_own_segment_at_most(memory: Path) -> None:
    """No exception, and each good segment arrives whole and once."""
    fuzz(memory, 20)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_thousand_damages_cost_their_own_segments_at_most(memory: Path) -> None:
    """The same for long, in bounded memory."""
    fuzz(memory, SOAK_EXAMPLES)
