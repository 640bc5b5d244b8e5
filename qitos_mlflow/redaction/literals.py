"""Whether a value beside a credential's name can be the credential itself. Pure.

What agents show most is code: ``password = get_password()`` has the name and no secret. Templates,
placeholders, paths and words of a language are no secrets either.
"""

from __future__ import annotations

import re
from functools import lru_cache

from qitos_mlflow.redaction.names import is_known_word, names_credential
from qitos_mlflow.redaction.patterns import lazily

_TEMPLATE = lazily(
    rb"\$\{\{?[^{}]{0,128}\}{1,2}|\{\{[^{}]{0,128}\}\}|\$\([^()]{0,128}\)|\{%[^%]{0,128}%\}"
    rb"|\{[\w.:!()\[\]\"'*-]{0,96}\}|#\{[^{}]{0,96}\}|<[%A-Za-z_!/][^<>]{0,96}>|%\([\w.]{1,48}\)[sdr]"
    rb"|%[A-Za-z_]\w{2,48}%|%[sdrvqex]|\$env:\w+|(?<![\w!#%^*.-])\$\$?[A-Za-z_][\w.]*|\$[0-9]$|@@?[A-Z_]{3,48}@?"
    rb"|\[redacted\]?|\*{3,}|x{4,}|X{4,}|\.{3,}|\xe2\x80\xa6|\xe2\x80\xa2+|_{4,}|-{3,}"
)
"""Parts that stand for a value."""
_AROUND_TEMPLATE = lazily(
    rb"(?i)bearer|basic|token|digest|postgres(?:ql)?|mysql|redis|mongodb|https?|localhost|password"
    rb"|passwd|secret|user"
)
_LONG_WORD = lazily(rb"\w{4}")
_PLACEHOLDER = lazily(
    rb"(?i)(?:your|my|the|enter|insert|add|put|replace|change)[-_ .]?(?:own[-_ ])?"
    rb"(?:[a-z]{2,20}[-_ .]){0,4}(?:key|token|secret|password|here|me|value|id|it|this)"
    rb"(?:[-_ ]here)?$"
    rb"|(?:not[-_ ])?(?:set|needed|required|used|applicable|available|provided)$"
    rb"|(?:op|vault|ssm|awssm|gsm|secret|secrets|keyring|env|file|ref\+\w+)(?:://|:[A-Z_/])"
    rb"|arn:aws[\w-]*:|!(?:vault|ref|sub|getatt|env|secret|reference|importvalue|var)\b|:[a-z_]+$|\?$"
    rb"|@[a-z_]+$|\*{1,8}$|<"
)
_PLAIN_WORD = lazily(rb"[A-Za-z]?[a-z-]{1,19}[.]?$")
_IDENTIFIER = lazily(rb"[&*!]?[A-Za-z_$][\w$]*(?:(?:\.|->|::|\?\.)[A-Za-z_$][\w$]*)*[?!]?$")
_CALL = lazily(
    rb"[&*!]?(?:new )?[A-Za-z_$][\w$]*(?:(?:\.|->|::|\?\.)[A-Za-z_$][\w$]*){0,16}!?"
    rb"(?:<[\w, ]{0,32}>)?[(\[{]"
)
_KEYWORD = lazily(
    rb"(?:await|new|not|lambda|yield|typeof|if|let|const|func|function|async|return|raise|throw|in"
    rb"|is|and|or|for|from|import|self|this|None|null|nil|true|false|True|False|NULL|NaN|string|str"
    rb"|String|int|bool|boolean|bytes|any|Any|object|unknown|undefined|never|void|float"
    rb"|number|optional|Optional|required|list|dict|map|text|varchar|char)(?![\w-])"
)
_SHORT_CODE = lazily(rb"(?:[A-Za-z_$]{1,2}|[0-9]{1,3})(?:=?$|[,)}\]])|0x[0-9A-Fa-f]{1,8}[),;]?$")
"""A variable of minified code, a number: ``{token:e,key:t}``."""
_REFERENCE = lazily(rb"[a-z-]{2,}(?:/[a-z-]{2,})+$|[A-Za-z_]\w*(?:\.\w+)+:\w+(?:\.\w+)*$")
_WORDS = lazily(rb"(?:[A-Za-z]{2,}(?:[-_. /:]|$))+(?:\$S?[0-9]x?)?$")
_CLASS = lazily(rb"a-z|A-Z|0-9|\\[dws]|\[\^")
"""Of a regular expression."""
_PIECE = lazily(rb"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_PATH = lazily(rb"(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[\w.~@-]{0,48}(?:[/\\]|$))*$")
_URL = lazily(rb"https?://[^@\s?]*$")
_VERSION = lazily(rb"[\^~<>=v]{0,3}[0-9]{1,4}(?:\.[0-9x*]{1,4}){1,3}(?:[-.+][\w.]{1,16})?$")
_SENTENCE = lazily(rb"[A-Z][a-z'-]*(?:[ /][A-Za-z]?[a-z'()-]*)+[,.:!?\xe2]?.{0,2}$")
_PROSE_BEHIND = lazily(rb"[,;]?[ \t]+(?:[A-Za-z'`(][\w'`(),-]*(?:[\s.;:!?,]|$))|[ \t]+[=|]")
_DIGITS = frozenset(b"0123456789")
_MARKS = _DIGITS | frozenset(b"!#^*~%$")
LONGEST_BYTES = 256
"""Longer values are none of what is looked for here."""


def is_plain_word(value: bytes) -> bool:
    """Whether it is one word of prose."""
    return _PLAIN_WORD.match(value) is not None


@lru_cache(maxsize=1024)
def is_placeholder(value: bytes) -> bool:
    """Whether it stands for a value: ``${X}``, ``<your-key>``, ``%s``, ``Bearer {token}``."""
    if len(value) > LONGEST_BYTES:
        return False
    value = value.strip(b" \t`\"'\\,")
    if not any(chr(char).isalnum() for char in value) or _PLACEHOLDER.match(value):
        return True
    rest, count = _TEMPLATE.subn(b"", value)
    if count and not _LONG_WORD.search(_AROUND_TEMPLATE.sub(b" ", rest)):
        return True
    low = value.lower()
    return low in _NONE or (value.isalpha() and is_known_word(low.decode("ascii", "ignore")))


_NONE = frozenset(
    (
        b"none null nil true false undefined string str text int bool bytes any yes no on off ok "
        b"required optional missing empty hidden expired invalid valid unset unknown basic bearer "
        b"digest cram-md5 digest-md5 ntlm negotiate gssapi oauth2 default prompt redacted masked "
        b"success failed failure new see unchanged "
        b"write read inherit user:password username:password user:pass "
    ).split()
)


_DIGIT_WORDS = lazily(
    rb"(?i)x25519|ed25519|x448|ed448|base64|base32|b64|oauth2|sha[0-9]+|md5|utf8|utf16|s3|ec2|k8s|x509|[^a-z]v[0-9]"
)
_DIGIT_INSIDE = lazily(rb"[0-9][A-Za-z]")


@lru_cache(maxsize=1024)
def is_wordish(value: bytes) -> bool:
    """Whether an identifier is made of words, so not ``Xk7mQ2vLp``."""
    value = _DIGIT_WORDS.sub(b"word", value)
    if len(value) > 96 or _DIGIT_INSIDE.search(value):
        return False
    pieces = _PIECE.findall(value)
    letters = sum(len(piece) for piece in pieces if piece.isalpha())
    words = sum(1 for piece in pieces if piece.isalpha())
    digits = sum(len(piece) for piece in pieces if piece.isdigit())
    return letters >= 3 * words - 2 and digits <= 3 and (words < 12)


def _speaks_of_credentials(value: bytes) -> bool:
    last = re.split(rb"[.]|->|::", value.rstrip(b"?!"))[-1].decode("ascii", "ignore")
    bare = last.strip("_&*$0123456789")
    return names_credential(bare) or is_known_word(bare.lower())


def has_digit(value: bytes) -> bool:
    """Whether there is a digit in it."""
    return not _DIGITS.isdisjoint(value)


def is_secret_word(value: bytes) -> bool:
    """Whether a word that only its place marks can be a credential: not plain, no name, no code."""
    return (
        len(value) >= 4
        and b" " not in value
        and not _MARKS.isdisjoint(value)
        and any(chr(char).isalpha() for char in value)
        and not is_placeholder(value)
        and not is_code(value, 0, len(value), b":")
    )


@lru_cache(maxsize=1024)
def is_harmless_quoted(value: bytes) -> bool:
    """Whether the text in quotes behind a credential's name is no secret."""
    if len(value) > LONGEST_BYTES:
        return False
    if is_placeholder(value) or _URL.match(value) or _VERSION.match(value):
        return True
    if _PATH.match(value) or is_sentence(value) or _is_prose(value) or _CLASS.search(value):
        return True
    if not _IDENTIFIER.match(value) and not _PLAIN_WORD.match(value):
        return False
    dotted = b"." in value.rstrip(b".")  # django.contrib.auth
    words = is_wordish(value) and not has_digit(value)
    return words and (dotted or _speaks_of_credentials(value))


def is_sentence(value: bytes) -> bool:
    """Whether it is prose without digits."""
    return not has_digit(value) and bool(_SENTENCE.match(value) or _is_prose(value))


def _is_prose(value: bytes) -> bool:
    return value.count(b" ") > 1 and value.endswith((b".", b":", b"!", b"?"))


def is_word_of_code(value: bytes) -> bool:
    """Whether a text in quotes is made of words without digits: no key and no token."""
    return bool(_WORDS.match(value) and is_wordish(value.partition(b"$")[0]))


@lru_cache(maxsize=1024)
def _reads_as_code(value: bytes) -> bool:
    forms = (_CALL, _KEYWORD, _PATH, _URL, _VERSION, _SHORT_CODE)
    if any(form.match(value) for form in forms):
        return True
    return bool(_REFERENCE.match(value)) and is_wordish(value)


def is_code(data: bytes, start: int, end: int, separator: bytes) -> bool:
    """Whether the text without quotes from `start` to `end` is an expression, and no literal."""
    value = data[start:end]
    if len(value) > LONGEST_BYTES:
        return False
    if _reads_as_code(value):
        return True
    behind = data[end : end + 1]
    if value.endswith(b"+") and behind in (b'"', b"'"):
        return True
    sign = separator.strip(b" \t\"'\\]")
    if not _IDENTIFIER.match(value):
        return sign in (b"==", b"!=") and not any(chr(char).isalnum() for char in value)
    if sign.endswith((b"==", b"!=")):
        return True
    if not is_wordish(value):
        return False
    plain = not has_digit(value)
    if b"." in value or b"->" in value or b"::" in value or _speaks_of_credentials(value):
        return True
    if sign.endswith(b"=") and sign != b"=>":
        spaced = data[start - 1 : start] in (b" ", b"\t")
        several = b"_" in value or len(_PIECE.findall(value)) > 2
        return (spaced and (plain or several)) or (plain and behind in (b",", b")", b";"))
    ends = behind in (b",", b")", b";", b"}", b"=", b"|", b"?") or value[:1].isupper()
    return plain and (ends or _PROSE_BEHIND.match(data, end) is not None)
