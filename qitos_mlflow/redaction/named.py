"""Credentials that are known by the name beside them: ``API_KEY=…``, ``"password": "…"``. Pure.

Prompts grow to hundreds of kilobytes, and one large pattern takes 14 ns a character. So literal
searches (0.7 ns) find parts of names, and each name of a credential gets a closer look. Each look
is bounded: the cost of a text is proportional to its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from qitos_mlflow.redaction.literals import (
    has_digit,
    is_harmless_quoted,
    is_plain_word,
    is_secret_word,
)
from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.patterns import lazily
from qitos_mlflow.redaction.shapes import ESCAPING, word_start
from qitos_mlflow.redaction.tables import Tables, parameter
from qitos_mlflow.redaction.values import Found, text_at, value_at, yaml_below

_STEMS = tuple(
    # Each begins with a rare letter: re passes over the others fast. Compiled at import, because
    # the agent's thread needs them for the address of its server.
    re.compile(stem)
    for stem in (
        # A key alone is no secret, unless it is an "API key: …".
        rb"k(?:ey(?:(?<=[a-z0-9_.-]...)|(?<=[a-z] ...)(?=.{0,3}[:=]))|en|ie|(?<=psk))",
        rb"c(?:re[dt]|vv)",
        rb"p(?:a(?:ss|t(?![a-z]))|w(?:d|(?![a-z]))|in(?:code|(?![a-z]))|(?<=otp))",
        rb"uth(?<=auth)",
        rb"ssi(?:d|onid)",
    )
)
"""Parts of names that `names_credential` may accept: key, token, cookie; secret, credential; …"""

_BEFORE_BYTES, _BEHIND_BYTES = 48, 64
"""A name is looked at so far before and behind its stem."""
_MORE = lazily(rb"(?:\.[A-Za-z0-9_-]{1,48}){1,4}")
_SIGN = lazily(
    rb"\\{0,8}[\"'`]?\]?\*{0,2}[ \t]{0,8}"
    # An annotation (x: str = …) or a sign.
    rb"(?::[ \t]{0,4}&?[A-Za-z_][\w.\[\], |&<>']{0,40}?[ \t]=(?=[ \t])"
    rb"|(?<=[ \t])(?:string|String)[ \t]{1,4}=(?=[ \t])|<-(?=[ \t]{0,4}[\"'])"
    rb"|:=|=>|===?|!==?|=|:(?![:/])|%3[AaDd]|&gt;|(?=>))"
)
_PAIR = lazily(rb"\\{0,8}[\"'][ \t]{0,4},\s{0,16}(?=b?\\{0,8}[\"']|[A-Za-z_][\w.]{0,63}\()")
_LIST_START = lazily(rb"[(\[]\s{0,8}(b?)\\{0,8}[\"']$")
_CALL = lazily(
    # {np.str_('password'): …}, {<Field.PASSWORD: 'password'>: …}
    rb"(?<![\w.])(?:(?:\w{1,16}\.)?(?:str_|bytes_)\(|<[\w.]{1,96}: )b?\\{0,8}[\"']$"
)
_CALL_END = lazily(rb"(\\{0,8}[\"'])[)>][ \t]{0,8}(?:(:)(?!:)|(,)\s{0,16})?")
_CALL_BYTES = 128
_XML = lazily(rb">(?:<!\[CDATA\[)?([^<>]{1,4096}?)(?:\]\]>)?</")
_ESCAPED_XML = lazily(rb"&gt;([^<>&]{1,512})&lt;/")
_XML_ATTRIBUTES = lazily(rb"(?:[ \t]{1,4}[\w:.-]{1,32}=\"[^\"<>]{0,64}\"){1,4}(?=>)")
_TAG = lazily(rb"(?:<|&lt;)(?:\w{1,12}:)?$")
_NAMED_ATTRIBUTE = lazily(rb"(?:name|key)=\\?[\"']$")
_PLIST = lazily(rb"</\w{1,16}>\s{0,64}<(?!key)\w{1,16}>([^<>]{1,512})</")
_TOLD = lazily(rb"[ \t]{1,4}(?:is|was)[: ]{1,2}[\"'`]?([^\s\"'`<>,;]{5,64})")
_ASSIGNED_TEXT = lazily(rb"\\?[\"']?[ \t]{0,4}[:=][ \t]{0,4}\\?[\"']")
_LAST_WORD = lazily(rb"[^\s|]{4,64}[ \t]{0,8}(?:\r?\n|$)")
_GAP = lazily(rb"(?:\\n|\s){1,8}")
_LABEL = lazily(
    rb"(?i)(?:name|key|header|field|variable|param(?:eter)?|env|id|label|path)\\{0,8}[\"']?"
    rb"\s{0,8}(?::|=>?)\s{0,8}b?\\{0,8}[\"']?[/\w.-]{0,48}$"
)
_LABEL_ENDS = (b":", b"=", b">", b"/")
_VALUE_FIELD = lazily(
    rb"(?i)(?<![\w.])\\{0,8}[\"']?(?:parameter|output|string)?"
    rb"(?:value|val|content|contents|data|default|raw)"
    rb"(\\{0,8}[\"']?\s{0,8}(?::(?!//)|=>?))"
)
_OBJECT_END = lazily(rb"[{}]|\n[ \t]*\r?\n|\n[ \t]*- ")
_FIELDS_BYTES = 256
_NETRC = lazily(rb"(?:login|machine|account|default|user)\s{1,8}\S{1,128}(?:\\n)?\s{1,8}$")
_SQL = lazily(rb"identified(?:[ \t]{1,4}with[ \t]{1,4}[\w']{1,48})?[ \t]{1,4}by[ \t]{1,4}")
_OF_USERS, _STATEMENT_BYTES = (b"user", b"grant", b"role"), 256
_SETTERS = lazily(rb"(?:.*set_?password|password|(?:.*\.)?secret(?:str|bytes))$")
_SHELL_SET = lazily(rb"(?:^|[\n;&]|\\n)[ \t]*(?:env|setenv|arg|#define)[ \t]+$|-value[ \t]+$")
_PASSWORDS = (b"password", b"passwd", b"passphrase", b"secret")


@lru_cache(maxsize=4096)
def _is_name(raw: bytes) -> bool:
    return names_credential(raw.strip(b"-_").decode("ascii"))


def named(data: bytes, low: bytes, runs: bytes) -> Iterator[Found]:
    """Values beside a credential's name.

    Args:
        data: the text.
        low: the text in lower case.
        runs: the text with a blank in the place of each character that no name has.
    """
    tables = Tables(data)
    for stem in _STEMS:
        done = 0
        for found in stem.finditer(low):
            at = found.start()
            if at < done:
                continue
            least = at - _BEFORE_BYTES if at > _BEFORE_BYTES else 0
            start = runs.rfind(b" ", least, at) + 1 or least
            if start and data[start - 1] in ESCAPING:
                start = word_start(data, start)
            end = runs.find(b" ", at, at + _BEHIND_BYTES)
            if end < 0:
                end = min(len(data), at + _BEHIND_BYTES)
            raw = data[start:end]
            if raw in _ALONE:
                start, raw = _with_word_before(data, runs, start, end)
            if not _is_name(raw):
                continue
            place = _Place(data, low, runs, start, end, raw)
            for cell in tables.look(start, end):
                yield (*cell, b"")
            for value in place.values():
                yield value
                done = max(done, value[1])
    for found in _SQL.finditer(low) if b"identified" in low else ():
        before = low[max(0, found.start() - _STATEMENT_BYTES) : found.start()]
        if not any(verb in before for verb in _OF_USERS):  # "identified by" is English, too.
            continue
        if password := value_at(data, found.end(), b"password", b""):
            yield password


_ALONE = frozenset({b"key", b"Key", b"KEY", b"pass", b"PASS"})


def _with_word_before(data: bytes, runs: bytes, start: int, end: int) -> tuple[int, bytes]:
    """``API key``, ``-passin pass``: the name with the word before it; ``pass = "…"``."""
    if data[start:end].lower() == b"pass" and _ASSIGNED_TEXT.match(data, end):
        return start, b"password"
    if data[start - 1 : start] != b" ":
        return start, b""
    before = runs.rfind(b" ", max(0, start - _BEFORE_BYTES), start - 1) + 1
    name = data[before:end]
    return (start, b"password") if name in (b"-passin pass", b"-passout pass") else (before, name)


class _Place:
    """A name of a credential in a text, and what is around it."""

    def __init__(
        self, data: bytes, low: bytes, runs: bytes, start: int, end: int, raw: bytes
    ) -> None:
        while start and data[start - 1] == 46 and runs[start - 2] == 97:  # db.password
            start = runs.rfind(b" ", max(0, start - _BEFORE_BYTES), start - 1) + 1
        self.data, self.low, self.start = data, low, start
        more = _MORE.match(data, end)
        self.end = more.end() if more else end
        self.name = data[start : self.end] if more else raw
        self.bare = low[start : self.end]
        self.line = max(data.rfind(b"\n", max(0, start - 160), start) + 1, start - 160, 0)

    def values(self) -> Iterator[Found]:
        """The values that belong to the name."""
        data, end = self.data, self.end
        if not _is_name(self.name) or data.startswith((b"${", b"#{"), max(0, self.start - 2)):
            return
        if (call_end := _CALL_END.match(data, end)) and (
            call := _CALL.search(data, max(0, self.start - _CALL_BYTES), self.start)
        ):
            if found := self._in_call(call.start(), call_end):
                yield found
            return
        sign = _SIGN.match(data, end)
        if sign is None:
            yield from self._without_sign()
            return
        separator = sign.group()
        if data[sign.end() : sign.end() + 1] == b">" or separator.endswith(b"&gt;"):
            yield from self._xml(sign)
            return
        before = data[self.line : self.start]
        alone = separator == b":" and before.upper() == before.lower()  # Not `if token:`
        below = yaml_below(data, sign.end(), self.line) if alone else None
        if below is not None:
            yield from below
        elif found := value_at(data, sign.end(), self.name, separator):
            yield found
        elif b"=" in separator and (span := parameter(data, self.start, sign.end())):
            yield (*span, b"")

    def _in_call(self, start: int, end: re.Match[bytes]) -> Found | None:
        """The value beside a name that a repr writes as ``np.str_('password')``."""
        self.start, self.end = start, end.end()
        quote, colon, comma = end.groups()
        if colon:
            return value_at(self.data, self.end, self.name, quote + colon)
        before = self.data[max(0, start - 16) : start].rstrip()
        if comma and before.endswith((b"(", b"[")):
            return self._second(self.end, b"")
        return self._two_fields(self.name)

    def _xml(self, sign: re.Match[bytes]) -> Iterator[Found]:
        """``<password>…</password>``, ``<entry key="password">…</entry>``."""
        data, name = self.data, self.name
        before = data[max(0, self.start - 16) : self.start]
        if sign.group().endswith(b"&gt;"):
            found = _ESCAPED_XML.match(data, sign.end() - 4)
        else:
            found = _XML.match(data, sign.end())
        tag, attribute = _TAG.search(before), _NAMED_ATTRIBUTE.search(before)
        if found and (tag or attribute):
            value = found.group(1)
            if not is_harmless_quoted(value) and (tag or not is_plain_word(value.lower())):
                yield (*found.span(1), b"")
        elif attribute and (two := self._two_fields(name)):
            yield two

    def _without_sign(self) -> Iterator[Found]:
        """Values that no ``=`` or ``:`` joins to their name."""
        data, end, low = self.data, self.end, self.low
        behind = data[end : end + 1]
        if self.bare.startswith(b"-"):
            apart = behind in (b" ", b"\t") and data[end + 1 : end + 2] != b"-"
            if apart and (found := value_at(data, end, self.name, b" ")):
                yield found
        elif behind == b"(":
            if _SETTERS.match(self.bare) and (found := text_at(data, end + 1, b"")):
                yield found
        elif behind == b"<" and (plist := _PLIST.match(data, end)):
            if not is_harmless_quoted(plist.group(1)):
                yield (*plist.span(1), b"")
        elif (
            behind == b" "
            and low[self.start - 1 : self.start] in (b"<", b":")
            and (attributes := _XML_ATTRIBUTES.match(data, end))
        ):
            found_xml = _XML.match(data, attributes.end())
            if found_xml and not is_harmless_quoted(found_xml.group(1)):
                yield (*found_xml.span(1), b"")
        elif two := self._two_fields(self.name):
            yield two
        elif pair := _PAIR.match(data, end):
            # A header, or the arguments of a call.
            opened = _LIST_START.search(data, max(0, self.start - 16), self.start)
            if opened and (found := self._second(pair.end(), opened.group(1))):
                yield found
        elif gap := _GAP.match(data, end):
            yield from self._behind_gap(gap)

    def _two_fields(self, name: bytes) -> Found | None:
        """``{"name": "API_KEY", "value": "…"}`` and the like, in either order."""
        data, start, end = self.data, self.start, self.end
        before = data[max(0, start - 88) : start].rstrip(b" \"'\\\n")
        if not before.endswith(_LABEL_ENDS) and before[-2:] not in (b":b", b"=b"):
            return None
        label = _LABEL.search(data, max(0, start - 88), start)
        if label is None:
            return None
        if label.group()[:4].lower() == b"path" and data[start - 1 : start] != b"/":
            return None
        limit = _OBJECT_END.search(data, end, end + _FIELDS_BYTES)
        until = limit.start() if limit else min(len(data), end + _FIELDS_BYTES)
        field = _VALUE_FIELD.search(data, end, until)
        if field is None:
            low = max(0, label.start() - _FIELDS_BYTES)
            begin = max(data.rfind(mark, low, label.start()) for mark in (b"{", b"- ", b"<"))
            field = _VALUE_FIELD.search(data, begin, label.start()) if begin >= 0 else None
            until = label.start()
        if field is None:
            return None
        found = value_at(data, field.end(), name, field.group(1))
        return found if found and found[0] <= until else None

    def _second(self, at: int, is_bytes: bytes) -> Found | None:
        """The second of the pair ``("X-Token", "…")``, at `at`."""
        if (found := text_at(self.data, at, b"")) is None:
            return None
        start, end, _ = found
        value, calls = self.data[start:end], self.data[at:start].count(b"(")
        behind = self.data[end : end + 24].lstrip(b"\\\"' \n")[calls:].lstrip()
        ends = behind[:1] in (b")", b"]")
        return found if ends and (is_bytes or has_digit(value) or b" " in value) else None

    def _behind_gap(self, gap: re.Match[bytes]) -> Iterator[Found]:
        """``password hunter2`` in netrc, ``PASSWORD '…'`` in SQL, ``ENV TOKEN …``, and prose."""
        data = self.data
        if told := _TOLD.match(data, self.end):
            word = told.group(1).rstrip(b".!?)*_")
            if is_secret_word(word):
                yield told.start(1), told.start(1) + len(word), b""
            return
        is_password = self.bare in _PASSWORDS
        begins = data[gap.end() : gap.end() + 2]
        row = self._is_row(gap) or (is_password and begins[:1] == b"`")
        quoted = is_password and begins.lstrip(b"N")[:1] in (b"'", b'"')
        netrc = is_password and _NETRC.search(data, max(0, self.start - 160), self.start)
        if row or quoted or netrc or self._is_set_in_shell():
            found = value_at(data, gap.end(), self.name, b"")
            sure = not row and (quoted or not netrc)
            if found and (sure or is_secret_word(data[found[0] : found[1]])):
                yield found

    def _is_row(self, gap: re.Match[bytes]) -> bool:
        """Whether the line has the name, two blanks or more, and one word."""
        blank = not self.data[self.line : self.start].strip()
        return blank and len(gap.group()) > 1 and _LAST_WORD.match(self.data, gap.end()) is not None

    def _is_set_in_shell(self) -> bool:
        before = self.low[max(0, self.start - 24) : self.start]
        return before[-1:].isspace() and _SHELL_SET.search(before) is not None
