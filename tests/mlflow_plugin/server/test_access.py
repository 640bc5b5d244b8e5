"""Servers are reached as MLflow's own client reaches them, and only the right ones."""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import trustme
from mlflow.tracking.request_header import registry
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from urllib3.exceptions import InsecureRequestWarning

from qitos_mlflow import _guard
from qitos_mlflow.delivery import Hopeless, RetryLater
from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header
from qitos_mlflow.mlflow_plugin.mapping.entities import RunData, RunRef
from qitos_mlflow.mlflow_plugin.server import access, http
from qitos_mlflow.mlflow_plugin.server.access import (
    RENEW_S,
    WORKSPACE,
    read_access,
    routing_headers,
)
from qitos_mlflow.mlflow_plugin.server.http import Request, SessionRequester
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import PutOff
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink, open_transport
from tests.fakes.clock import Clock
from tests.fakes.https import RecordingServer, recording_server
from tests.mlflow_plugin.records import Records

SECRET = "s3cr3t-of-a-user"
QUESTION = Request("GET", "/version", 5.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without MLflow's credentials file, and no credentials in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if name.startswith("MLFLOW_TRACKING") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with recording_server() as server:
        yield server


def set_up(home: Path, monkeypatch: pytest.MonkeyPatch, given: Mapping[str, str]) -> None:
    """Variables by their names' last part, and ``file``: the content of the credentials file."""
    for name, text in given.items():
        if name == "file":
            (home / ".mlflow").mkdir()
            (home / ".mlflow" / "credentials").write_text(text, "utf-8")
        else:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", text)


def file(user: str, password: str) -> str:
    """MLflow's credentials file."""
    return f"[mlflow]\nmlflow_tracking_username = {user}\nmlflow_tracking_password = {password}\n"


def decoded(header: str | None) -> str | None:
    """User and password of a header."""
    return header and base64.b64decode(header.removeprefix("Basic ")).decode()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"USERNAME": "u", "PASSWORD": "p"},
        {"USERNAME": "ü", "PASSWORD": "пароль€"},
        {"TOKEN": "t"},
        {"USERNAME": "u", "PASSWORD": "p", "TOKEN": "stale"},
        {"USERNAME": "u", "TOKEN": "t"},
        {"USERNAME": "", "PASSWORD": "", "file": file("u", "p")},
        {"USERNAME": "mine", "PASSWORD": "", "file": file("u", "p")},
        {"file": file("u", "pä"), "TOKEN": "t"},
        {"file": file("u", "50%% off")},
        {"file": "[other]\na = b\n", "TOKEN": "t"},
        {"TOKEN": ""},
    ],
)
def test_the_same_credentials_as_mlflows_client_sends(
    server: RecordingServer,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: Mapping[str, str],
) -> None:
    """Whatever is set, and beside what: asked of MLflow itself."""
    set_up(home, monkeypatch, given)
    http_request(get_default_host_creds(server.uri), "/version", "GET", max_retries=0)
    with SessionRequester(server.uri) as send:
        send(QUESTION)
    theirs, ours = (head.get("authorization") for head in server.heads)
    assert ours == theirs


@pytest.mark.parametrize(
    ("uri", "sent"),
    [("user:pass@", "user:pass"), ("%C3%BC:%E2%82%AC%40@", "ü:€@"), ("user@", "user:")],
)
def test_the_uris_own_user_comes_first(
    server: RecordingServer, monkeypatch: pytest.MonkeyPatch, uri: str, sent: str
) -> None:
    """It is the nearest to the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "other")
    with SessionRequester(server.uri.replace("http://", f"http://{uri}")) as send:
        send(QUESTION)
    assert decoded(server.heads[0]["authorization"]) == sent


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        (file("u", f"{SECRET}%x"), f"u:{SECRET}%x"),
        (file("u", f"%({SECRET})s"), f"u:%({SECRET})s"),
        (f"mlflow_tracking_password = {SECRET}", None),
        (f"[mlflow]\n{SECRET}\n=", None),
    ],
)
def test_a_file_that_mlflow_cannot_read_shows_no_password(
    server: RecordingServer,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: str,
    sent: str | None,
) -> None:
    """Its password is used if it can be found; a log line has neither it nor a part of it."""
    monkeypatch.setattr(_guard, "_last_logged", {})
    set_up(home, monkeypatch, {"file": content})
    with SessionRequester(server.uri) as send:
        send(QUESTION)
    assert decoded(server.heads[0].get("authorization")) == sent
    assert SECRET not in caplog.text
    assert ("credentials cannot be read" in caplog.text) is (sent is None)


@pytest.mark.parametrize("refusal", [401, 403])
def test_a_renewed_token_is_used_after_a_refusal(
    server: RecordingServer, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """And not before: its old one may still be good."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "old")
    with SessionRequester(server.uri) as send:
        send(QUESTION)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "new")
        server.status = refusal
        send(QUESTION)
        send(QUESTION)
    assert [head["authorization"] for head in server.heads] == ["Bearer old"] * 2 + ["Bearer new"]


def test_credentials_are_read_again_each_minute(
    server: RecordingServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file, too; a server may take an old token for long."""
    clock = Clock()
    monkeypatch.setattr(http, "time", clock)
    set_up(home, monkeypatch, {"file": file("u", "old")})
    with SessionRequester(server.uri) as send:
        for seconds in (0.0, RENEW_S / 2, RENEW_S / 2 + 1):
            clock.now += seconds
            send(QUESTION)
            (home / ".mlflow" / "credentials").write_text(file("u", "new"))
    sent = [decoded(head["authorization"]) for head in server.heads]
    assert sent == ["u:old", "u:old", "u:new"]


# -- TLS ---------------------------------------------------------------------------------------


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_server(authority: trustme.CA) -> Iterator[RecordingServer]:
    """A server that a private authority vouches for, and that takes clients of its only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    with recording_server(context) as server:
        yield server


@pytest.mark.parametrize("elsewhere", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", ""])
@pytest.mark.parametrize("way", ["SERVER_CERT_PATH", "INSECURE_TLS"])
def test_mlflows_variables_for_tls_come_before_those_of_requests(
    tls_server: RecordingServer,
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    elsewhere: str,
) -> None:
    """A bundle of other authorities in the environment is for other requests."""
    other, ours = tmp_path / "other.pem", tmp_path / "ours.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    authority.cert_pem.write_to_path(str(ours))
    if elsewhere:
        monkeypatch.setenv(elsewhere, str(other))
    with SessionRequester(tls_server.uri) as send, pytest.raises(requests.exceptions.SSLError):
        send(QUESTION)
    monkeypatch.setenv(f"MLFLOW_TRACKING_{way}", str(ours) if "CERT" in way else "true")
    with SessionRequester(tls_server.uri) as send, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert send(QUESTION).ok


@pytest.mark.parametrize("action", ["error", "always"])
def test_a_server_that_need_not_be_verified_gets_requests(
    tls_server: RecordingServer, monkeypatch: pytest.MonkeyPatch, action: Any
) -> None:
    """Also in a program that has urllib3's warning raised; in others it is still given."""
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    with SessionRequester(tls_server.uri) as send, warnings.catch_warnings(record=True) as given:
        warnings.simplefilter(action)
        assert [send(QUESTION).ok for _ in range(2)] == [True, True]  # On a new connection, an old.
    warned = {one.category for one in given}
    assert warned == (set() if action == "error" else {InsecureRequestWarning})


def test_a_clients_certificate_is_sent(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a server that asks for one. It is a credential: one that is not trusted gets none."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.configure_trust(tls)
    tls.verify_mode = ssl.CERT_REQUIRED
    ours, client = tmp_path / "ours.pem", tmp_path / "client.pem"
    authority.cert_pem.write_to_path(str(ours))
    authority.issue_cert("someone@example.org").private_key_and_cert_chain_pem.write_to_path(
        str(client)
    )
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(ours))
    monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(client))
    with recording_server(tls) as server:
        with SessionRequester(server.uri) as send:
            assert send(QUESTION).ok
        with SessionRequester(server.uri, trusted=False) as send, pytest.raises(OSError):
            send(QUESTION)
        assert len(server.heads) == 1


# -- whose data it is --------------------------------------------------------------------------


def test_a_server_that_is_not_trusted_gets_no_credentials(
    server: RecordingServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the environment's, none of the file's."""
    given = {"USERNAME": "u", "PASSWORD": SECRET, "TOKEN": SECRET, "file": file("u", SECRET)}
    set_up(home, monkeypatch, given)
    with SessionRequester(server.uri, {WORKSPACE: "team-a"}, trusted=False) as send:
        send(QUESTION)
    assert SECRET not in str(server.heads)
    assert "authorization" not in server.heads[0]
    assert server.heads[0]["x-mlflow-workspace"] == "team-a"


def test_not_even_those_of_netrc(
    server: RecordingServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ``default`` is for any server, also for one that a segment names."""
    (home / ".netrc").write_text(f"default login u password {SECRET}\n")
    (home / ".netrc").chmod(0o600)
    server.moved["/version"] = "/elsewhere"
    for trusted in (False, True):
        with SessionRequester(server.uri, {}, trusted=trusted) as send:
            send(QUESTION)
    assert server.paths == ["/version", "/elsewhere"] * 2
    assert ["authorization" in head for head in server.heads] == [False, False, True, True]


@pytest.mark.parametrize("trusted", [False, True])
def test_nothing_follows_a_redirect_to_another_server(
    server: RecordingServer, home: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool
) -> None:
    """Neither records nor credentials are for that one; the reason names it."""
    (home / ".netrc").write_text(f"default login u password {SECRET}\n")
    (home / ".netrc").chmod(0o600)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with recording_server() as other:
        path = "/api/2.0/mlflow/runs/log-batch"
        server.moved[path] = f"{other.uri}{path}"
        transport = open_transport(server.uri, None, {"X-Tenant": "acme"}, trusted=trusted)
        with pytest.raises(RetryLater, match=f"HTTP 307: the server moved to {other.uri}"):
            transport.log_batch("r", RunData(), 5.0)
        transport.close()
        assert other.paths == []


def test_files_go_nowhere_that_an_untrusted_server_names(server: RecordingServer) -> None:
    """MLflow would use all the credentials that the process has; the reason names the next step."""
    run = RunRef("r", "0", "n", f"{server.uri}/elsewhere", 0)
    transport = RestTransport("http://named-by-a-segment", trusted=False, files=False)
    with pytest.raises(PutOff, match="MLFLOW_TRACKING_URI=http://named-by-a-segment"):
        transport.write_artifact(run, "a.txt", b"a", 1.0)
    assert server.heads == []


class Provider:
    """A plugin of the user's that adds headers."""

    def __init__(self, **headers: Any) -> None:
        self.headers = headers
        self.asked = 0

    def in_context(self) -> bool:
        return True

    def request_headers(self) -> dict[str, Any]:
        self.asked += 1
        return {name.replace("_", "-"): value() for name, value in self.headers.items()}


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Callable[[Provider], None]:
    """Have MLflow know one plugin."""
    monkeypatch.setattr(access, "_tenants", set())
    monkeypatch.setattr(access, "_changing", set())
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)

    def provide(provider: Provider) -> None:
        monkeypatch.setattr(registry, "_request_header_provider_registry", [provider])

    return provide


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("X_Tenant", "acme", True),
        ("X_Auth_Tenant", "acme", True),
        ("X_Auth_Request_User", "u@example.org", True),
        ("X_Team", "a", True),
        ("X_Identity", JWT, False),
        ("X_Functions_Key", "opaque", False),
        ("X_Signature", "opaque", False),
        ("Authorization", "Bearer x", False),
        ("Cookie", "a=b", False),
    ],
)
def test_a_header_routes_or_is_a_secret(
    provide: Callable[[Provider], None], name: str, value: str, stored: bool
) -> None:
    """What routes is stored as it is; a secret is not, in no form."""
    provide(Provider(**{name: lambda: value}))
    to = Destination.of("http://host")
    assert to.headers == (((name.replace("_", "-"), value),) if stored else ())
    header = orjson.loads(segment_header(to))["headers"]
    assert header == dict(to.headers)


def test_a_slow_plugin_is_asked_at_each_start(
    provide: Callable[[Provider], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An answer of another moment could be another tenant's. A warning names the plugin."""
    clock, tenants = Clock(), iter(("a", "a", "b", "b", "a"))
    monkeypatch.setattr(access, "time", clock)

    def slow() -> str:
        clock.now += 1.0
        return next(tenants)

    provide(Provider(X_Tenant=slow))
    assert [routing_headers() for _ in range(3)] == [{"X-Tenant": one} for one in "aba"]
    assert "Provider took 1.0 s: the start of each trace waits for it" in caplog.text


@pytest.mark.parametrize("name", ["X_Tenant", "X_Acme_Department", "Host"])
def test_any_number_of_tenants_is_told_apart(
    provide: Callable[[Provider], None], name: str
) -> None:
    """Each has a destination of its own, also the thousandth."""
    tenant = "0"
    provide(Provider(**{name: lambda: tenant}))
    found = []
    for tenant in map(str, range(1000)):  # noqa: B007 - the plugin has it.
        found.append(Destination.of("http://host"))
    headers = [(name.replace("_", "-"), f"{number}") for number in range(1000)]
    assert [to.headers for to in found] == [(header,) for header in headers]


def test_a_header_that_always_changes_is_no_tenant(
    provide: Callable[[Provider], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the id of a request: each trace would have a destination of its own."""
    numbers = count()
    provide(Provider(X_Request_Id=lambda: str(next(numbers)), X_Tenant=lambda: "acme"))
    found = [Destination.of("http://host") for _ in range(100)]
    assert {to.headers for to in found} == {(("X-Tenant", "acme"),)}
    monkeypatch.setattr(access, "has_plugins", lambda: True)
    # A request has it nevertheless, as one of MLflow's own client has.
    sent = read_access("http://host", dict(found[0].headers or ()), trusted=True).headers
    assert {*sent} >= {"X-Tenant", "X-Request-Id"}


def test_a_plugin_that_fails_leaves_the_tenant_unknown(
    provide: Callable[[Provider], None], swallowed: list[tuple[str, BaseException]]
) -> None:
    """It is not taken for the default one; the deliverer's own plugin is asked again."""
    provide(Provider(X_Tenant=lambda: 1 / 0))
    to = Destination.of("http://host")
    assert to.headers is None
    assert orjson.loads(segment_header(to))["headers"] is None
    assert swallowed.pop()[0] == "server.routing_headers"


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a package whose plugins add headers to MLflow's requests."""
    where = tmp_path / "site"
    meta = where / "mlflow_tenants-1.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow-tenants\nVersion: 1\n")
    (meta / "entry_points.txt").write_text(
        "[mlflow.request_header_provider]\ntenants = mlflow_tenants:Headers\n"
        "[mlflow.request_auth_provider]\ntenants = mlflow_tenants:Auth\n"
    )
    (where / "mlflow_tenants.py").write_text(
        "import os\n"
        "from mlflow.tracking.request_header.abstract_request_header_provider import (\n"
        "    RequestHeaderProvider)\n"
        "from mlflow.tracking.request_auth.abstract_request_auth_provider import (\n"
        "    RequestAuthProvider)\n"
        "class Headers(RequestHeaderProvider):\n"
        "    def in_context(self): return 'TENANT' in os.environ\n"
        "    def request_headers(self):\n"
        f"        return {{'X-Tenant': os.environ['TENANT'], 'X-Api-Key': '{SECRET}'}}\n"
        "class Auth(RequestAuthProvider):\n"
        "    def get_name(self): return 'tenants'\n"
        "    def get_auth(self):\n"
        "        def sign(request):\n"
        "            if 'BROKEN' in os.environ: raise RuntimeError(os.environ['BROKEN'])\n"
        "            request.headers['X-Signed'] = str(len(request.body or b''))\n"
        "            return request\n"
        "        return sign\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(where), prepend=os.pathsep)
    return where


SCRIPT = """
import json, os, sys
from qitos_mlflow.mlflow_plugin.destination import Destination, MlflowPipeline, segment_header
from qitos_mlflow.mlflow_plugin.sink.sink import open_transport
from qitos_mlflow.settings import Settings
{before}
to = Destination.of(sys.argv[1])
pipeline = MlflowPipeline(to, to, Settings.resolve())
header = json.loads(pipeline.header)
if {before!r}:
    os.environ["TENANT"] = "someone-else"
transport = open_transport(
    sys.argv[1], None, header["headers"], asked=header["asked"], trusted=bool({trusted}))
from qitos_mlflow.mlflow_plugin.server.http import Request
transport._send(Request("POST", "/x", 5.0, b"12345" * 20_000, answer="experiment"))
print(pipeline.open_leftovers(pipeline.header) is not None, json.dumps(header["headers"]))
"""


@pytest.mark.parametrize(
    ("before", "trusted"),
    [("", 0), ("", 1), ("import mlflow.tracking.request_header.registry", 0)],
)
def test_what_mlflows_plugins_send_travels_with_the_records(
    server: RecordingServer, plugins: Path, before: str, trusted: int
) -> None:
    """Routing is that of the recording process, without its secrets; they are not on the disk.

    Before MLflow's client has made a call, no plugin can be asked. Then the process that delivers
    asks it, and leaves alone what others have recorded so.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before, trusted=trusted), server.uri],
        env={**os.environ, "TENANT": "ours", "MLFLOW_TRACKING_AUTH": "tenants"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    stored = '{"X-Tenant": "ours"}' if before else "{}"
    assert done.stdout == f"{bool(before)} {stored}\n"
    [head] = server.heads
    assert head.get("x-tenant") == ("ours" if before or trusted else None)
    assert head.get("x-api-key") == (SECRET if trusted else None)
    assert head.get("x-signed") == ("100000" if trusted else None)


def test_a_plugin_that_breaks_is_a_reason_to_wait(
    monkeypatch: pytest.MonkeyPatch, server: RecordingServer
) -> None:
    """Its text may hold a secret."""

    def sign(request: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(access, "_of_plugins", lambda uri: ({}, sign))
    with pytest.raises(RetryLater, match="RuntimeError") as later:
        RestTransport(server.uri).experiment_id("name", 1.0)
    assert SECRET not in str(later.value)
    assert server.heads == []


@pytest.mark.parametrize("routing", [None, {}])
@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("X-Team", 5, "value 5, of type int"),
        ("X-Team", ["a"], "value ['a'], of type list"),
        ("X-Team", "a\r\nX-Other: b", "X-Other: b', of type str"),
        ("X-Team", " a", "value ' a', of type str"),
        ("X-Team", "\u20ac", "of type str"),
        ("X-Token", [SECRET], "value [redacted], of type list"),
        (7, "a", "the header 7 of a plugin"),
    ],
)
def test_a_plugin_whose_header_is_none_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
    server: RecordingServer,
    name: Any,
    value: Any,
    shown: str,
    routing: dict[str, str] | None,
) -> None:
    """No patience helps; the reason has the value, unless that is a secret."""
    monkeypatch.setattr(access, "_of_plugins", lambda uri: ({name: value}, None))
    with pytest.raises(Hopeless) as never:
        open_transport(server.uri, None, routing).experiment_id("name", 1.0)
    assert shown in str(never.value)
    assert SECRET not in str(never.value)
    assert server.heads == []


def test_a_segments_headers_are_no_others(server: RecordingServer) -> None:
    """A header with a line of its own would add another one."""
    with pytest.raises(Hopeless, match="X-Team"):
        transport = open_transport(server.uri, None, {"X-Team": "a\nb"}, trusted=False)
        transport.experiment_id("name", 1.0)


@pytest.mark.parametrize(
    ("sign", "said"),
    [
        ("token", "gives a str"),
        (lambda request: None, "not a NoneType"),
        (lambda request: request.headers.update(Other=5) or request, "'Other'"),
    ],
)
def test_a_plugin_that_signs_with_something_else_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, server: RecordingServer, sign: Any, said: str
) -> None:
    """Such as one that gives a token in the place of a function."""
    monkeypatch.setattr(access, "_of_plugins", lambda uri: ({}, sign))
    with pytest.raises(Hopeless, match=said):
        RestTransport(server.uri).experiment_id("name", 1.0)
    assert server.heads == []


def test_what_requests_takes_of_a_plugin_is_sent(
    monkeypatch: pytest.MonkeyPatch, server: RecordingServer
) -> None:
    """Bytes, no value, and a user with a password."""
    given = {"X-Bytes": b"b", "X-None": None}
    monkeypatch.setattr(access, "_of_plugins", lambda uri: (given, ("user", "password")))
    RestTransport(server.uri).experiment_id("name", 5.0)
    assert server.heads[0]["x-bytes"] == "b"
    assert "x-none" not in server.heads[0]
    assert decoded(server.heads[0]["authorization"]) == "user:password"


def test_the_workspace_is_that_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow.set_workspace` holds for the thread that calls it, the variable for all others."""
    context = pytest.importorskip("mlflow.utils.workspace_context")
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    assert routing_headers() == {}
    monkeypatch.setenv("MLFLOW_WORKSPACE", " team-a ")
    assert routing_headers() == {WORKSPACE: "team-a"}
    with context.WorkspaceContext("team-b"):
        assert routing_headers() == {WORKSPACE: "team-b"}
    assert routing_headers() == {WORKSPACE: "team-a"}


def test_a_programs_opentelemetry_does_not_see_our_requests(server: RecordingServer) -> None:
    """They are no part of its traces, and carry none of its headers."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.requests")
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    processor = pytest.importorskip("opentelemetry.sdk.trace.export").SimpleSpanProcessor
    exporter = export.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(processor(exporter))
    instrumentor = instrumentation.RequestsInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        sink = MlflowSink(orjson.dumps({"tracking_uri": server.uri, "headers": {}}))
        sink.prepare([orjson.dumps(Records("trace-1").start("trace-1"))])
        with pytest.raises(RetryLater):  # It answers with no run.
            sink.send(5.0)
        sink.close()
        assert server.heads
        assert exporter.get_finished_spans() == ()
        assert all("traceparent" not in head for head in server.heads)
        requests.get(server.uri, timeout=5)  # The program's own.
        assert len(exporter.get_finished_spans()) == 1
        assert "traceparent" in server.heads[-1]
    finally:
        instrumentor.uninstrument()
