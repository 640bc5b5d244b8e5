"""What a hostile server, a broken proxy or the network between make of MLflow's answers."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from tests.fakes.raw_server import KEPT, http

Pieces = list[bytes]

ODD: list[Any] = [
    *(None, True, -1, 2**63, 1e308, [], {}, [[]], {"a": {}}, [None], "", "a/b", "../x", "a b"),
    *("\x1b[2J", "é", "x" * 300, "x" * 20_000, "<html>", "\u0000", "'; DROP TABLE runs", 10**18),
]
"""In place of any value. None of the texts can be an id."""

STATUSES = (
    *("100 Continue", "101 Switching", "202 Accepted", "203 Maybe", "206 Partial", "299 Odd"),
    *("300 Many", "301 Moved", "302 Found", "304 Not Modified", "307 Moved", "399 Odd"),
    *("400 Bad", "401 Who", "403 No", "404 Not Found", "405 No", "407 Who", "408 Slow", "409 Odd"),
    *("410 Gone", "418 Teapot", "422 No", "425 Early", "429 Many", "431 Long", "451 Law"),
    *("500 Oops", "501 No", "502 Bad", "503 Busy", "504 Slow", "520 Odd", "599 Odd", "999 Odd"),
)
"""Without 413, which is a promise of its own: what is too large is made smaller."""
PAGES = (b"<html>maintenance</html>", b"", b"OK", b'{"status":"ok"}', b"[]", b"null", b"\xff\xfe")
TYPES = ("text/html", "text/plain", "application/octet-stream", "", "\x00", "multipart/mixed")


def odd_value(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """One value of the JSON is another one, or is missing."""
    answer = orjson.loads(body) if body.startswith(b"{") else {}
    places = list(_places(answer, chance))
    if places:
        holder, key = chance.choice(places)
        if chance.random() < 0.2 and isinstance(holder, dict) and holder is not answer:
            del holder[key]
        else:
            odd = [one for one in ODD if key != "artifact_uri" or not isinstance(one, str)]
            holder[key] = chance.choice(odd)
    return [http(orjson.dumps(answer), status, kind), KEPT]


def _places(value: Any, chance: random.Random) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        # Nothing found, or no cost, is an answer.
        if inner != [] and key not in ("runs", "data_points"):
            yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner, chance)


def other_status(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """The status of something that has gone wrong, with or without MLflow's body."""
    headers = chance.sample(
        [
            *(
                "Location: /elsewhere",
                "Location: http://127.0.0.1:1/x",
                "Location: http://[",
                "A: b",
            ),
            *("Retry-After: 0", "Retry-After: x", f"Retry-After: {'9' * 5000}", "Location: //"),
        ],
        2,
    )
    page = chance.choice([body, *PAGES])
    if b"error_code" in page or b"detail" in page:  # This would be MLflow's word.
        page = b""
    # Closed: after "100 Continue" the client waits for more.
    return [http(page, chance.choice(STATUSES), chance.choice([kind, *TYPES]), *headers)]


def page(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """Another program's success."""
    return [http(b"<html>hello</html>", "200 OK", chance.choice(["text/html", kind])), KEPT]


def cut(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """The connection breaks amid the answer."""
    whole = http(body or b" ", status, kind)
    return [whole[: chance.randrange(len(whole))]]


def shorter(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """A part of the JSON, with a length that fits."""
    return [http(body[: chance.randrange(1, max(2, len(body)))], status, kind), KEPT]


def flipped(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """Some bytes of the head or of the frame are others."""
    whole = bytearray(http(body, status, kind))
    for _ in range(chance.randrange(1, 4)):
        whole[chance.randrange(len(whole) - len(body))] = chance.randrange(256)
    return [bytes(whole)]


def encoded(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """Packed well or badly, or so that it says nothing for a long time."""
    packed, name = chance.choice(
        [
            (gzip.compress(body), "gzip"),
            (zlib.compress(body), "deflate"),
            (BOMB, "gzip"),
            (body, "gzip"),
            (gzip.compress(body)[:-4], "gzip"),
            *((body, name) for name in ("br", "zstd", "gzip, gzip", "rot13")),
        ]
    )
    return [http(packed, status, kind, f"Content-Encoding: {name}"), KEPT]


BOMB = gzip.compress(bytes(16 * 1024 * 1024))


def framed(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """Chunks, right and wrong."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    size = chance.choice(
        [b"%x" % len(body), b"-1", b"-5", b"zz", b"", b"f" * 40, b"1", b"7fffffff"]
    )
    return [head.encode(), size + b"\r\n" + body + b"\r\n0\r\n\r\n"]


def headed(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """Odd heads: too many lines, too long ones, lengths that are none."""
    length = len(body)
    line = chance.choice(
        [
            *(f"Content-Length: {n}" for n in (length + 9, "abc", -1, f"{length}, 0", "9" * 400)),
            *("X: " + "y" * 70_000, "\r\n".join(f"H{n}: v" for n in range(150)), "no colon", ": "),
            "Set-Cookie: a=" + "b" * 4000,
            f"Content-Length: {length}\r\nContent-Length: {length + 1}",
        ]
    )
    return [http(body, status, kind, line)]


def garbage(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """No HTTP, another version of it, or much before it."""
    noise = chance.randbytes(chance.randrange(200))
    whole = http(body, status, kind)
    return [
        chance.choice(
            [
                noise,
                b"HTTP/1.1 \r\n\r\n",
                b"HTTP/9.9 200 OK\r\n\r\n",
                b"SSH-2.0-OpenSSH\r\n",
                b"HTTP/1.1 100 Continue\r\n\r\n" * 5000 + whole,
                b"HTTP/1.1 200 OK\r\n" + noise,
                noise + whole,
            ]
        )
    ]


def twice(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """The same answer again, for which nobody has asked."""
    return [http(body, status, kind) * 2]


def repeated_keys(body: bytes, status: str, kind: str, chance: random.Random) -> Pieces:
    """A refusal that says two things, and blames what was sent with the second."""
    refusal = b'{"error_code": "UNKNOWN", "error_code": "INVALID_PARAMETER_VALUE"}'
    return [http(refusal, chance.choice(["400 Bad", "404 Not Found", "200 OK"])), KEPT]


Damage = Callable[[bytes, str, str, random.Random], Pieces]

AFTER: tuple[Damage, ...] = (odd_value, *(encoded, cut, shorter, flipped, framed, headed, twice))
"""Of an answer of MLflow's, so the request is carried out."""
INSTEAD: tuple[Damage, ...] = (other_status, page, garbage, repeated_keys)
"""Of something before MLflow, which never gets the request."""
