"""No credential passes `redact`, and everything else passes unchanged."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import uuid
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.redact import (
    MARKER,
    redact,
    redact_json,
    redact_text,
    without_credentials,
)

SECRET = "hunter2xyz9"


def words(text: str) -> list[str]:
    """The words of a text, to keep long lists readable."""
    return text.split()


CREDENTIAL_KEYS = words(
    """
    api_key apikey apiKey APIKey API_KEY x-api-key X-Api-Key openai_api_key OPENAI_API_KEY api_keys
    api_key_2 api-key authorization Authorization proxy-authorization Proxy-Authorization token
    Token TOKEN access_token accessToken refresh_token refreshToken id_token idToken auth_token
    bearer_token GITHUB_TOKEN HF_TOKEN slackBotToken session_token csrf-token secret SECRET
    client_secret clientSecret aws_secret_access_key AWS_SECRET_ACCESS_KEY awsSecretAccessKey
    aws_access_key_id secrets password Password PASSWORD db_password dbPassword passwd pwd
    PGPASSWORD passphrase private_key privateKey ssh_key credential credentials Credentials creds
    cookie Cookie cookies set-cookie Set-Cookie session_key connection_string connectionString dsn
    ConnectionString
    SENTRY_DSN DB_PASS smtp_pass basic_auth jwt signing_key encryption-key account.key
    webhook_secret
    aPi_kEy accesstoken CLIENTSECRET account_key subscription-key
"""
)

INNOCENT_KEYS = words(
    """
    prompt_tokens completion_tokens total_tokens max_tokens maxTokens token_usage tokenUsage tokens
    token_count promptTokenCount totalTokenCount cached_tokens input_tokens max_new_tokens n_tokens
    tokens_per_second token_type token_ids tokenizer tokenizer_name eos_token pad_token stop_token
    next_page_token secretary key keys primary_key foreign_key sort_key cache_key key_name keyboard
    monkey author authority password_policy password_reset_url token_limit api_key_name api_key_env
    compass passed pass_rate passing bypass model name tool_name session_id span_id user cookbook
    credit credits description total_token_cost auth_method auth_error auth_failed password_correct
    credentials_found cookies_accepted NoCredentialsError secret_missing
"""
)


@pytest.mark.parametrize("key", CREDENTIAL_KEYS)
@pytest.mark.parametrize("value", [SECRET, 12345678901, {"a": [SECRET]}, [SECRET], None, True])
def test_credential_keys_lose_their_value(key: str, value: Any) -> None:
    """A key that names a credential has the marker for a value, whatever the value was."""
    nested = {"a": [{"b": {key: value}}]}
    assert redact(nested) == {"a": [{"b": {key: MARKER}}]}


@pytest.mark.parametrize("key", INNOCENT_KEYS)
def test_innocent_keys_keep_their_value(key: str) -> None:
    """Token counts, and names that only sound like credentials, are left alone."""
    assert not names_credential(key)
    assert redact({key: 5, "x": {key: "plain"}}) == {key: 5, "x": {key: "plain"}}


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
SHAPES = [
    "sk-proj-abcDEF0123456789abcDEF",
    "sk-ant-api03-abcDEF0123456789",
    "sk-or-v1-0123456789abcdef0123",
    "sk_" + "live_0123456789abcdefABCDEF",
    "ghp_0123456789abcdefABCDEF0123456789abcd",
    "gho_0123456789abcdefABCDEF0123456789abcd",
    "github_pat_11ABCDEFG0123456789_abcdef",
    "xoxb-" + "123456789012-123456789012-abcdefABCDEF",
    "xoxp-" + "123456789012-abcdef",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "AIzaSyA0123456789abcdefABCDEF012345678",
    "hf_abcdefABCDEF0123456789abcdefABCDEF",
    "glpat-abcDEF0123456789abcd",
    "gsk_abcdefABCDEF0123456789",
    "ya29." + "a0AfH6SMBabcdefABCDEF-0123_456",
    "SG." + "abcdefABCDEF01234567.abcdefABCDEF0123456789-_x",
    "tvly-abcdefABCDEF0123456789",
    "npm_abcdefABCDEF0123456789",
    "rk_" + "live_0123456789abcdefABCDEF",
    "pplx-abcdefABCDEF0123456789",
    JWT,
]


AROUND = ["{}", "use {} please", "x={}", "'{}'", '{{"v": "{}"}}', "https://h/p?q={}&r=1",
     "(see {}, ok)",
     "https://h/{}/x", "größe {}\n", "{}.", "k:{}",
     '{{"c": "x\\n{}\\ty"}}', '"{{\\"c\\": \\"x\\\\n{}\\\\n\\"}}"', "\x1b[32m{}\x1b[0m",
     "\\u001b[0m{}", "q%3D{}", "\\uff1a{}", "\\{}", "\\n{}"]  # fmt: skip


@pytest.mark.parametrize("secret", SHAPES)
@pytest.mark.parametrize("around", AROUND)
def test_credentials_are_known_by_their_shape(secret: str, around: str) -> None:
    """A provider's key is found in any text, whatever stands around it."""
    for value in (around.format(secret), [around.format(secret)], {around.format(secret): 1}):
        assert secret[:-2] not in orjson.dumps(redact({"value": value})).decode()


TEXTS = [
    "API_KEY={}",
    "export OPENAI_API_KEY='{}' && run",
    'PATH=/bin\nDB_PASSWORD="{}"\nHOME=/root',
    '{{"api_key": "{}", "b": 1}}',
    '{{"outer": {{"clientSecret":"{}"}}}}',
    '{{\\"password\\": \\"{}\\"}}',
    "{{'access_token': '{}'}}",
    "{{'credentials': {{'user': 'u', 'pin': '{}'}}}}",
    '"token":\n  "{}"',
    "Authorization: Bearer {}\nHost: a",
    "curl -H 'Authorization: token {}' http://a/b",
    'curl -H "x-api-key: {}" http://a/b',
    "curl -u user:{} http://a/b",
    "curl -sSu 'user:{}' http://a/b",
    "curl http://a/b \\\n  --user=user:{}",
    "Cookie: session={}; theme={}",
    "set-cookie: sid={}; Path=/",
    "Authorization=Basic {}",
    "https://user:{}@host/p?x=1",
    "postgres://admin:{}@db:5432/x",
    "redis://:{}@cache",
    "https://h/p?api_key={}&q=1",
    "https://h/p?q=1&access_token={}#frag",
    "GET /login?password={}",
    "password: {}",
    "token={}",
    "secret => {}",
    "db.password = {}",
    "--password {} --verbose",
    "--api-key={}",
    "tool --access-token '{}'",
    "Server=x;Uid=u;Pwd={};Database=z",
    "AccountName=n;AccountKey={}==;EndpointSuffix=s",
    "<password>{}</password>",
    "connect(password='{}', host='h')",
    "os.environ['SECRET_KEY'] = '{}'",
    "password: str = '{}'",
    "secrets = ['{}']",
    "token%3D{}",
    '{{"content": "line\\ntoken={}\\n"}}',
    "Message(content='line\\n\\tsecret: {}')",
    '{{"c": "{{\\"d\\": \\"x\\\\nauth={}\\"}}"}}',
    "\x1b[1;32mtoken={}\x1b[0m",
    "\x1b[01;31m\x1b[Ktoken={}\x1b[m",
    "C:\\token={}",
    "API key: {}",
    "your secret key = {}",
    '{{"Private key": "{}"}}',
    "**Password:** {}",
    "password=f'{}'",
    "requests.get(u, auth=('bob', '{}'))",
    "auth=HTTPBasicAuth(user, '{}')",
    "{{'auth': ('bob', '{}'), 'x': 1}}",
    "https://a.blob.core.windows.net/c?sv=2020&sig={}%2Babcdef%3D",
    "https://s3/x?X-Amz-Date=1&X-Amz-Signature={}abcdef0123456789&y=1",
    "<a href='https://h/x?a=b&amp;Signature={}abcdef'>",
    "https://hooks.slack.com/services/T00000000/B00000000/{}abcdefghijkl",
    "https://api.telegram.org/bot123456789:{}abcdefghijklmnopqrstuvwx/sendMessage",
    "cd x;mysql_pass={}",
    "h%3Fa%3D1%26token%3D{}",
    "h%3Ftoken%3D{}",
    '{{"c": "line\\n--token {} --x"}}',
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE{}\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\\nMIIE{}\\n-----END PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----\n{}",
    "Bearer {}",
    # Reprs of numpy 2 and others: the name or the value is a call around a text.
    "{{np.str_('password'): '{}'}}",
    "{{'a': 1, np.str_('password'): np.str_('{}')}}",
    "{{\\'a\\': 1, np.str_(\\'password\\'): \\'{}\\'}}",
    "[(np.str_('api_key'), np.str_('{}')), (np.str_('a'), np.str_('b'))]",
    "[np.str_('user'), ('api_key', np.str_('{}'))]",
    "{{np.bytes_(b'password'): np.bytes_(b'{}')}}",
    "{{'name': np.str_('api_key'), 'value': np.str_('{}')}}",
    "Config(password=np.str_('{}'), port=1)",
    "{{'token': bytearray(b'{}')}}",
    "{{'secret': SecretBytes(b'{}'), 'password': SecretStr('{}')}}",
    "{{'password': Secret(value='{}')}}",
    'Login {{ password: Some("{}"), retries: 3 }}',
    "{{<Field.PASSWORD: 'password'>: '{}'}}",
    "{{b'password': b'{}'}}",
    "OrderedDict([('user', 'ann'), ('password', '{}')])",
    "defaultdict(<class 'str'>, {{'password': '{}'}})",
]


@pytest.mark.parametrize("text", TEXTS)
def test_credentials_are_known_by_the_name_beside_them(text: str) -> None:
    """Environment dumps, headers, JSON inside strings, URLs, command lines: the value goes."""
    assert SECRET not in redact_text(text.format(SECRET, SECRET))
    assert SECRET not in orjson.dumps(redact({"a": [{"b": text.format(SECRET, SECRET)}]})).decode()


def test_what_is_around_a_credential_stays() -> None:
    """Only the credential goes, so that the text can still be read."""
    assert redact_text("a=1 API_KEY=abc123 b=2") == f"a=1 API_KEY={MARKER} b=2"
    assert redact_text("https://u:p@host/x") == f"https://{MARKER}@host/x"
    assert redact_text('{"token": "a\\"b", "c": 1}') == f'{{"token": "{MARKER}", "c": 1}}'
    assert redact_text("Basic dXNlcjpwYXNzd29yZA== rest") == f"Basic {MARKER} rest"
    hidden = f"{{np.str_('password'): np.str_('{MARKER}'), 'a': np.str_('b')}}"
    assert redact_text(hidden.replace(MARKER, SECRET)) == hidden
    assert redact_text("{'pin': np.int64(48151), 'a': 1}") == f"{{'pin': '{MARKER}', 'a': 1}}"
    assert redact_text("a%26token%3Dhunter&x") == f"a%26token%3D{MARKER}&x"
    assert redact_text("Cookie: a=b \r\nHost: h") == f"Cookie: {MARKER} \r\nHost: h"


@pytest.mark.parametrize(
    "value", [{}, {"a": ["b", {"c": 1}]}, [], ["x"], 0, 7, -1.5e-7, float("nan"), "x", None, True]
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_in_a_text_stays_json(value: Any, indent: int | None) -> None:
    """A number, list or object is replaced by valid JSON, and everything beside it stays."""
    document = {"a": {"cookies": value}, "list": [{"token": value}], "status": 200}
    text = json.dumps(document, indent=indent)
    hidden = json.loads(redact_text(text))
    assert hidden["status"] == 200
    unchanged = (MARKER, None, True, {}, [])
    assert hidden["a"]["cookies"] in unchanged
    assert hidden["list"][0]["token"] in unchanged
    assert json.loads(json.loads(redact_text(json.dumps(text)))) == hidden
    assert redact_text("{'cookies': {'a': 1}, 'b': 2}") == f"{{'cookies': '{MARKER}', 'b': 2}}"


def test_a_json_document_is_redacted_by_its_structure() -> None:
    """Named values, pairs and texts are hidden in any escaping; the document keeps its form."""
    document = {
        "headers": [{"name": "Cookie", "value": "a"}],
        "text": f"x\ntoken={SECRET}",
        "pin": {},
    }
    hidden = {
        "headers": [{"name": "Cookie", "value": MARKER}],
        "text": f"x\ntoken={MARKER}",
        "pin": {},
    }
    assert json.loads(redact_json(json.dumps(document))) == hidden
    assert redact_json(json.dumps(hidden, indent=2)) == json.dumps(hidden, indent=2)
    assert SECRET not in redact_json(f'{{"a": "token={SECRET}", "a": 1}}')  # A key twice.
    deep, deeper = ('{"a":' * depth + f'"token={SECRET}"' + "}" * depth for depth in (300, 1010))
    for broken in ("", f'{{"token": "{SECRET}', f'{{"a": NaN, "token": "{SECRET}"}}', deep, deeper):
        assert SECRET not in redact_json(broken)


@pytest.mark.parametrize("form", ["{}", "{}\r", " {} \n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_around_a_credential_stays_in_json(form: str, indent: int | None) -> None:
    """Numbers of any size, letters, indents and the end of the line are as they were."""
    document = {"id": uuid.uuid4().int, "cookies": {"a": 1}, "x": [0.1, "ä"]}
    text = form.format(json.dumps(document, ensure_ascii=False, indent=indent))
    hidden = json.dumps(document | {"cookies": MARKER}, ensure_ascii=False, indent=indent)
    assert redact_json(text) == form.format(hidden)


INNOCENT_TEXTS = [
    "prompt_tokens=5 total_tokens: 12, max_tokens=100",
    'usage: {"prompt_tokens": 12, "completion_tokens": 7, "total_tokens": 19}',
    "tokenizer: gpt2, the secretary: Anna, keyboard: qwerty, author: Bob",
    "password reset instructions: see the page",
    "please reset your password at https://example.com/reset?user=1",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "123e4567-e89b-12d3-a456-426614174000",
    "https://github.com/a/b/blob/main/key.py?x=1#L3",
    "git@github.com:a/b.git ssh://git@github.com/a/b bob@example.com",
    "http://localhost:8080/path?email=a@b.com",
    "Unexpected token: identifier",
    "for key, value in table.items(): other[key] = value",
    "sorted(rows, key=lambda row: row.name); max(key=len); primary_key=True",
    "bearer of bad news; Bearer authentication is used; ring bearer approached",
    "Basic understanding of JavaScriptFrameworks",
    "def login(password: str, token: Optional[str] = None) -> None: ...",
    "api_key=os.environ['API_KEY']",
    "token=$TOKEN and password=${PASSWORD}",
    "compass: north; passed: 12, passing=3, passes: 4; monkey: 5; turkey=1",
    "task-abcdefghijklmnopqrst risk-assessment-of-things sk-learn-contrib-packages",
    "npm i @scope/pkg@1.2.3",
    "docker run -u 1000:1000 img; curl -s http://a/b; sudo -u root ls /a:b",
    "see section SG.1 and ya29.",
    "the token was accepted, the key is under the mat",
    '{"password": null, "api_key": ""}',
    "eyJust a word. ASIA and Asia. xoxo",
    "botocore.exceptions.NoCredentialsError: Unable to locate credentials",
    "google.auth.exceptions.DefaultCredentialsError: Your default credentials were not found.",
    "AuthError: denied; CookieConflictError: There are multiple cookies with name",
    "SecretNotFound: prod/db does not exist; MissingSecretError: set it first",
    "INFO:app.auth:User logged in",
    "The API key: get one at the console. primary key: id, sort key = 7",
    "Authorization: \r\ncurl -u cookie: \nwith a private key::\n\n",
    "signal=1&design=abcdefghijklmnopqr; signature: abcdefghijklmnopqr; /bot12/x /services/Text",
    "password = get('password'); {str('password'): value, _('password'): 'Word 12'}",
    "token: np.str_ = f('x1y2z3'); token = request.args.get('t0ken')",
    "if form.get('password'): 'a1b2'; x ? Text('password') : 'a1b2c3'",
    "{'token': np.str_('the'), 'password': np.str_('changeme'), 'pin': np.float64(nan)}",
    "[np.str_('password'), np.str_('city')]; [np.str_('password'), np.str_('a1'), np.str_('b2')]",
    "password = String('Password'); password: CharField('Password 2'); auth = Key('auth/v1')",
    "find(Text('password'), 'col-md-2'); {vol.Required('password'): cv.string}",
    "日本語の文章です。 password はここにありません",
]


@pytest.mark.parametrize("text", INNOCENT_TEXTS)
def test_innocent_texts_stay(text: str) -> None:
    """Prose, code, counts, hashes and addresses pass unchanged."""
    assert redact_text(text) == text


def test_pairs_and_command_lines_are_understood() -> None:
    """Headers as pairs, variables as name and value, options as words: the value goes."""
    assert redact([["Cookie", "a"], ["Host", "h"]]) == [["Cookie", MARKER], ["Host", "h"]]
    assert redact({"name": "API_KEY", "value": "x"}) == {"name": "API_KEY", "value": MARKER}
    assert redact({"token=x1y2z3": 5}) == {f"token={MARKER}": 5}
    assert redact({f"password={SECRET}": 5}) == {f"password={MARKER}": MARKER}
    assert redact([[f"token={SECRET}", "a"]]) == [[f"token={MARKER}", "a"]]
    assert redact([[f"password={SECRET}", "a"]]) == [[f"password={MARKER}", MARKER]]
    assert redact(["--token", "x", "y"]) == ["--token", MARKER, "y"]
    assert redact({"required": ["password", "user"]}) == {"required": ["password", "user"]}


def test_the_argument_is_not_changed() -> None:
    """Redaction makes a copy."""
    value = {"password": "x", "list": [{"token": "y"}], "text": "API_KEY=abcdef"}
    before = orjson.dumps(value)
    redact(value)
    assert orjson.dumps(value) == before


def test_deep_values_do_not_break_it() -> None:
    """A value deeper than any record is cut, and is no error."""
    value: Any = SECRET
    for _ in range(5_000):
        value = [value]
    assert SECRET not in str(redact(value))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=20,
)  # fmt: skip


@given(_json)
def test_any_value_passes(value: Any) -> None:
    """Every value has a result, and a second pass finds nothing more to hide."""
    once = redact(value)
    assert redact(once) == once


@given(_json)
def test_any_document_stays_a_document(value: Any) -> None:
    """JSON stays JSON, and a second pass finds nothing more to hide."""
    once = redact_json(json.dumps(value))
    assert redact(json.loads(once)) == json.loads(once)
    assert redact_json(once) == once


@given(st.text(alphabet="sk-eyJ.=:\"'\\ {[@/<>abAB12\nkeytokenpasswordBearer", max_size=200))
def test_any_text_passes(text: str) -> None:
    """A second pass finds nothing more to hide in a text of random parts of credentials."""
    once = redact_text(text)
    assert redact_text(once) == once


ADVERSARIAL = [
    *("sk-", "eyJaaaaaaaa.", "-----BEGIN RSA PRIVATE KEY-----", "key", "key=", "token:", "a_"),
    *("://a:b", "://a@", 'password="', 'password=\\"', "password=[", 'key="\\"', "passpass"),
    *(
        "cre=",
        "--token ",
        "<password>",
        "bearer aaaaaaaa ",
        "curl ",
        "curl -u a",
        "SG.a",
        "\\n",
        "\\ntoken",
        "[1;",
        " key:",
        "api key: ",
        "auth=(",
        "auth=('",
        "auth=aaaaAuth",
        "&sig=",
        "/bot1",
        "password:** ",
        "token=***,",
        "token=self.",
        "token: $(",
        "cookie: os.",
        '"token":7',
        '"token":7e,',
        '"token":{},',
        "Basic aaaaaaaaaaaaaaaa",
        "cookie: {",
        "authorization: [",
        '"name": "password", ',
        "password |\n",
        "a_sk-",
        "{np.str_('password'): ",
        "(np.str_('token'), np.str_(",
        "token=Text(Text(Text(",
        "<A.B: 'token'>",
        '"',
        " ",
        "QUJD",
    ),
]


@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_cost_grows_with_the_length_only(piece: str) -> None:
    """Four times the text costs about four times as much: nothing is read again and again."""

    def seconds(length: int) -> float:
        text = (piece * length)[:length]
        best = 1e9
        for _ in range(3):
            began = time.thread_time()
            redact_text(text)
            best = min(best, time.thread_time() - began)
        return best

    # Quadratic cost would make it 16 times.
    assert seconds(32_768) < 8 * seconds(8_192) + 0.01


def test_images_and_hashes_are_left_alone() -> None:
    """Bytes as base64, in one line or in many, are not taken for keys."""
    data = bytes(range(256)) * 200
    for text in (base64.b64encode(data).decode(), base64.encodebytes(data).decode(), data.hex()):
        assert redact_text(text) == text


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:pass@host:1/p?a=b@c", "http://host:1/p?a=b@c"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////home/a@b/x.db", "sqlite:////home/a@b/x.db"),
        ("mysql+pymysql://u:p@x@host/d", "mysql+pymysql://host/d"),
    ],
)
def test_credentials_are_left_out_of_a_destination(uri: str, shown: str) -> None:
    """User and password are left out, and nothing else."""
    assert without_credentials(uri) == shown


def test_patterns_are_compiled_when_a_text_needs_them() -> None:
    """Importing the package compiles next to none, and the agent's thread needs no others.

    What the agent's thread redacts is the address of a server or store, at the start of a trace.
    """
    code = """
import re, sys
compile, compiled = re.compile, []
def counting(pattern, flags=0):
    if sys._getframe(1).f_globals["__name__"].startswith("qitos_mlflow.redaction"):
        compiled.append(pattern)
    return compile(pattern, flags)
re.compile = counting
import qitos_mlflow.mlflow_plugin.processor
from qitos_mlflow.redaction.redact import redact_text, without_credentials
at_import = len(compiled)
without_credentials("http://user:word@localhost:5000/path")
without_credentials("sqlite:////home/ann/mlflow.db")
for_addresses = len(compiled) - at_import
for _ in range(3):
    redact_text("export API_KEY=Zk3vQ9rT1mXy8LbN")
    first, compiled = compiled, []
print(at_import, for_addresses, len(first))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(count) for count in done.stdout.split()] == [11, 0, 0]
