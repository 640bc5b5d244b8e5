"""Credentials in the options of commands: ``curl -u ann:…``, ``mysql -p…``. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qitos_mlflow.redaction.literals import is_placeholder
from qitos_mlflow.redaction.patterns import lazily

_QUOTED = rb"(?:\"([^\"\n]{1,256})\"|'([^'\n]{1,256})'|([^\s\"'|<>&;]{1,256}))"
_PAIR = lazily(
    rb"(?:[A-Za-z]{0,8}?[uU]|-user|-proxy-user)[ \t=]{0,4}"
    rb"\\?[\"']?([^\s\"':\\]{1,128}:[^\s\"'\\]{1,256})"
)
_JOINED = lazily(rb"[pP]" + _QUOTED)
_APART = lazily(rb"(?:[pawP]|-with-token)[ \t]{1,4}(?:<<<[ \t]?)?(?!-)" + _QUOTED)
_SUDO = lazily(rb"(?:S\b|-password-stdin)")
_ECHO = lazily(rb"(?:echo|printf)[ \t]{1,4}(?:-n[ \t])?" + _QUOTED + rb"[ \t]{0,4}\|[^|\n]{0,64}$")
_HTPASSWD = lazily(rb"[A-Za-z]{0,4}b[A-Za-z]{0,4}[ \t]\S{1,128}[ \t]\S{1,64}[ \t]" + _QUOTED)
_LOOK_BYTES = 256

_WITH_PAIR = (b"curl",)
_WITH_JOINED = (b"mysql", b"mariadb", b"sshpass", b"7z ", b"7za ", b"unzip", b"zip ")
_WITH_APART = (
    *(b"sshpass", b"docker login", b"podman login", b"registry login", b"az login", b"redis-cli"),
    *(b"ldapsearch", b"ldapadd", b"ldapmodify", b"mongo", b"gh auth", b"oc login"),
    *(b"sqlcmd", b"bcp ", b"ipmitool", b"mosquitto_", b"twine ", b"cqlsh", b"zip "),
)


def _command_before(data: bytes, at: int, names: tuple[bytes, ...]) -> bool:
    low = max(0, at - _LOOK_BYTES)
    begin = max(data.rfind(name, low, at) for name in names)
    if begin < 0:
        return False
    between = data[begin:at]
    return not (b"\n" in between.replace(b"\\\n", b"") or b" | " in between or b"&&" in between)


_DASH = re.compile(
    rb"-(?<= -)(?:[uUpPawS]|-user|-proxy-user|-password-stdin|-with-token"
    rb"|[A-Za-z]{0,3}b|[A-Za-z]{1,8}[uU][ \t])"
)


def options(data: bytes) -> Iterator[tuple[int, int]]:
    """Credentials behind options that have no credential's name."""
    for dash in _DASH.finditer(data):
        if found := _option(data, dash.start() - 1):
            group = found.lastindex or 0
            password = found.group(group)
            if found.re.pattern == _PAIR.pattern:
                password = password.partition(b":")[2]
            if not is_placeholder(password):
                yield found.span(group)


def _option(data: bytes, dash: int) -> re.Match[bytes] | None:
    at = dash + 2
    letter = data[at : at + 1]
    if (pair := _PAIR.match(data, at)) and _command_before(data, dash, _WITH_PAIR):
        return pair
    joined = _JOINED.match(data, at) if letter in b"pP" else None
    if joined and _command_before(data, dash, _WITH_JOINED):
        return joined
    if letter in b"pawP-" and (apart := _APART.match(data, at)):
        return apart if _command_before(data, dash, _WITH_APART) else None
    if _SUDO.match(data, at):
        line = max(data.rfind(b"\n", max(0, dash - _LOOK_BYTES), dash) + 1, dash - _LOOK_BYTES, 0)
        echo = max(data.rfind(b"echo ", line, dash), data.rfind(b"printf ", line, dash))
        sudo = letter == b"-" or data.find(b"sudo", line, dash) >= 0
        return _ECHO.match(data, echo, dash) if sudo and echo >= 0 else None
    if data.startswith(b"htpasswd", max(0, dash - 8)):
        return _HTPASSWD.match(data, at)
    return None
