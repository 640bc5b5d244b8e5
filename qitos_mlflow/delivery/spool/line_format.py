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

Version 0.1.0 wrote head lines of version 1, which are read as well. It takes a segment whose head
lines say 2 for one without a readable header, and leaves it alone.

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
_START = re.compile(rb"(?:1[hcraHCRA]|2[hcHC]) [0-9a-f]+ ([0-9a-f]+) [0-9a-f]{8} ")


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


def decode(line: bytes) -> Line | None:
    """The content of a line without its LF; None when it is torn, corrupt or of no known kind."""
    start = _START.match(line)
    if start is None:
        return None
    payload = line[start.end() :]
    head, crc = line[: start.end() - 9], line[start.end() - 9 : start.end() - 1]
    if len(payload) != int(start[1], 16) or b"%08x" % crc32(payload, crc32(head)) != crc:
        return None
    kind, time = head[1:2], head.split(b" ", 2)[1]
    if kind.isupper():
        kind = kind.lower()
        payload = payload.replace(_ESC + b"0", LF).replace(_ESC + b"1", _ESC)
    return Line(kind, int(time, 16), payload)


def decode_all(line: bytes) -> tuple[list[Line], bool]:
    """The intact lines in `line`, and whether that is all of it.

    One line, but for damage: if the LF between two lines is damaged, both are found by their
    lengths, so that one damaged byte costs one record at most.
    """
    if (whole := decode(line)) is not None:
        return [whole], True
    found: list[Line] = []
    at = 0
    while start := _START.search(line, at):
        end = start.end() + int(start[1], 16)
        intact = decode(line[start.start() : end])
        if intact is not None:
            found.append(intact)
        at = end if intact is not None else start.start() + 1
    return found, False
