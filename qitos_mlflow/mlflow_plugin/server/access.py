"""How MLflow's client would reach a server now: routing headers, credentials, certificates.

Reads MLflow's environment variables, its credentials file and its plugins, as its documentation of
authentication describes. Routing headers tell the server which tenant records belong to, so they
are stored with the records. Credentials are never stored: the process that delivers uses its own,
and only for the server that they are configured for.
"""

from __future__ import annotations

import configparser
import os
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from qitos_mlflow._after_import import imported
from qitos_mlflow._entry_points import entry_points
from qitos_mlflow._guard import contain, warn
from qitos_mlflow.delivery import Hopeless, RetryLater, importing
from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.redact import MARKER, redact_text

WORKSPACE = "X-MLFLOW-WORKSPACE"
PLUGINS = "mlflow.request_header_provider"
"""Entry-point group of packages that add headers to MLflow's requests."""
REGISTRY = "mlflow.tracking.request_header.registry"
"""The module that has them once it is imported."""


RENEW_S = 60.0
"""Credentials are read again this often (seconds), and after each 401, 403 or 407."""
SLOW_S = 0.1
"""A plugin that takes longer is named in a warning (seconds)."""
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
        asked: MLflow's plugins could be asked when `routing` was recorded; if not, they are now.
        trusted: credentials are configured for this server. Without, it gets none.

    Raises:
        ValueError: `uri` is malformed.
        Hopeless: a plugin gives what no request can have.
    """
    environ = os.environ
    verify: bool | str | None = environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None
    if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        verify = False
    if routing is not None:
        routing = _usable(routing)
    if not trusted:  # Nor does it get those of ~/.netrc, or the name of this process's tenant.
        return Access(routing or {}, lambda request: request, verify, None)
    known = (routing_headers() or {}) if routing is None else routing
    headers, plugin = _of_plugins(uri)
    headers = _usable(headers)
    if routing is not None and asked:  # Its other headers describe this process.
        headers = {
            key: text for key, text in headers.items() if key in _changing or _is_secret(key, text)
        }
    certificate = environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    authorise = _authorise(_authorization(uri), plugin)
    return Access({**headers, **known}, authorise, verify, certificate, plugin is not None)


def _usable(headers: Mapping[Any, Any]) -> dict[str, str]:
    """The headers, if a request can have them. Those without a value are left out."""
    from requests.utils import check_header_validity

    found: dict[str, str] = {}
    for pair in headers.items():
        name, text = (one.decode("latin-1") if isinstance(one, bytes) else one for one in pair)
        if text is None:
            continue
        try:
            check_header_validity((name, text))
            text.encode("latin-1")
        except ValueError:
            shown = MARKER if _is_secret(str(name), "") else redact_text(repr(text)[:100])
            raise Hopeless(
                f"the header {name!r} of a plugin of MLflow's has the value {shown}, of type "
                f"{type(text).__name__}: it must be a text of one line, in Latin-1"
            ) from None
        found[name] = text
    return found


def _of_plugins(uri: str) -> tuple[Mapping[str, str], Callable[[Any], Any] | None]:
    """Headers and authentication of MLflow's plugins, if there are some."""
    if not _asks_mlflow():
        return {}, None
    with importing():
        from qitos_mlflow.mlflow_plugin.server.mlflow_client import plugin_access

    return plugin_access(uri)


def _authorise(authorization: str | None, plugin: Any) -> Callable[[Any], Any] | None:
    if isinstance(plugin, tuple):  # User and password, which requests takes, too.
        from requests.auth import HTTPBasicAuth

        plugin = HTTPBasicAuth(*plugin)
    if not (plugin is None or callable(plugin)):
        kind = type(plugin).__name__
        raise Hopeless(f"MLflow's plugin for authentication gives a {kind}, which is no function")

    def authorise(request: Any) -> Any:
        if authorization is not None:
            request.headers["Authorization"] = authorization
        if plugin is None:
            return request
        try:
            made = plugin(request)
        except Exception as error:  # Its text may hold a secret.
            raise RetryLater(f"{type(error).__name__} in MLflow's plugin for requests") from error
        if not isinstance(made, type(request)):
            kind = type(made).__name__
            raise Hopeless(f"MLflow's plugin for requests must return the request, not a {kind}")
        made.headers.update(_usable(made.headers))
        return made

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
        return any(not found.value.startswith("mlflow.") for found in entry_points(PLUGINS))


def routing_headers() -> dict[str, str] | None:
    """The headers by which a server tells tenants apart, as they are now on this thread.

    MLflow's workspace; and if its client has loaded plugins, what these add to its requests,
    without credentials and without what is another one each time. None: a plugin has failed, so it
    is not known. Takes as long as the plugins do. Never raises and imports nothing.
    """
    found: dict[str, str] = {}
    context: Any = imported("mlflow.utils.workspace_context")
    workspace = (context and context.get_request_workspace()) or ""
    if workspace := workspace or os.environ.get("MLFLOW_WORKSPACE", "").strip():
        found[WORKSPACE] = workspace
    registry: Any = imported(REGISTRY)
    providers = [
        one
        for one in getattr(registry, "_request_header_provider_registry", ())
        if not type(one).__module__.startswith("mlflow.")
    ]
    if not providers:
        return found
    try:
        said = _said_by(providers)
        if new := said.items() - _tenants:
            again = _said_by(providers)
            changed = {key for key, text in new if again.get(key) != text}
            _changing.update(key for key in changed if _last_word(key) not in TENANT_WORDS)
            _tenants.update(pair for pair in new if pair[0] not in _changing)
    except BaseException as error:  # noqa: BLE001 - a plugin of the user's
        contain("server.routing_headers", error)
        return None
    return {**found, **{key: text for key, text in said.items() if key not in _changing}}


_tenants: set[tuple[str, str]] = set()
"""Headers of plugins that were twice the same."""
_changing: set[str] = set()
"""The names of others, such as a request's id: they say nothing of whose data it is."""


def _said_by(providers: Sequence[Any]) -> dict[str, str]:
    """The headers of plugins, without credentials."""
    found: dict[str, Any] = {}
    for provider in providers:
        began = time.monotonic()
        found.update(provider.request_headers() if provider.in_context() else {})
        if (took_s := time.monotonic() - began) > SLOW_S:
            name = type(provider).__qualname__
            text = "MLflow's plugin %s took %.1f s: the start of each trace waits for it"
            warn(f"server.slow {name}", text, name, took_s)
    texts = {str(key): str(text) for key, text in found.items()}
    return {key: text for key, text in texts.items() if not _is_secret(key, text)}


def _is_secret(name: str, text: str) -> bool:
    """Whether a header holds a credential. One that ends in a tenant's word names a tenant."""
    last = _last_word(name)
    named = last in SECRET_WORDS or (last not in TENANT_WORDS and names_credential(name))
    return named or redact_text(text) != text


def _last_word(name: str) -> str:
    return name.lower().replace("_", "-").rpartition("-")[2]
