"""URIs of servers and stores without the credentials in them, fit for disk and screen. Pure."""

from __future__ import annotations

import re

from qitos_mlflow.redaction.redact import redact_text as redact_text

_USER_INFO = re.compile(
    # Up to the "@" of the host; beyond a slash only after what cannot be a port: SQLAlchemy takes
    # any password as it is.
    r"\A(?P<scheme>[^:/?#]+:?//)(?:[^/?#]*@|[^@:/?#]*:(?!\d+(?:[/?#]|$))[^@]*@)"
    # Without the slashes nothing can be reached, but the password is one all the same.
    r"|\A(?!file:)[\w.+-]{2,}:/?[^@/\\]+@"
)


def without_credentials(uri: str) -> str:
    """`uri` without user and password, and without secrets in its query.

    Takes any text, also one that is no valid URI.
    """
    return redact_text(_USER_INFO.sub(lambda found: found["scheme"] or "", uri))
