"""The value beside a credential's name, in whatever notation: where it begins and ends. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qitos_mlflow.redaction.literals import (
    LONGEST_BYTES,
    has_digit,
    is_code,
    is_harmless_quoted,
    is_placeholder,
    is_plain_word,
    is_secret_word,
    is_sentence,
    is_word_of_code,
)
from qitos_mlflow.redaction.patterns import lazily

Found = tuple[int, int, bytes]
"""Start and end of a credential, and the quotes that the marker in its place needs, else empty."""

QUOTE = lazily(rb"\s{0,64}[rbufRBUFNL@$]{0,2}(\"\"\"\\?\s{0,16}|'''\s{0,16}|\\{0,8}[\"']|`(?![`]))")
_IN_CALL = lazily(
    # In parentheses, or of a class of texts: numpy's and pydantic's, others by their name's end.
    rb"[ \t]{0,64}(?:(?:(?:[A-Za-z_]\w{0,31}\.){0,3}(?:str_|bytes_|bytearray|SecretStr|SecretBytes"
    rb"|((?:[A-Z]\w{0,24})?(?:Str|String|Text|Bytes|Secret|Password|Token|Value|UUID|Some))))?\("
    rb"(?:(?:[a-z_]{0,16}value|text|data)=)?){1,3}(?=[rbuN]?\\{0,8}[\"'])"
)
_PLAIN = lazily(
    rb"(?i)[ \t]{0,64}(?:(?:bearer|basic|digest|token|apikey|\*\*|!!str|&\w{1,16})[ \t]{1,4}){0,2}"
    rb"([^\s\"'`&;<>\\]+)"
)
_NAME_IN_QUOTES = lazily(rb"(\\{0,8}[\"'])[ \t]{0,8}:")
_NO_TEXT = lazily(
    rb"[ \t]{0,64}(\{(?=(?:\s|\\{1,8}[nrt]){0,64}(?:\\{0,8}[\"'}]|$))"
    rb"|\[(?!redacted\])|-?(?:[0-9][0-9.eE+-]{0,64}|NaN|Infinity)(?=[,}\]\s\\]|$)"
    rb"|np\.u?int[0-9]{1,2}\([0-9-]{1,20}\))"
)
"""The beginning of an object or a list in JSON or a repr, or a number."""
_SCHEMA = lazily(
    rb"\{\s{0,64}\\{0,8}[\"']?(?:type|description|title|\$ref|anyOf|oneOf|valueFrom)\\{0,8}[\"']?"
    rb"\s{0,4}:"
)
"""JSON Schema, which says what a credential looks like."""
_EMPTY = lazily(rb"\{\s{0,8}\}|\[\s{0,8}\]")
_WITH_TEXT = lazily(rb"[\[{]\s{0,64}(?:\\{0,8}[\"']?[\w.-]{1,48}\\{0,8}[\"']?\s?[:=]\s?)?[\"']")
_FIRST_TEXT = lazily(rb"\[\s{0,64}\\{0,8}[\"']([^\"'\\\n]{4,200})")
_HEREDOC = lazily(
    rb"[ \t]{0,8}(?:\$\(cat )?<<[-~]?[\"']?\w{1,32}[\"']?\r?\n[ \t]*(\S[^\r\n]{0,512})"
)
_TUPLE = lazily(rb"[ \t]{0,64}((?:[\w.]{0,32}Auth)?\([^()\"']{0,64}[\"'][^()]{0,256}\))")
_LINE = lazily(rb"[ \t]{0,64}([^\r\n\"'\\]*[^\s\"'\\])")
_BLOCK = lazily(rb"[ \t]{0,8}([|>]?)[+-]?[0-9]?[ \t]{0,8}\r?\n([ \t]*)(?=[^\s\"'{\[-])")
_ITEM = lazily(rb"[ \t]{0,64}-[ \t]{1,8}([^\s:\"'{\[]+)[ \t]{0,8}(?:\r?\n|$)")
_OR = lazily(rb"[^\n]{0,96}?(?:\bor|\|\||\?\?)[ \t]{0,4}(?=[\"'])")
_BRACKET = lazily(rb"[\[\]{}]")
_HEADERS = (b"authorization", b"cookie")
_SCHEME = lazily(rb"(?i)(?:(?:bearer|basic|token|digest|apikey)[ \t]+)?(\S+)")
_SHORTEST_TOKEN = 12
_LOOK_BYTES = 64
_OF_PROSE = (b"token", b"auth", b"key")


def in_quotes(data: bytes, quote: re.Match[bytes], separator: bytes) -> Found | None:
    """What is between the quote that `QUOTE` found and its end, if it can be a credential."""
    mark = quote.group(1)
    start = quote.end()
    closing = mark[:3] if mark[:1] * 3 == mark[:3] else mark
    if separator.strip(b" \t") == b":" and data[start : start + 1] in b"),]};\r\n ":
        return None  # input("Password: ")
    end = data.find(closing, start)
    while end > 0 and data[end - 1] == 92:  # a backslash: this quote is the value's own
        end = data.find(closing, end + len(closing))
    while mark == b"'" and start < end and data[end + 1 : end + 2] == b"'":  # it''s: YAML, SQL
        end = data.find(mark, end + 2)
    if end < 0:
        end = len(data)
    value = data[start : min(end, start + LONGEST_BYTES + 1)]
    if end <= start or is_harmless_quoted(value):
        return None
    sign = separator.strip(b" \t\\\"'`]")
    if len(value) == 1 and sign == b"=":
        return None  # <a accesskey="p">
    if sign.endswith((b"==", b"!=")) and not is_secret_word(value):
        return None
    if mark == b"`":
        value = value.strip()
        if b"\n" in value or b" " in value or is_plain_word(value):
            return None
    if len(closing) == 3 and len(value) <= LONGEST_BYTES:
        end = start + len(value.rstrip())
    return start, end, b""


def text_at(data: bytes, at: int, separator: bytes) -> Found | None:
    """The text in quotes at `at`, also one in a call: ``'…'``, ``b'…'``, ``np.str_('…')``."""
    call = _IN_CALL.match(data, at)
    quote = QUOTE.match(data, call.end() if call else at)
    found = in_quotes(data, quote, separator) if quote else None
    if found and call and call.group(1):
        closed = data[found[1] : found[1] + 16].lstrip(b"\\\"'").startswith(b")")
        return found if closed and is_secret_word(data[found[0] : found[1]]) else None
    return found


def value_at(data: bytes, at: int, name: bytes, separator: bytes) -> Found | None:
    """The value that begins at `at`, or None if nothing there needs to be redacted."""
    if (found := _TUPLE.match(data, at)) and b"," in found.group(1):  # auth=('user', '…')
        return (*found.span(1), b"")
    if (quote := QUOTE.match(data, at)) or _IN_CALL.match(data, at):
        long = quote and quote.end() - quote.start(1) > 2 and b"\n" in quote.group()
        if long and separator.endswith(b":"):
            return None  # A docstring: `def f() -> Token:`
        found_quoted = text_at(data, at, separator)
        if found_quoted and name.lower().endswith(_OF_PROSE):
            start, end, _ = found_quoted
            return None if is_word_of_code(data[start:end].strip()) else found_quoted
        return found_quoted
    named_in_quotes = _NAME_IN_QUOTES.match(separator)
    if named_in_quotes and (found := _NO_TEXT.match(data, at)):
        start, end = found.span(1)
        if data[start] in b"[{":
            if _SCHEMA.match(data, start) or _EMPTY.match(data, start):
                return None
            if (first := _FIRST_TEXT.match(data, start)) and is_sentence(first.group(1)):
                return None
            end = _closing(data, start)
        return start, end, named_in_quotes.group(1)
    if here := _HEREDOC.match(data, at):
        return (*here.span(1), b"")
    low_name = name.lower()
    if low_name.endswith(_HEADERS) and b"==" not in separator:
        return _header(data, at)
    return _unquoted(data, at, low_name, separator)


def _header(data: bytes, at: int) -> Found | None:
    """The rest of the line, which may hold several words and cookies."""
    found = _LINE.match(data, at, at + LONGEST_BYTES)
    if found is None:
        return None
    start, end = found.span(1)
    value = data[start : min(end, start + LONGEST_BYTES)]
    if value[:1] in (b"{", b"["):
        return None if value.startswith(b"[redacted") else _bracketed(data, start)
    if value.startswith(b"${"):
        return None
    first = _SCHEME.match(value)
    assert first is not None
    word = first.group(1).rstrip(b",;.)}")
    if is_placeholder(value) or is_placeholder(word):
        return None
    word_at = start + first.start(1)
    long = len(word) >= _SHORTEST_TOKEN and first.start(1)  # Behind a scheme it is a token.
    token = first.start(1) and word.isalnum() and (has_digit(word) or (long and word.islower()))
    if not token and is_code(data, word_at, word_at + len(word), b"="):
        return None
    if not long and b"=" not in value and not has_digit(value) and is_plain_word(word):
        return None
    if end == at + LONGEST_BYTES and (longer := _LINE.match(data, end - 1)):
        end = longer.end(1)
    return start, end, b""


def _bracketed(data: bytes, start: int) -> Found | None:
    """A list or an object behind a name without quotes, if it begins with a text."""
    return (start, _closing(data, start), b"") if _WITH_TEXT.match(data, start) else None


def _closing(data: bytes, start: int) -> int:
    depth = 0
    for bracket in _BRACKET.finditer(data, start):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth == 0:
            return bracket.end()
    return len(data)


def _unquoted(data: bytes, at: int, low_name: bytes, separator: bytes) -> Found | None:
    found = _PLAIN.match(data, at, at + LONGEST_BYTES)
    if found is None:
        return None
    start, end = found.span(1)
    if data.startswith((b"{{", b"{%", b"${", b"$(", b"("), start):
        return None
    if data[start] in b"[{" and not data.startswith(b"[redacted", start):
        return _bracketed(data, start)
    if end == at + LONGEST_BYTES:
        if is_code(data, start, start + _LOOK_BYTES, separator):
            return None
        longer = _PLAIN.match(data, at)
        assert longer is not None
        return start, longer.end(1), b""
    value = data[start:end]
    end = start + len(value.rstrip(b",.:)]}|"))
    if end == start or b"[redacted" in value:
        return None
    if is_placeholder(value) or is_placeholder(data[start:end]):
        return None
    if is_code(data, start, end, separator):
        other = _OR.match(data, end)
        quote = QUOTE.match(data, other.end()) if other else None
        return in_quotes(data, quote, b"=") if quote else None
    if (
        low_name.endswith(_OF_PROSE)
        and b":" in separator
        and (is_plain_word(data[start:end]) or is_word_of_code(data[start:end]))
    ):
        return None  # "unexpected token: identifier" is prose, "app.auth:User" a log line
    return start, end, b""


def yaml_below(data: bytes, at: int, line: int) -> Iterator[Found] | None:
    """The value of YAML below its name: a block, or a list; None if there is none.

    Args:
        data: the text.
        at: behind the colon.
        line: where the line with the name begins.
    """
    block = _BLOCK.match(data, at)
    indent = len(data[line:at]) - len(data[line:at].lstrip(b" \t"))
    if block and (block.group(1) or len(block.group(2)) > indent):
        return _yaml_lines(data, block.start(2), indent, bool(block.group(1)))
    below = data.find(b"\n", at, at + 64)
    if below >= 0 and not data[at:below].strip() and _ITEM.match(data, below + 1):
        return _yaml_items(data, below + 1)
    return None


def _yaml_lines(data: bytes, start: int, indent: int, scalar: bool) -> Iterator[Found]:
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        text = data[start:end].strip()
        deep = len(data[start:end]) - len(data[start:end].lstrip(b" \t"))
        if deep <= indent or not text or (not scalar and not _is_one_word(text)):
            return
        if not is_placeholder(text):
            yield start + deep, start + deep + len(text), b""
        start = end + 1


def _is_one_word(text: bytes) -> bool:
    return not any(mark in text for mark in (b":", b" ", b"(", b"=", b"{", b"[", b'"', b"'"))


def _yaml_items(data: bytes, at: int) -> Iterator[Found]:
    while item := _ITEM.match(data, at):
        if not is_placeholder(item.group(1)) and not is_plain_word(item.group(1)):
            yield (*item.span(1), b"")
        at = item.end()
        if at >= len(data):
            return
