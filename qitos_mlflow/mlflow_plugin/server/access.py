"""How MLflow's client would reach a server now: routing headers, credentials, certificates.

Comes from MLflow's environment variables, its credentials file and its plugins, as its
documentation of authentication has it. Routing headers decide whose data a server takes ours for,
so they are stored with the records. Credentials are never stored: the process that delivers brings
its own, and only for the server that they are configured for.
"""

from __future__ import annotations

import configparser
import os
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from qitos_mlflow._after_import import imported
from qitos_mlflow._guard import report, warn
from qitos_mlflow.delivery import RetryLater, importing
from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.redact import redact_text

WORKSPACE = "X-MLFLOW-WORKSPACE"
PLUGINS = "mlflow.request_header_provider"
"""Entry-point group of packages that add headers to MLflow's requests."""
REGISTRY = "mlflow.tracking.request_header.registry"
"""The module that has them once it is imported."""


RENEW_S = 60.0
"""Credentials are read again this often (seconds), and after each answer that minds them."""
SLOW_S = 0.005
"""A plugin that takes longer is not asked again for `RENEW_S` (seconds)."""
MOST_TENANTS = 32
"""A header with more values than this is one of each request, and not of a tenant."""
SECRET_WORDS = frozenset({"key", "signature", "token", "secret"})
TENANT_WORDS = frozenset({"tenant", "user", "org", "organization", "team", "workspace", "project"})


class Access(NamedTuple):
    """What a request needs beside its own content.

    Attributes:
        headers: those of routing, and of MLflow's plugins.
        authorise: adds credentials to a prepared request, as the ``auth`` of requests; None: there
            are none, and requests looks into the URL and into ``~/.netrc``.
        verify: as requests has it; None: the system's certificates, or ``REQUESTS_CA_BUNDLE``.
        certificate: the client's.
        signs: `authorise` may read the body.
    """

    headers: Mapping[str, str]
    authorise: Callable[[Any], Any] | None
    verify: bool | str | None
    certificate: str | None
    signs: bool = False


def read_access(
    uri: str, routing: Mapping[str, str] | None, *, asked: bool = True, trusted: bool
) -> Access:
    """How to reach the server at `uri` now. May import mlflow and block on the disk or a plugin.

    Args:
        uri: may hold user and password, which come before all others.
        routing: headers that say whose data it is; None: those of this process.
        asked: those of MLflow's plugins are among them.
        trusted: credentials are configured for this server. Without, it gets none.

    Raises:
        ValueError: `uri` is malformed.
    """
    environ = os.environ
    verify: bool | str | None = environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None
    if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        verify = False
    known = (routing_headers() or {}) if routing is None else routing
    if not trusted:
        return Access(known, lambda request: request, verify, None)  # Nor those of ~/.netrc.
    headers, plugin = _of_plugins(uri)
    if routing is not None and asked:  # What else the plugins say now is not said of these records.
        headers = {key: text for key, text in headers.items() if _is_secret(key, text)}
    certificate = environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    authorise = _authorise(_authorization(uri), plugin)
    return Access({**headers, **known}, authorise, verify, certificate, plugin is not None)


def _of_plugins(uri: str) -> tuple[Mapping[str, str], Callable[[Any], Any] | None]:
    """Headers and authentication of MLflow's plugins, if there are some."""
    if not _asks_mlflow():
        return {}, None
    with importing():
        from qitos_mlflow.mlflow_plugin.server.mlflow_client import plugin_access

    return plugin_access(uri)


def _authorise(
    authorization: str | None, plugin: Callable[[Any], Any] | None
) -> Callable[[Any], Any] | None:
    def authorise(request: Any) -> Any:
        if authorization is not None:
            request.headers["Authorization"] = authorization
        if plugin is None:
            return request
        try:
            return plugin(request)
        except Exception as error:  # Its text may hold a secret.
            raise RetryLater(f"{type(error).__name__} in MLflow's plugin for requests") from error

    return None if authorization is None and plugin is None else authorise


def _authorization(uri: str) -> str | None:
    """The header ``Authorization``. As with MLflow, a user's password comes before a token."""
    parts = urlsplit(uri)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not (user or password):
        user, password = _user_and_password()
        if not (user and password):
            token = os.environ.get("MLFLOW_TRACKING_TOKEN")
            return f"Bearer {token}" if token else None
    return "Basic " + b64encode(f"{user}:{password}".encode("utf-8", "surrogateescape")).decode()


def _user_and_password() -> tuple[str, str]:
    """From the environment, else from MLflow's credentials file; empty variables do not count."""
    names = ("mlflow_tracking_username", "mlflow_tracking_password")
    user, password = (os.environ.get(name.upper(), "") for name in names)
    if user and password:
        return user, password
    file, found = configparser.ConfigParser(), ["", ""]
    try:
        file.read(Path("~/.mlflow/credentials").expanduser())
        found = [_value(file, name) for name in names]
    except RuntimeError:  # This user has no home.
        pass
    except (configparser.Error, OSError, UnicodeError) as error:
        # Never its text: it holds the line that is wrong.
        kind = type(error).__name__
        warn("server.credentials", "~/.mlflow/credentials cannot be read (%s)", kind)
    return user or found[0], password or found[1]


def _value(file: configparser.ConfigParser, name: str) -> str:
    try:
        return file.get("mlflow", name, fallback="")
    except configparser.InterpolationError:  # A ``%`` that is not meant for the parser.
        return file.get("mlflow", name, raw=True)


def has_credentials(uri: str) -> bool:
    """Whether this process has credentials for a server that it trusts."""
    return _authorization(uri) is not None or _asks_mlflow()


def _asks_mlflow() -> bool:
    """Whether only MLflow knows how to reach servers, by its settings or its plugins."""
    for name in ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"):
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            return True
    return has_plugins()


@cache
def has_plugins() -> bool:
    """Whether other packages add headers to MLflow's requests. Reads the installed packages."""
    with importing():
        from importlib_metadata import entry_points

        return any(not entry.value.startswith("mlflow.") for entry in entry_points(group=PLUGINS))


def routing_headers() -> dict[str, str] | None:
    """The headers by which a server tells tenants apart, as they are now on this thread.

    MLflow's workspace; and if its client has loaded plugins, what these add to its requests,
    without credentials. None: a plugin has failed, so it is not known. Never raises and imports
    nothing.
    """
    found: dict[str, Any] = {}
    context: Any = imported("mlflow.utils.workspace_context")
    workspace = (context and context.get_request_workspace()) or ""
    if workspace := workspace or os.environ.get("MLFLOW_WORKSPACE", "").strip():
        found[WORKSPACE] = workspace
    registry: Any = imported(REGISTRY)
    try:
        for provider in getattr(registry, "_request_header_provider_registry", ()):
            if not type(provider).__module__.startswith("mlflow."):
                found.update(_answer_of(provider))
    except Exception as error:  # noqa: BLE001 - a plugin of the user's
        report("server.routing_headers", error)
        return None
    texts = {str(key): str(text) for key, text in found.items()}
    return {key: text for key, text in texts.items() if _routes(key, text)}


_slow: dict[Any, tuple[float, Mapping[str, Any]]] = {}
"""Plugins that have taken long, each with its last answer and until when it holds."""
_seen: dict[str, set[str]] = {}
"""The values that each header has had."""


def _answer_of(provider: Any) -> Mapping[str, Any]:
    """The headers of a plugin. It is called on the agent's thread: one that is slow, seldom."""
    began = time.monotonic()
    until, answer = _slow.get(provider, (0.0, {}))
    if began < until:
        return answer
    answer = provider.request_headers() if provider.in_context() else {}
    if (now := time.monotonic()) - began > SLOW_S:
        _slow[provider] = now + RENEW_S, answer
    return answer


def _routes(name: str, text: str) -> bool:
    """Whether a header says whose data it is: no credential, and not another one each time."""
    if _is_secret(name, text):
        return False
    seen = _seen.setdefault(name, set())
    if len(seen) < MOST_TENANTS:
        seen.add(text)
    return name == WORKSPACE or len(seen) < MOST_TENANTS


def _is_secret(name: str, text: str) -> bool:
    """Whether a header holds a credential. One that ends in a tenant's word names a tenant."""
    last = name.lower().replace("_", "-").rpartition("-")[2]
    named = last in SECRET_WORDS or (last not in TENANT_WORDS and names_credential(name))
    return named or redact_text(text) != text
