"""URIs of servers and stores without the credentials in them, fit for disk and screen. Pure."""

from __future__ import annotations

import re

from qitos_mlflow.redaction.redact import redact_text as redact_text

_USER_INFO = re.compile(
    # Up to the "@" before the host. A password may hold a slash, because SQLAlchemy takes it as it
    # is; so the match goes beyond a slash if the text after the colon cannot be a port.
    r"\A(?P<scheme>[^:/?#]+:?//)(?:[^/?#]*@|[^@:/?#]*:(?!\d+(?:[/?#]|$))[^@]*@)"
    # Without the two slashes the URI is not valid, but it has a password all the same.
    r"|\A(?!file:)[\w.+-]{2,}:/?[^@/\\]+@"
)


def without_credentials(uri: str) -> str:
    """`uri` without user and password, and without secrets in its query.

    Takes any text, also one that is no valid URI.
    """
    return redact_text(_USER_INFO.sub(lambda found: found["scheme"] or "", uri))
