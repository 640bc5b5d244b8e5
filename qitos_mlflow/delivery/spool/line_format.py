r"""The lines of a spool file. Pure: bytes to bytes.

    file    = line*
    line    = tag " " time " " length " " crc " " payload "\n"
    tag     = version kind        version of this grammar, then what the line is
    version = "2" | "1"           2 for the head lines "h" and "c", 1 for all others
    kind    = "h"                 first line of a part: JSON object about the file itself
            | "c"                 second line: the header given by the caller, opaque
            | "r"                 a record, opaque
            | "a"                 an acknowledgement (only in an ".ack" file, once or twice)
            | "H" | "C" | "R" | "A"   the same; ESC and LF in the payload are escaped
    time    = hex digits          wall clock in ns when the line was written
    length  = hex digits          bytes of the payload as stored
    crc     = 8 hex digits        CRC-32 of tag, time, length with their spaces, and payload
    payload = any bytes but LF    escaped: ESC "0" is LF, ESC "1" is ESC

Head lines of version 1 ("format 1" in docs/spool.md) are read as well. A program that knows only
those finds no readable header where head lines have version 2, and leaves that segment alone.

The checksum finds torn and corrupt lines. It does not protect against deliberate changes.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from zlib import crc32

FILE = b"h"
CALLER = b"c"
RECORD = b"r"
ACK = b"a"

LF = b"\n"
_ESC = b"\x1b"
_NUMBER = rb"[0-7]?[0-9a-f]{1,15}"  # Of 63 bits.
_START = re.compile(rb"(?:1[hcraHCRA]|2[hcHC]) %b (%b) [0-9a-f]{8} " % (_NUMBER, _NUMBER))
_NEXT = re.compile(rb"\n(?=%b)" % _START.pattern)

LINE_BYTES = 64 * 1024 * 1024
"""No line is longer (bytes): so much memory, and once more, is needed to read it."""
MAX_TRIES = 100
"""Most places in a damaged line at which another one is looked for."""


class Line(NamedTuple):
    """One intact line; `kind` is always in lower case and `payload` unescaped."""

    kind: bytes
    time_ns: int
    payload: bytes


def encode(kind: bytes, payload: bytes, time_ns: int) -> bytes:
    """The line for `payload`, with its LF."""
    version = b"2" if kind in (FILE, CALLER) else b"1"
    if LF in payload:
        kind = kind.upper()
        payload = payload.replace(_ESC, _ESC + b"1").replace(LF, _ESC + b"0")
    head = b"%b%b %x %x " % (version, kind, time_ns, len(payload))
    return b"%b%08x %b\n" % (head, crc32(payload, crc32(head)), payload)


def decode(line: bytes | memoryview) -> Line | None:
    """The content of a line without its LF; None when it is torn, corrupt or of no known kind."""
    start = _START.match(line)
    if start is None or len(line) - start.end() != int(start[1], 16):
        return None
    head, crc = start[0][:-9], start[0][-9:-1]
    payload = bytes(line[start.end() :])
    if b"%08x" % crc32(payload, crc32(head)) != crc:
        return None
    kind, time = head[1:2], head.split(b" ", 2)[1]
    if kind.isupper():
        kind = kind.lower()
        payload = payload.replace(_ESC + b"0", LF).replace(_ESC + b"1", _ESC)
    return Line(kind, int(time, 16), payload)


def decode_all(line: bytes | memoryview) -> tuple[list[Line], bool]:
    """The intact lines in `line`, and whether that is all of it.

    One line, but for damage: if the LF between two lines is damaged, both are found by their
    lengths, so that one damaged byte costs one record at most.
    """
    if (whole := decode(line)) is not None:
        return [whole], True
    found: list[Line] = []
    at = tries = 0
    view = memoryview(line)
    while tries < MAX_TRIES and (start := _START.search(line, at)):
        end = start.end() + int(start[1], 16)
        intact = decode(view[start.start() : end]) if end <= len(line) else None
        if intact is not None:
            found.append(intact)
        at = end if intact is not None else start.start() + 1
        tries += intact is None
    return found, False


def end_of_line(data: bytes, start: int, end: int) -> int:
    """Where the line at `start` of `data` ends, behind its LF; there is one right before `end`.

    Lines that follow each other and do not begin like one are taken for one: a file full of them
    must not take more time than any other.
    """
    if _START.match(data, start):
        return data.index(LF, start) + 1
    following = _NEXT.search(data, start)
    return end if following is None else following.end()
