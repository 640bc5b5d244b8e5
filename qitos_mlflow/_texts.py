"""What a person sees: every log line, and all that a command prints, passes `clean`.

A text may quote what a server, a plugin, a file or a prompt holds: a credential, or characters that
have a terminal do something.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator

from qitos_mlflow._interruption import let_through

MOST_CHARS = 4_000
"""Longest line (characters); what is longer is cut."""
MOST_TRACEBACK_CHARS = 30_000

SEARCHED = 4
"""Of a longer text so many times its bound is searched for credentials, then it is cut: one that
began before the end of what is searched is not recognised by half."""

SHORTEST_SECRET = 6
"""Shorter values of variables that name credentials are not searched for (characters)."""

QUOTING = frozenset({"configparser", "netrc"})
"""Modules that parse credentials and whose exceptions quote what they could not parse."""

HIDDEN = "[redacted]"

_CONTROL = re.compile(
    # C0 without tab, C1, surrogates, and what changes the direction or ends the line.
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(text: str, most: int = MOST_CHARS, *, lines: bool = False, own: bool = False) -> str:
    r"""`text` without credentials and control characters, at most about `most` characters.

    Args:
        text: any.
        most: the bound.
        lines: newlines stay; otherwise they are shown as ``\n``, so that a value makes no line of
            its own.
        own: it has our words, and places that the user has named, such as a directory ``token=1``:
            nothing is taken for a credential.
    """
    long = len(text) > most
    text = text[: SEARCHED * most]
    if not own:
        text = _without_secrets(text)
    if long and len(text) > most:
        text = f"{text[:most]}… [cut]"
    if not lines:
        return _CONTROL.sub(_escaped, text)
    return "\n".join(_CONTROL.sub(_escaped, line) for line in text.split("\n"))


def in_words(error: BaseException) -> str:
    """``"Type: text"``, or the type alone if the text is empty or ``__str__`` raises."""
    name = type.__dict__["__name__"].__get__(type(error))  # Whatever its metaclass makes of it.
    text = text_of(error)
    return f"{name}: {text}" if text else name


def text_of(error: BaseException) -> str:
    """The text of an exception, without what it quotes of a file with credentials."""
    try:
        return _unquoted(str.__str__(str(error)), error)
    except BaseException as own:  # noqa: BLE001 - an exception class of the user's
        let_through(own)
        return ""


def traceback_of(error: BaseException) -> str:
    """The traceback as Python prints it, clean. Never raises.

    Its lines are indented: one of an exception's text does not look like a line of the log.
    """
    try:
        text = _unquoted("".join(traceback.format_exception(error)), error)
        return clean(text, MOST_TRACEBACK_CHARS, lines=True).rstrip("\n").replace("\n", "\n  ")
    except BaseException as own:  # noqa: BLE001 - code of the exception's class
        let_through(own)
        return in_words(error)


def _without_secrets(text: str) -> str:
    from qitos_mlflow.redaction.names import names_credential
    from qitos_mlflow.redaction.redact import redact_text

    text = redact_text(text)
    for name, value in list(os.environ.items()):
        # A path is a place where a credential is, or what a shell has in PWD.
        secret = len(value) >= SHORTEST_SECRET and value in text and value[0] != os.sep
        if secret and names_credential(name):
            text = text.replace(value, HIDDEN)
    return text


def _unquoted(text: str, error: BaseException) -> str:
    for one in _chain(error):
        if not QUOTING.isdisjoint(base.__module__ for base in type(one).__mro__):
            text = text.replace(str(one), HIDDEN)
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and what it was raised from or during."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += (one.__cause__, one.__context__)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
