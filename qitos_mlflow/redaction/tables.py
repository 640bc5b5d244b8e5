"""Credentials in tables: CSV, Markdown, what databases print, ``INSERT INTO``. Pure.

The name is the head of a column, and the credentials are below it. Each table is read once.
"""

from __future__ import annotations

from collections.abc import Iterator

from qitos_mlflow.redaction.literals import is_placeholder, is_secret_word
from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.patterns import lazily

_LONGEST_LINE = 512
"""Longer lines are no head of a table (bytes)."""
_DELIMITERS = b"|,;\t"
_HEAD_CELL = lazily(rb"[\"'`]?[A-Za-z_][\w .#/()-]{0,40}?[\"'`]?$")
_RULE = lazily(rb"[-+=:| ]{3,}\r?$")
_WIDE = lazily(rb"\S+(?: \S+)*")
_QUOTED_CELL = lazily(rb"(?:\"(?:[^\"]|\"\")*\"|[^,;\t|\"]*)")
_INSERT = lazily(rb"\)[\s\"]{0,8}values[\s\"]{0,8}")
_TUPLE = lazily(rb"\(((?:'(?:[^'\\]|\\.|'')*'|\"[^\"]*\"|[^()'\"])*)\)[\s,]{0,16}")
_TUPLE_CELL = lazily(rb"(?:'(?:[^'\\]|\\.|'')*'|\"[^\"]*\"|[^,'\"])+")
_PLACE = lazily(rb"[ \t]{0,4}(?:%s|\?)")
_TO_PARAMETERS = lazily(rb"[^\"\n]{0,256}\"{1,3}\s{0,8},\s{0,16}[(\[]")
_PARAMETERS = lazily(
    rb"\s{0,16}(?:\"([^\"]{1,256})\"|'([^']{1,256})'|[^,()\[\]\"']{0,64})\s{0,8},?"
)

Span = tuple[int, int]


class Tables:
    """The tables of one text."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._done = 0
        """Tables before it are read."""

    def look(self, start: int, end: int) -> Iterator[Span]:
        """The cells below the name from `start` to `end`, or beside it."""
        data = self._data
        if start < self._done:
            return
        left, right = data[max(0, start - 16) : start], data[end : end + 16]
        before = left.rstrip(b" \"'`[")[-1:] or b"\n"
        behind = right.lstrip(b" \"'`]")[:1] or b"\n"
        if before in b"(," and behind in b"),":
            yield from self._insert(start, end)
        first = before in b"\n\t|,;" or left.endswith(b"  ")
        if first and (behind in b"\r\n\t|,;" or right.startswith(b"  ")):
            line = data.rfind(b"\n", max(0, start - _LONGEST_LINE), start) + 1
            line_end = data.find(b"\n", end, end + _LONGEST_LINE)
            if line_end < 0 and len(data) - end < _LONGEST_LINE:
                line_end = len(data)
            if line_end >= 0 and (line or start < _LONGEST_LINE):
                yield from self._table(line, line_end)

    def _table(self, line: int, line_end: int) -> Iterator[Span]:
        data = self._data
        head = data[line:line_end].rstrip(b"\r")
        cells = list(_cells(data, line, line + len(head)))
        names = [data[start:end].strip(b" \"'`") for start, end in cells]
        if b"|" in head and len(names) == 2 and names[0] and names_credential(_text(names[0])):
            start, end = cells[1]
            if is_secret_word(data[start:end]):
                yield start, end
                self._done = line_end
                return
        if sum(1 for name in names if name) < 2 or not all(
            name == b"" or _HEAD_CELL.match(name) for name in names
        ):
            return
        hidden = [index for index, name in enumerate(names) if names_credential(_text(name))]
        at = line_end + 1
        rows = 0
        while hidden and at < len(data):
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end
            if not _RULE.match(data, at, end):
                last = end - (data[end - 1 : end] == b"\r")
                row = list(_cells(data, at, last)) if end - at < 8192 else []
                if len(row) != len(cells):
                    break
                rows += 1
                for index in hidden:
                    if is_secret_word(data[slice(*row[index])]):
                        yield row[index]
            at = end + 1
        self._done = max(self._done, at if rows else line_end)

    def _insert(self, start: int, end: int) -> Iterator[Span]:
        """``INSERT INTO t (name, password) VALUES ('ann', '…')``."""
        data = self._data
        opened = data.rfind(b"(", max(0, start - _LONGEST_LINE), start)
        closed = data.find(b")", end, end + _LONGEST_LINE)
        if opened < 0 or closed < 0 or b"'" in data[opened:closed]:
            return
        values = _INSERT.match(data[closed : closed + 32].lower())
        if values is None:
            return
        names = data[opened + 1 : closed].split(b",")
        hidden = {index for index, name in enumerate(names) if names_credential(_text(name))}
        at = closed + values.end()
        while row := _TUPLE.match(data, at):
            for index, cell in enumerate(_TUPLE_CELL.finditer(data, *row.span(1))):
                if index in hidden:
                    text = cell.group().strip()
                    mark = text[:1]
                    first = cell.start() + cell.group().find(text) + 1
                    if mark in (b"'", b'"') and len(text) > 2 and not is_placeholder(text[1:-1]):
                        yield first, first + len(text) - 2
            at = row.end()
        self._done = max(self._done, at)


def parameter(data: bytes, at: int, end: int) -> Span | None:
    """The parameter for ``password = %s`` in ``execute("…", ("…", 7))``.

    `at` is before the name, and `end` behind the sign.
    """
    place = _PLACE.match(data, end)
    if place is None:
        return None
    query = data.rfind(b'"', max(0, at - _LONGEST_LINE), at)
    tail = _TO_PARAMETERS.match(data, place.end())
    if query < 0 or tail is None:
        return None
    before = data[query:at]
    index = before.count(b"%s") + before.count(b"?")
    position = tail.end()
    for _ in range(index):
        one = _PARAMETERS.match(data, position)
        if one is None or one.end() == position:
            return None
        position = one.end()
    one = _PARAMETERS.match(data, position)
    return one.span(one.lastindex) if one and one.lastindex else None


def _text(name: bytes) -> str:
    return name.decode("ascii", "ignore")


def _cells(data: bytes, start: int, end: int) -> Iterator[Span]:
    """The cells of one line, without what surrounds their texts."""
    line = data[start:end]
    delimiter = next((one for one in (b"|", b"\t", b",", b";") if one in line), None)
    if delimiter is None:
        for word in _WIDE.finditer(data, start, end):
            yield word.span()
        return
    at = start
    while at <= end:
        if data[at : at + 1] == b'"' and delimiter != b"|":
            quoted = _QUOTED_CELL.match(data, at, end)
            stop = quoted.end() if quoted else at
            stop = data.find(delimiter, stop, end)
        else:
            stop = data.find(delimiter, at, end)
        stop = end if stop < 0 else stop
        cell = data[at:stop]
        text = cell.strip(b" \"'`\t")
        first = at + (cell.find(text) if text else 0)
        if delimiter != b"|" or text or (at > start and stop < end):
            yield first, first + len(text)
        at = stop + 1
