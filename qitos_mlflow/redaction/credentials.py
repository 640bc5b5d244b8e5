"""Where the credentials in a text are: by their shape, or by the name beside them. Pure.

Prompts grow to hundreds of kilobytes, and one large pattern takes 14 ns a character. So literal
searches (0.7 ns) find the few places that need a closer look. Each look is bounded: the cost of a
text is proportional to its length.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

from qitos_mlflow.redaction.names import names_credential

_SHAPES = {
    "sk-": r"(?!learn)[A-Za-z0-9_-]{12,}",
    "sk_live_|sk_test_|rk_live_|rk_test_": r"[A-Za-z0-9]{10,}",
    "whsec_": r"[A-Za-z0-9]{16,}",
    "gho_|ghp_|ghr_|ghs_|ghu_": r"[A-Za-z0-9]{12,}",
    "github_pat_": r"\w{12,}",
    "glpat-": r"[\w-]{10,}",
    "xox": r"[a-z]-[A-Za-z0-9-]{10,}",
    "xapp-": r"[A-Za-z0-9-]{10,}",
    "AKIA|ASIA|AROA|AIDA": r"[A-Z0-9]{12,}",
    "AIza": r"[\w-]{16,}",
    "hf_": r"[A-Za-z0-9]{13,}",
    "npm_|r8_": r"[A-Za-z0-9]{20,}",
    "pypi-": r"[\w-]{20,}",
    "gsk_|xai-|pplx-": r"[A-Za-z0-9]{16,}",
    "nvapi-": r"[\w-]{16,}",
    "tvly-": r"[\w-]{12,}",
    "lsv2_": r"[A-Za-z0-9_]{16,}",
    "dapi": r"[0-9a-f]{32}",
    "eyJ": r"[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*){1,3}",  # JWT
    "ya29.": r"[\w-]{20,}",  # Google
    "SG.": r"[\w-]{16,}\.[\w-]{16,}",  # SendGrid
    "hooks.slack.com/services/": r"([\w/]{16,})",
    "api.telegram.org/bot": r"([0-9]+:[\w-]{16,})",
    "curl ": r"(?:(?:[^\\\r\n]|\\[\s\S]){0,511}?[ \t])??(?:-[a-zA-Z]{0,8}[uU]|--(?:proxy-)?user)"
    r"[ \t=]{0,4}[\"']?([^\s\"':]{1,256}:[^\s\"']{1,256})",
}
"""How credentials begin, and how they go on. If there is a group, it alone is the credential."""

_AFTER = {start: rest for starts, rest in _SHAPES.items() for start in starts.split("|")}
_IN_RUN = [start for start in _AFTER if re.fullmatch(r"[\w-]+", start)]
_SHAPE = re.compile("|".join(start + _AFTER[start] for start in _IN_RUN).encode())
_SHAPE_STARTS = frozenset(start[:2].encode() for start in _IN_RUN)
_RUN_OF = bytes(
    97 if chr(code).isascii() and (chr(code).isalnum() or chr(code) in "_-") else 32
    for code in range(256)
)
_RUN = b"a" * 16
"""Searched for: each shape of `_IN_RUN` begins with 16 or more letters, digits, ``_`` and ``-``."""
_BY_START = {
    start.encode(): re.compile((re.escape(start) + rest).encode())
    for start, rest in _AFTER.items()
    if start not in _IN_RUN
}
"""Shapes whose first unbroken run is shorter; searched for by their start."""
_SIGNATURE = re.compile(rb"(?i)&(?:amp;)?(?:x-(?:amz|goog)-)?sig(?:nature)?=([\w%.~+/=-]{16,})")
"""In URLs of AWS, Azure and Google, after other parameters."""

_FIELD = re.compile(
    rb"[A-Za-z0-9_-]{0,48}"  # the rest of the name
    rb"\\{0,8}[\"']?\]?[ \t]{0,8}"
    # An annotation (x: str = …) or a sign.
    rb"(?::[ \t]{0,4}(?:str|bytes|string|Any|SecretStr|(?:Optional|Final)\[\w{1,24}\])"
    rb"(?: ?\| ?None)?[ \t]{0,4}=(?!=)"
    rb"|:=|=>|==?|:(?!//)|%3[AaDd]|(?=>))"
)
_OPTION_END = re.compile(rb"[A-Za-z0-9_-]{0,48}[ \t]{1,8}(?!-)")
_QUOTE = re.compile(rb"\s{0,64}[rbufRBUF]{0,2}(\\{0,8}[\"'])")
_PLAIN = re.compile(
    rb"(?i)[ \t]{0,64}(?:(?:bearer|basic|digest|token|\*\*)[ \t]{1,4}){0,2}([^\s\"'&;<>\\]+)"
)
_NAME_IN_QUOTES = re.compile(rb"(\\{0,8}[\"'])[ \t]{0,8}:")
_NO_TEXT = re.compile(
    rb"[ \t]{0,64}(\{|\[(?!redacted\])|-?(?:[0-9][0-9.eE+-]{0,64}|NaN|Infinity)(?=[,}\]\s\\]|$))"
)
"""The beginning of an object or a list in JSON or a repr, or a number."""
_TUPLE = re.compile(rb"[ \t]{0,64}((?:[\w.]{0,32}Auth)?\([^()\"']{0,64}[\"'][^()]{0,256}\))")
_LINE = re.compile(rb"[ \t]{0,64}([^\r\n\"'\\]*[^\s\"'\\])")
_XML = re.compile(rb">([^<>]{1,4096})</")
_HARMLESS = re.compile(
    rb"(?:none|null|nil|true|false|str|string|int|bool|bytes|any|undefined|optional)?[,.:)\]}]*$"
    rb"|(?:str|optional|union)[\[|]|\$\{?[A-Za-z_]\w*\}?[,)]?$|\$\(|os\.|self\.|process\.env|\w*getenv"
    rb"|\[redacted|\*{3,}",
    re.IGNORECASE,
)
_BRACKET = re.compile(rb"[\[\]{}]")
_HEADERS = (b"authorization", b"cookie")
_NAME = re.compile(rb"[A-Za-z0-9_.-]*")
_NAME_LOOK_BYTES = 48
_HARMLESS_LOOK_BYTES = 256
"""Longer values are neither `_HARMLESS` nor one word, and are then read to their end."""

_ESCAPING = frozenset(b"\\%[;")
_ESCAPE = re.compile(
    rb"(?<=\\)(?:[nrfv]|t(?!oken)|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2})"  # \n in JSON or a repr
    rb"|(?<=%)[0-9A-Fa-f]{2}"  # %3D in a URL
    rb"|(?<=[\[;])[0-9]{1,3}m|(?<=\x1b\[)[mK]"  # ESC[1;32m, a terminal's colours
)
"""The letters and digits of an escape: they look like the beginning of the word behind it."""

_STEMS = tuple(
    re.compile(stem)  # Each begins with one letter, which re finds with memchr.
    for stem in (rb"k(?:ey|en|ie)", rb"cre", rb"p(?:ass|wd)", rb"auth")
)
"""Parts of names that `names_credential` may accept: key, token, cookie; secret, credential; …"""

_SCHEME = re.compile(rb"b(?:earer|asic)[ \t]{1,4}")
_PASS = re.compile(rb"[\w.~+/=-]{8,}")
_PLAIN_WORD = re.compile(rb"[A-Za-z]?[a-z-]{1,19}[.]?$")
_USER = re.compile(rb"://([^\s/?#@:\"'<>]{0,256}:[^\s/?#\"'<>]{1,256}|[^\s/?#@:\"'<>]{16,256})$")
_PEM = re.compile(
    rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    rb"[^-]*(?:-(?!----)[^-]*)*(?:-----END [A-Z0-9 ]{0,60}-----)?"
)


def _places(data: bytes, stem: bytes) -> Iterator[int]:
    at = data.find(stem)
    while at >= 0:
        yield at
        at = data.find(stem, at + len(stem))


def _word_start(data: bytes, at: int) -> int:
    escape = _ESCAPE.match(data, at)
    return escape.end() if escape else at


def _name_start(data: bytes, end: int) -> int:
    name = _NAME.match(data[max(0, end - _NAME_LOOK_BYTES) : end][::-1])
    assert name is not None
    return _word_start(data, end - name.end())


Found = tuple[int, int, bytes]
"""Start and end of a credential, and the quotes that the marker in its place needs, else empty."""


def _value_span(data: bytes, at: int, name: bytes, before: int, separator: bytes) -> Found | None:
    """The value that begins at `at`, or None if nothing there needs to be redacted."""
    if not separator:  # <password>…</password>
        found = _XML.match(data, at) if data[before : before + 1] == b"<" else None
        return (*found.span(1), b"") if found else None
    if quote := _QUOTE.match(data, at):
        mark = quote.group(1)
        end = data.find(mark, quote.end())
        while end > 0 and data[end - 1] == 92:  # a backslash: this quote is the value's own
            end = data.find(mark, end + len(mark))
        if end < 0:
            end = len(data)
        return (quote.end(), end, b"") if end > quote.end() else None
    in_quotes = _NAME_IN_QUOTES.match(separator)
    if in_quotes and (found := _NO_TEXT.match(data, at)):
        start, end = found.span(1)
        end = _closing(data, start) if data[start] in b"[{" else end
        return start, end, in_quotes.group(1)
    if found := _TUPLE.match(data, at):  # auth=('user', '…')
        return (*found.span(1), b"")
    low_name = name.lower()
    pattern = _LINE if low_name.endswith(_HEADERS) else _PLAIN
    found = pattern.match(data, at, at + _HARMLESS_LOOK_BYTES)
    if found is None:
        return None
    start, end = found.span(1)
    if data[start] in b"[{":
        return start, _closing(data, start), b""
    if _HARMLESS.match(data, start, min(end, start + 64)):
        return None
    if (
        re.split(rb"[. ]", low_name)[-1] in {b"token", b"auth", b"key"}
        and b"=" not in separator
        and b"%3D" not in separator.upper()
        and _PLAIN_WORD.match(data, start, end)
    ):
        return None  # "unexpected token: identifier" is prose, "app.auth:User" a log line
    whole = pattern.match(data, at)
    return start, whole.end() if whole else end, b""


def _closing(data: bytes, start: int) -> int:
    depth = 0
    for bracket in _BRACKET.finditer(data, start):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth == 0:
            return bracket.end()
    return len(data)


def _named(data: bytes, low: bytes) -> Iterator[Found]:
    """Values beside a credential's name."""
    for stem in _STEMS:
        done = 0
        for found in stem.finditer(low):
            at = found.start()
            if at < done:
                continue
            field = _FIELD.match(data, at)
            if field is None and low.rfind(b"--", max(0, at - _NAME_LOOK_BYTES), at) >= 0:
                field = _OPTION_END.match(data, at)  # --token …
            if field is None:
                continue
            label = _NAME.match(data, at)
            assert label is not None
            start = _name_start(data, at)
            if low[start : label.end()] == b"key" and data[start - 1 : start] == b" ":
                start = _name_start(data, start - 1)  # API key: …
            name = data[start : label.end()]
            separator = data[label.end() : field.end()]
            if separator.isspace() and not name.startswith(b"--"):
                continue
            if not names_credential(name.decode("ascii")):
                continue
            if span := _value_span(data, field.end(), name, start - 1, separator):
                yield span
                done = span[1]


def _shaped(data: bytes, low: bytes) -> Iterator[tuple[int, int]]:
    """Parts that have the shape of a credential."""
    runs = data.translate(_RUN_OF)
    start = runs.find(_RUN)
    while start >= 0:
        end = runs.find(b" ", start)
        shape = _SHAPE.match(data, start) if data[start : start + 2] in _SHAPE_STARTS else None
        if shape is None and data[start - 1] in _ESCAPING:
            shape = _SHAPE.match(data, _word_start(data, start))
        if shape:
            yield shape.span()
            end = shape.end()
        if end < 0:
            break
        start = runs.find(_RUN, end)
    for scheme in _SCHEME.finditer(low):
        word = _PASS.match(data, scheme.end())
        if word is None:
            continue
        if low[scheme.start() + 1] == 101:  # bearer
            if not _PLAIN_WORD.match(data, *word.span()):
                yield word.span()
        elif _is_basic(word.group()):
            yield word.span()
    yield from (signature.span(1) for signature in _SIGNATURE.finditer(data))
    for begin, pattern in _BY_START.items():
        for at in _places(data, begin):
            if found := pattern.match(data, at):
                yield found.span(found.lastindex or 0)
    for at in _places(data, b"@"):
        url = data.rfind(b"://", max(0, at - 516), at)
        user = _USER.match(data, url, at) if url >= 0 else None
        if user:
            yield user.span(1)
    done = 0
    for at in _places(data, b"-----BEGIN"):
        block = _PEM.match(data, at) if at >= done else None
        if block:
            yield block.span()
            done = block.end()


def _is_basic(value: bytes) -> bool:
    try:
        return b":" in base64.b64decode(value[:1024].rstrip(b"=.") + b"==")
    except binascii.Error:
        return False


def find_credentials(data: bytes) -> list[Found]:
    """Every credential in `data` (UTF-8), in order; they may overlap."""
    low = data.lower()
    shaped = ((start, end, b"") for start, end in _shaped(data, low))
    return sorted([*_named(data, low), *shaped])
