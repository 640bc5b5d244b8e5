"""Credentials that are known by their shape, whatever stands beside them. Pure.

A credential of a vendor begins, with few exceptions, an unbroken run of 20 or more letters, digits,
``_`` and ``-``. So one search finds the runs, and the first two letters of each one say which
patterns can match there. The cost of a text is proportional to its length.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

from qitos_mlflow.redaction.literals import is_placeholder, is_plain_word
from qitos_mlflow.redaction.patterns import lazily
from qitos_mlflow.redaction.vendors import FORMATS

_OWN = (
    # Looser than gitleaks' rules, so that a key that is cut or grows is found.
    # platform.openai.com, console.anthropic.com, …
    ("sk-", r"sk-(?:proj-|(?![a-z_-]+(?![\w-])))[\w-]{12,}"),
    ("sk_live_ sk_test_ rk_live_ rk_test_", r"[sr]k_(?:live|test)_\w{10,}"),  # docs.stripe.com
    ("whsec_", r"whsec_[A-Za-z0-9]{16,}"),  # docs.stripe.com/webhooks
    ("gho_ ghp_ ghr_ ghs_ ghu_", r"gh[oprsu]_[A-Za-z0-9]{12,}"),  # github.blog, "token formats"
    ("github_pat_", r"github_pat_\w{12,}"),  # docs.github.com
    # docs.gitlab.com
    ("glpat- glrt- gldt- glptt-", r"gl(?:pat|rt|dt|ptt)-[\w-]{10,}(?:\.\w\w\.?\w{7,9})?"),
    ("xox", r"xox[a-z]-[A-Za-z0-9-]{10,}"),  # api.slack.com
    ("xapp-", r"xapp-[A-Za-z0-9-]{10,}"),  # api.slack.com
    ("AKIA ASIA AROA AIDA", r"A(?:KI|SI|RO|ID)A[A-Z0-9]{12,}"),  # docs.aws.amazon.com/IAM
    ("AIza", r"AIza[\w-]{16,}"),  # cloud.google.com/docs/authentication/api-keys
    ("GOCSPX-", r"GOCSPX-[\w-]{20,}"),  # cloud.google.com, client secrets
    ("ya29.", r"ya29\.[\w-]{20,}"),  # developers.google.com/identity
    ("hf_ api_org_", r"(?:hf|api_org)_[A-Za-z0-9]{13,}"),  # huggingface.co/docs
    ("npm_ r8_", r"(?:npm|r8)_[A-Za-z0-9]{20,}"),  # docs.npmjs.com; replicate.com/docs
    ("pypi-", r"pypi-[\w-]{20,}"),  # pypi.org/help
    ("gsk_ xai- pplx-", r"(?:gsk_|xai-|pplx-)[A-Za-z0-9]{16,}"),  # Groq, xAI, Perplexity
    ("nvapi-", r"nvapi-[\w-]{16,}"),  # docs.nvidia.com
    ("tvly-", r"tvly-[\w-]{12,}"),  # docs.tavily.com
    ("lsv2_", r"lsv2_\w{16,}"),  # docs.smith.langchain.com
    ("dapi", r"dapi[0-9a-f]{32}"),  # docs.databricks.com
    ("eyJ", r"eyJ[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*){1,3}"),  # RFC 7519, JWT
    ("SG.", r"SG\.[\w-]{16,}\.[\w-]{16,}"),  # docs.sendgrid.com
    ("SK", r"SK[0-9a-f]{32}(?![A-Za-z0-9])"),  # twilio.com/docs
    ("ATATT3 ATCTT3", r"AT[AC]TT3[\w=-]{40,}"),  # support.atlassian.com
    ("dckr_pat_ dckr_oat_", r"dckr_[po]at_[\w-]{20,}"),  # docs.docker.com
    ("sbp_", r"sbp_[0-9a-f]{40}"),  # supabase.com/docs
    ("tskey-", r"tskey-[a-z]{2,16}-[A-Za-z0-9-]{16,}"),  # tailscale.com/kb
    ("sntrys_", r"sntrys_eyJ[\w+/=]{40,}"),  # docs.sentry.io
    ("sgp_", r"sgp_(?:[0-9a-fA-F]{16}_|local_)?[0-9a-fA-F]{40}"),  # sourcegraph.com/docs
    ("figd_", r"figd_[\w-]{32,}"),  # figma.com/developers
    ("nfp_", r"nfp_[A-Za-z0-9]{32,}"),  # docs.netlify.com
    ("pcsk_", r"pcsk_[A-Za-z0-9_]{32,}"),  # docs.pinecone.io
    ("sq0csp- sq0atp-", r"sq0(?:csp|atp)-[\w-]{22,}"),  # developer.squareup.com
    ("squ_ sqp_ sqa_", r"sq[upa]_[a-f0-9]{40}"),  # docs.sonarsource.com
    ("bkua_", r"bkua_[a-f0-9]{40}"),  # buildkite.com/docs
    ("CCIPAT_", r"CCIPAT_\w{20,}"),  # circleci.com/docs
    ("phx_", r"phx_[A-Za-z0-9]{40,}"),  # posthog.com/docs
    ("ATBB", r"ATBB[A-Za-z0-9]{28,}"),  # support.atlassian.com
    ("secret_", r"secret_[A-Za-z0-9]{43}"),  # developers.notion.com
    ("oy2", r"oy2[a-z0-9]{43}"),  # learn.microsoft.com/nuget
    ("vercel_blob_rw_", r"vercel_blob_rw_\w{30,}"),  # vercel.com/docs
    ("CFPAT-", r"CFPAT-[\w-]{40,}"),  # contentful.com/developers
    ("aio_", r"aio_[A-Za-z0-9]{28}"),  # io.adafruit.com/api
    ("hvs.", r"hvs\.[\w-]{20,}"),  # developer.hashicorp.com/vault
    (".atlasv1.", r"\.atlasv1\.[\w-]{40,}"),  # developer.hashicorp.com/terraform
)  # fmt: skip
"""How credentials begin, and the pattern; behind each, who documents it."""

RUN_OF = bytes(
    97 if chr(code).isascii() and (chr(code).isalnum() or chr(code) in "_-") else 32
    for code in range(256)
)
"""For `bytes.translate`: a blank in the place of what neither names nor most credentials have."""
_RUN = b"a" * 20


def _dispatch() -> tuple[dict[bytes, re.Pattern[bytes]], dict[bytes, re.Pattern[bytes]]]:
    """Patterns by the first two bytes of a run, and by the text before a run."""
    at_run: dict[bytes, list[str]] = {}
    before_run: dict[bytes, list[str]] = {}
    for starts, pattern in _OWN + FORMATS:
        anycase = pattern.startswith("(?i)")
        pattern = f"(?i:{pattern[4:]})" if anycase else pattern
        for start in starts.split(" "):
            split = max(start.rfind("."), start.rfind("~")) + 1
            table, key = (before_run, start[:split]) if split else (at_run, start[:2])
            for form in {key, key.lower(), key.upper()} if anycase else {key}:
                if pattern not in table.setdefault(form.encode(), []):
                    table[form.encode()].append(pattern)
    # The look of `re` needs no more of a start than a dictionary cannot say.
    return tuple(
        {key: lazily("|".join(patterns).encode()) for key, patterns in table.items()}
        for table in (at_run, before_run)
    )  # type: ignore[return-value]


_AT_RUN, _BEFORE_RUN = _dispatch()
_BEFORE_ENDS = tuple(_BEFORE_RUN)
_LONGEST_BEFORE = max(map(len, _BEFORE_ENDS))

_JOINTS = frozenset(b".~:/")
"""A credential may have one of these before its first run."""
_BY_CONTEXT = {
    46: (  # airtable.com/developers
        (lazily(rb"pat[A-Za-z0-9]{14}\.$"), lazily(rb"[a-f0-9]{64}")),
    ),
    58: (  # core.telegram.org
        (lazily(rb"/bot[0-9]{5,16}:$"), lazily(rb"[\w-]{16,}")),
        (lazily(rb"(?<![0-9])[0-9]{8,10}:$"), lazily(rb"AA[\w-]{32,34}(?![\w-])")),
    ),
    126: (  # learn.microsoft.com, secrets of Entra applications
        (lazily(rb"[\w.~-]{3}[0-9]Q~$"), lazily(rb"[\w.~-]{24,}")),
    ),
    47: (  # api.slack.com, discord.com/developers
        (lazily(rb"hooks\.slack\.com/[a-z]{8,9}/[\w/]{0,64}/$"), lazily(rb"\w+")),
        (lazily(rb"/api/webhooks/[0-9]{6,24}/$"), lazily(rb"[\w-]+")),
    ),
}
"""By the joint: what stands before the run, and the run. A URL's part is no credential."""
_CONTEXT_BYTES = 96

_AZURE_BYTES = 84
_AZURE_MARKS = ((b"AZDO", 76), (b"JQQJ99", 52))
"""learn.microsoft.com: tokens of Azure DevOps, keys of Azure AI; what stands before the mark."""
_AZURE = lazily(rb"\+ASt[A-Za-z0-9+/]{6}(?:==)?")
_BASE64 = lazily(rb"[A-Za-z0-9+/]{76}")
"""learn.microsoft.com: keys of storage accounts have this mark."""
_SIGNATURE = lazily(rb"(?i)(?:amp;)?(?:x-(?:amz|goog)-)?sig(?:nature)?=([\w%.~+/=-]{16,})")

ESCAPING = frozenset(b"\\%[;")
_ESCAPE = lazily(
    rb"(?<=\\)(?:[nrfv]|t(?!oken)|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2})"  # \n in JSON or a repr
    rb"|(?<=%)[0-9A-Fa-f]{2}"  # %3D in a URL
    rb"|(?<=[\[;])[0-9]{1,3}m|(?<=\x1b\[)[mK]"  # ESC[1;32m, a terminal's colours
)
"""The letters and digits of an escape: they look like the beginning of the word behind it."""

_SCHEME = re.compile(rb"b(?:earer|asic)[ \t]{1,4}")
_PASS = lazily(rb"[\w.~+/=-]{8,}")
_USER = lazily(
    rb"://([^\s/?#@:\"'<>\[]{0,256}:(?![0-9]{1,5}[/?#])[^\s\"'<>]{1,256}|[^\s/?#@:\"'<>]{16,256})$"
)
_HOST = lazily(rb"[\w.\[$%{(-]")
_PEM = lazily(rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_PEM_NEXT = lazily(rb"-----(?:BEGIN|END [A-Z0-9 ]{0,60}-----)")
_PEM_BYTES = 32_768
_PEM_BASE64 = lazily(rb"[A-Za-z0-9+/]{40,}")
_PEM_BETWEEN = lazily(
    rb"(?:\\{1,8}[nrt]|[\s\"',|>*#:\\]|\n[+-]|[0-9]{1,6}(?=[\t:|]|\xe2\x86\x92)|\xe2\x86\x92){1,64}"
)
"""What is between the lines of a key: ends of lines, quotes, numbers, marks of a diff."""
_PEM_LINE = lazily(rb"(?:[A-Z][\w-]{2,20}: [^\r\n\\]{1,80}|=?[A-Za-z0-9+/]{4,}={0,2})(?![ \w.(])")


def word_start(data: bytes, at: int) -> int:
    """`at`, or behind the escape that begins there."""
    escape = _ESCAPE.match(data, at)
    return escape.end() if escape else at


_GLUED = lazily(
    f"[_-](?:{'|'.join(start for starts, _ in _OWN for start in starts.split(' '))})".encode()
)
"""A key behind another word, as in ``backup_ghp_…``."""
_LEAST_GLUED = lazily(
    rb"(?=[^A-Za-z]{0,64}[A-Za-z])(?:(?=[^0-9]{0,64}[0-9])|(?=[^A-Z]{0,64}[A-Z])(?=[^a-z]*[a-z])).{20}"
)


def places(data: bytes, part: bytes) -> Iterator[int]:
    """Where `part` is in `data`."""
    at = data.find(part)
    while at >= 0:
        yield at
        at = data.find(part, at + len(part))


def _at(data: bytes, start: int) -> re.Match[bytes] | None:
    shape = _AT_RUN.get(data[start : start + 2])
    return shape.match(data, start) if shape else None


def _vendors(data: bytes, runs: bytes) -> Iterator[tuple[int, int]]:
    start = runs.find(_RUN)
    while start >= 0:
        end = runs.find(b" ", start)
        end = len(data) if end < 0 else end
        before = data[start - 1] if start else 32
        found = _at(data, start)
        if found is None and before in ESCAPING:
            found = _at(data, word_start(data, start))
        span = found.span() if found else None
        if span is None and before in _JOINTS:
            span = _joined(data, start)
        if span is None and (glued := _GLUED.search(data, start, end - 16)):
            found = _at(data, glued.start() + 1)
            span = found.span() if found and _LEAST_GLUED.match(found[0]) else None
        if span is None and end - start >= _AZURE_BYTES:
            span = _of_azure(data, start, end)
        if span:
            yield span[0], max(span[1], end)
            end = max(span[1], end)
        start = runs.find(_RUN, end)


def _of_azure(data: bytes, start: int, end: int) -> tuple[int, int] | None:
    """A key of 84 letters and digits with a mark in it."""
    for mark, before in _AZURE_MARKS:
        at = data.find(mark, start + before, end)
        if at >= 0 and data[at - before : at - before + _AZURE_BYTES].isalnum():
            return at - before, at - before + _AZURE_BYTES
    return None


def _joined(data: bytes, start: int) -> tuple[int, int] | None:
    """A credential with a ``.``, ``~``, ``:`` or ``/`` before the run at `start`."""
    low = max(0, start - _LONGEST_BEFORE)
    if data.endswith(_BEFORE_ENDS, low, start):
        for before, pattern in _BEFORE_RUN.items():
            if data.endswith(before, low, start) and (
                found := pattern.match(data, start - len(before))
            ):
                return found.span()
    joint, low = data[start - 1], max(0, start - _CONTEXT_BYTES)
    # Most are names and paths.
    if joint == 46 and data[start - 18 : start - 15] != b"pat":
        return None
    if joint == 47 and data.find(b"ooks", low, start) < 0:
        return None
    for around, pattern in _BY_CONTEXT[joint]:
        if (found := pattern.match(data, start)) and (known := around.search(data, low, start)):
            return (start if joint == 47 else known.start()), found.end()
    return None


def _schemes(data: bytes, low: bytes) -> Iterator[tuple[int, int]]:
    for scheme in _SCHEME.finditer(low):
        word = _PASS.match(data, scheme.end())
        if word is None:
            continue
        if low[scheme.start() + 1] == 101:  # bearer
            value = word.group()
            named = b"=" in value.rstrip(b"=")
            if not (named or is_plain_word(value) or is_placeholder(value)):
                yield word.span()
        elif _is_basic(word.group()):
            yield word.span()


def _users(data: bytes) -> Iterator[tuple[int, int]]:
    """``user:password@`` in URLs."""
    for at in places(data, b"@"):
        url = data.rfind(b"://", max(0, at - 516), at)
        user = _USER.match(data, url, at) if url >= 0 else None
        if user and _HOST.match(data, at + 1):
            _, colon, password = user.group(1).partition(b":")
            if not is_placeholder(password if colon else user.group(1)):
                yield user.span(1)


def _pem(data: bytes) -> Iterator[tuple[int, int]]:
    """Private keys, also as the lines of a list or a diff; without an end as far as they go."""
    done = 0
    for at in places(data, b"-----BEGIN"):
        begin = _PEM.match(data, at) if at >= done else None
        if begin is None:
            continue
        done = _key_end(data, begin.end())
        following = _PEM_NEXT.search(data, begin.end(), begin.end() + _PEM_BYTES)
        if following and following.group()[5:8] == b"END":
            base64 = _PEM_BASE64.search(
                data, begin.end(), min(following.start(), begin.end() + 256)
            )
            if base64 or not data[done : following.start()].strip(
                b"\\nrt\"', \r\n\t|>+#*:0123456789"
            ):
                done = following.end() if base64 or done > begin.end() else done
        if done > begin.end():
            yield at, done


def _key_end(data: bytes, at: int) -> int:
    """Where the lines of base64 or of headers end that begin at `at`."""
    while True:
        between = _PEM_BETWEEN.match(data, at)
        line = _PEM_LINE.match(data, between.end()) if between else None
        if line is None:
            return at
        at = line.end()


def _is_basic(value: bytes) -> bool:
    try:
        return b":" in base64.b64decode(value[:1024].rstrip(b"=.") + b"==")
    except binascii.Error:
        return False


def _signatures(data: bytes) -> Iterator[tuple[int, int]]:
    """In URLs of AWS, Azure and Google."""
    for mark in (b"?", b"&"):
        for at in places(data, mark):
            if signature := _SIGNATURE.match(data, at + 1):
                yield signature.span(1)


def shaped(data: bytes, low: bytes, runs: bytes) -> Iterator[tuple[int, int]]:
    """Parts of `data` that have the shape of a credential; the arguments are those of `named`."""
    yield from _vendors(data, runs)
    yield from _schemes(data, low)
    yield from _signatures(data)
    yield from _users(data)
    yield from _pem(data)
    for mark in _AZURE.finditer(data) if b"ASt" in data else ():
        if mark.start() >= 76 and _BASE64.match(data, mark.start() - 76, mark.start()):
            yield mark.start() - 76, mark.end()
