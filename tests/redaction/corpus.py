"""Texts with made-up secrets, and harmless ones: what recall and precision are measured on.

The texts are in `tests/data/redaction`. `«pw»` and its like stand for secrets, which a seeded
generator makes, so that no file holds one. The held-out texts were written before the rules and are
no guide for them: look at their total only.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qitos_mlflow.redaction.redact import MARKER, redact

DATA = Path(__file__).parents[1] / "data" / "redaction"
REPLACED_WHOLE = frozenset({"private_key", "header"})
"""Kinds of which more than the secret may go: the headers of a key, the other cookies of a line."""
VALUES_EACH = 2
"""Each text is used with so many sets of values."""

ALNUM = string.ascii_letters + string.digits
BASE64 = ALNUM + "+/"


class Values:
    """Made-up secrets, the same in each process."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def of(self, alphabet: str, length: int) -> str:
        """A random text; its first character is a letter if the alphabet has any."""
        first = [char for char in alphabet if char.isalpha()] or alphabet
        rest = self._random.choices(alphabet, k=length - 1)
        return self._random.choice(first) + "".join(rest)

    def alnum(self, length: int) -> str:
        """Letters and digits."""
        return self.of(ALNUM, length)

    def hex(self, length: int) -> str:
        """Lower-case hexadecimal digits."""
        return self.of("0123456789abcdef", length)

    def upper(self, length: int) -> str:
        """Capital letters and digits."""
        return self.of(string.ascii_uppercase + "234567", length)

    def digits(self, length: int) -> str:
        """Digits."""
        return "".join(self._random.choices("123456789", k=length))

    def wordy(self, length: int) -> str:
        """What base64 for URLs has, ending in a letter or digit."""
        return self.of(ALNUM + "-_", length - 1) + self.alnum(1)

    def word(self) -> str:
        """A password as people choose them: a word and digits."""
        words = [
            "hunter",
            "winter",
            "dragon",
            "sunshine",
            "monkey",
            "shadow",
            "football",
            "mellon",
            "swordfish",
        ]
        return self._random.choice(words) + self.digits(self._random.randint(2, 4))

    def make(self, kind: str) -> str:
        """The secret that a placeholder stands for."""
        makers: dict[str, Callable[[], str]] = {
            "pw": lambda: self.alnum(5) + self._random.choice("!#^*~%") + self.alnum(4) + "7",
            "word": self.word,
            "wordslash": lambda: self.word() + "/" + self.alnum(4),
            "wordhash": lambda: self.word() + "#" + self.alnum(4),
            "rand": lambda: self.alnum(30) + self.digits(2),
            "hex": lambda: self.hex(32),
            "b64": lambda: self.of(BASE64, 24),
            "b64key": lambda: self.of(BASE64, 40),
            "pemline": lambda: self.of(BASE64, 64),
            "num": lambda: self.digits(6),
            "uuid": lambda: "-".join(map(self.hex, (8, 4, 4, 4, 12))),
        }
        return makers[kind]()


@dataclass(frozen=True)
class Item:
    """A text, or the JSON of a value, and the secrets in it."""

    kind: str
    text: str
    secrets: tuple[str, ...]
    words: frozenset[str]
    """What has to stay."""
    is_json: bool = False

    def redacted(self) -> str:
        """What this package makes of it."""
        result = redact(json.loads(self.text) if self.is_json else self.text)
        return json.dumps(result, ensure_ascii=False) if self.is_json else str(result)


@dataclass(frozen=True)
class Score:
    """How an item fared."""

    found: int
    missed: tuple[str, ...]
    damaged: tuple[str, ...]
    """Words that are gone and were no secrets; of a harmless item, whether it changed."""


def _texts(name: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^%% (.+)\n", (DATA / f"{name}.txt").read_text("utf-8"), flags=re.MULTILINE)
    for kind, text in zip(parts[1::2], parts[2::2], strict=True):
        yield kind, text.removesuffix("\n")


_PLACE = re.compile("«([a-z0-9]+)»")


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z]{4,}", text))


def hard(name: str) -> list[Item]:
    """The items of `hard` or `held_out_hard`."""
    items = []
    for number, (kind, text) in enumerate(_texts(name)):
        for turn in range(VALUES_EACH):
            values, secrets = Values(f"{name} {number} {turn}"), []

            def secret(
                place: re.Match[str], values: Values = values, secrets: list[str] = secrets
            ) -> str:
                secrets.append(values.make(place[1]))
                return secrets[-1]

            filled = _PLACE.sub(secret, text)
            words = _words(_PLACE.sub(" ", text)) - {"Bearer", "Basic", "Token"}
            if kind.split()[0] in REPLACED_WHOLE:
                words = frozenset()
            items.append(
                Item(kind.split()[0], filled, tuple(secrets), words, kind.endswith(" json"))
            )
    return items


def harmless(name: str) -> list[Item]:
    """The items of `harmless` or `held_out_harmless`."""
    return [
        Item(kind.split()[0], text, (), frozenset(), kind.endswith(" json"))
        for kind, text in _texts(name)
    ]


def score(item: Item, output: str) -> Score:
    """How `item` fared if a redactor made `output` of it.

    A secret is found if no half of it is left.
    """
    missed = tuple(secret for secret in item.secrets if _is_left(secret, output))
    if not item.secrets:
        before = (
            json.dumps(json.loads(item.text), ensure_ascii=False) if item.is_json else item.text
        )
        return Score(0, (), () if output == before else (output,))
    damaged = tuple(sorted(word for word in item.words if word not in output))
    return Score(len(item.secrets) - len(missed), missed, damaged)


def _is_left(secret: str, output: str) -> bool:
    half = max(4, (len(secret) + 1) // 2)
    kept = output.replace(MARKER, "\0")
    return any(secret[at : at + half] in kept for at in range(len(secret) - half + 1))


MAIN: dict[str, Callable[[Values], str]] = {
    "AWS": lambda v: "AKIA" + v.upper(16),
    "AWS, temporary": lambda v: "ASIA" + v.upper(16),
    "Google API": lambda v: "AIza" + v.wordy(35),
    "Google OAuth": lambda v: "ya29." + v.wordy(60),
    "Google client": lambda v: "GOCSPX-" + v.wordy(28),
    "Azure AD": lambda v: v.alnum(3) + "8Q~" + v.alnum(34),
    "Azure storage": lambda v: v.of(BASE64, 76) + "+ASt" + v.alnum(6) + "==",
    "Azure DevOps": lambda v: v.alnum(76) + "AZDO" + v.alnum(4),
    "Azure AI": lambda v: v.alnum(52) + "JQQJ99" + v.alnum(18) + "ACOG" + v.alnum(4),
    "GitHub": lambda v: "ghp_" + v.alnum(36),
    "GitHub, app": lambda v: "ghs_" + v.alnum(36),
    "GitHub, fine": lambda v: "github_pat_" + v.alnum(22) + "_" + v.alnum(59),
    "GitLab": lambda v: "glpat-" + v.wordy(20),
    "GitLab, routable": lambda v: f"glpat-{v.wordy(27)}.01.{v.hex(9)}",
    "GitLab, runner": lambda v: "glrt-" + v.wordy(20),
    "OpenAI": lambda v: "sk-proj-" + v.wordy(74) + "T3BlbkFJ" + v.wordy(74),
    "OpenAI, old": lambda v: "sk-" + v.alnum(20) + "T3BlbkFJ" + v.alnum(20),
    "Anthropic": lambda v: "sk-ant-api03-" + v.wordy(93) + "AA",
    "Slack, bot": lambda v: f"xoxb-{v.digits(12)}-{v.digits(12)}-{v.alnum(24)}",
    "Slack, app": lambda v: f"xapp-1-{v.upper(11)}-{v.digits(12)}-{v.hex(64)}",
    "Stripe": lambda v: "sk_" + "live_" + v.alnum(24),
    "Stripe, restricted": lambda v: "rk_" + "test_" + v.alnum(40),
    "Stripe, webhook": lambda v: "whsec_" + v.alnum(32),
    "Hugging Face": lambda v: "hf_" + v.of(string.ascii_letters, 34),
    "SendGrid": lambda v: f"SG.{v.wordy(22)}.{v.wordy(43)}",
    "Twilio": lambda v: "SK" + v.hex(32),
    "npm": lambda v: "npm_" + v.alnum(36),
    "PyPI": lambda v: "pypi-AgEIcHlwaS5vcmc" + v.wordy(80),
    "Databricks": lambda v: "dapi" + v.hex(32),
}
"""Keys of the fifteen vendors that agents meet most: AWS, Google API and Cloud, Azure, GitHub,
GitLab, OpenAI, Anthropic, Slack, Stripe, Hugging Face, SendGrid, Twilio, npm, PyPI, Databricks."""

OTHERS: dict[str, Callable[[Values], str]] = {
    "1Password": lambda v: "ops_eyJ" + v.alnum(260),
    "Adobe": lambda v: "p8e-" + v.hex(32),
    "age": lambda v: "AGE-SECRET-KEY-1" + v.of("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58),
    "Airtable": lambda v: f"pat{v.alnum(14)}.{v.hex(64)}",
    "Alibaba": lambda v: "LTAI" + v.alnum(20),
    "Artifactory": lambda v: "AKCp" + v.alnum(69),
    "Adafruit": lambda v: "aio_" + v.alnum(28),
    "Atlassian": lambda v: "ATATT3" + v.wordy(186),
    "Bedrock": lambda v: "ABSK" + v.alnum(120),
    "Bitbucket": lambda v: "ATBB" + v.alnum(32),
    "Buildkite": lambda v: "bkua_" + v.hex(40),
    "Brevo": lambda v: f"xkeysib-{v.hex(64)}-{v.alnum(16)}",
    "CircleCI": lambda v: f"CCIPAT_{v.alnum(22)}_{v.hex(40)}",
    "Clojars": lambda v: "CLOJARS_" + v.hex(60),
    "Cloudflare": lambda v: f"v1.0-{v.hex(24)}-{v.hex(146)}",
    "Contentful": lambda v: "CFPAT-" + v.wordy(43),
    "DigitalOcean": lambda v: "dop_v1_" + v.hex(64),
    "Discord": lambda v: f"https://discord.com/api/webhooks/{v.digits(18)}/{v.wordy(68)}",
    "Docker Hub": lambda v: "dckr_pat_" + v.wordy(27),
    "Doppler": lambda v: "dp.pt." + v.alnum(43),
    "Duffel": lambda v: "duffel_" + "live_" + v.wordy(43),
    "Dynatrace": lambda v: f"dt0c01.{v.upper(24)}.{v.upper(64)}",
    "EasyPost": lambda v: "EZAK" + v.alnum(54),
    "Facebook": lambda v: "EAAC" + v.alnum(120),
    "Flutterwave": lambda v: f"FLWSECK_TEST-{v.hex(32)}-X",
    "Fly.io": lambda v: "fo1_" + v.wordy(43),
    "Grafana": lambda v: f"glsa_{v.alnum(32)}_{v.hex(8)}",
    "Grafana Cloud": lambda v: "glc_eyJ" + v.alnum(60),
    "Groq": lambda v: "gsk_" + v.alnum(52),
    "Harness": lambda v: f"pat.{v.alnum(22)}.{v.hex(24)}.{v.alnum(20)}",
    "Heroku": lambda v: "HRKU-AA" + v.wordy(58),
    "HashiCorp": lambda v: f"{v.alnum(14)}.atlasv1.{v.wordy(65)}",
    "Infracost": lambda v: "ico-" + v.alnum(32),
    "LangSmith": lambda v: f"lsv2_pt_{v.hex(32)}_{v.hex(10)}",
    "Linear": lambda v: "lin_api_" + v.alnum(40),
    "Mailgun": lambda v: "key-" + v.hex(32),
    "New Relic": lambda v: "NRAK-" + v.upper(27),
    "Notion": lambda v: "ntn_" + v.digits(11) + v.alnum(35),
    "Notion, old": lambda v: "secret_" + v.alnum(43),
    "NuGet": lambda v: "oy2" + v.of("abcdefghijklmnopqrstuvwxyz234567", 43),
    "NVIDIA": lambda v: "nvapi-" + v.wordy(64),
    "Octopus": lambda v: "API-" + v.upper(26),
    "OpenShift": lambda v: "sha256~" + v.wordy(43),
    "Perplexity": lambda v: "pplx-" + v.alnum(48),
    "PlanetScale": lambda v: "pscale_tkn_" + v.wordy(43),
    "PostHog": lambda v: "phx_" + v.alnum(43),
    "Postman": lambda v: f"PMAK-{v.hex(24)}-{v.hex(34)}",
    "Prefect": lambda v: "pnu_" + v.alnum(36),
    "Pulumi": lambda v: "pul-" + v.hex(40),
    "Replicate": lambda v: "r8_" + v.alnum(37),
    "RubyGems": lambda v: "rubygems_" + v.hex(48),
    "Sentry": lambda v: "sntryu_" + v.hex(64),
    "Shippo": lambda v: "shippo_" + "live_" + v.hex(40),
    "Shopify": lambda v: "shpat_" + v.hex(32),
    "Slack webhook": lambda v: f"https://hooks.slack.com/services/T{v.upper(8)}/B{v.upper(8)}/"
    + v.alnum(24),
    "Sonar": lambda v: "squ_" + v.hex(40),
    "Sourcegraph": lambda v: f"sgp_{v.hex(16)}_{v.hex(40)}",
    "Square, OAuth": lambda v: "sq0csp-" + v.wordy(43),
    "Square": lambda v: "sq0atp-" + v.wordy(22),
    "Supabase": lambda v: "sbp_" + v.hex(40),
    "Tailscale": lambda v: f"tskey-auth-{v.alnum(12)}-{v.alnum(32)}",
    "Tavily": lambda v: "tvly-" + v.alnum(32),
    "Telegram": lambda v: f"{v.digits(10)}:AA{v.wordy(33)}",
    "Typeform": lambda v: "tfp_" + v.wordy(59),
    "Vault": lambda v: "hvs." + v.wordy(95),
    "Vercel": lambda v: f"vercel_blob_rw_{v.alnum(16)}_{v.alnum(30)}",
    "xAI": lambda v: "xai-" + v.alnum(80),
    "Yandex": lambda v: "AQVN" + v.wordy(36),
}  # fmt: skip

PLACES = (
    "{}",
    "use {} for this",
    "it is `{}`.",
    '{{"items": ["{}", 2]}}',
    "x = ['{}', None]",
    "run --with {} now",
    "2026-01-02 INFO sent {} to host",
    "https://example.org/p?a=1&q={}&b=2",
    "https://example.org/{}/x",
    "line\\n{}\\nline",
    "\x1b[32m{}\x1b[0m",
    "a%3D{}%26b",
    "| ann | {} | x |",
    "+  value: {}",
    "({}), <{}>",
    "ann,{},x",
)
"""Places without a name that would tell what the key is."""


GLUED = ("backup_{}", "my-{}", "X_{}_old", "run-2026-{}.log", "a={{'v1_{}'}}", "/srv/key-{}/x")
"""Places where another word, ``_`` or ``-`` stands before the key."""


def vendors(
    keys: dict[str, Callable[[Values], str]], places: tuple[str, ...] = PLACES
) -> list[Item]:
    """A key of each vendor in each place."""
    items = []
    for vendor, make in keys.items():
        for number, place in enumerate(places):
            secret = make(Values(f"{vendor} {number}"))
            secret_part = secret.rsplit("/", 1)[-1] if "://" in secret else secret
            items.append(Item(vendor, place.format(secret, secret), (secret_part,), frozenset()))
    return items


def totals(items: list[Item], redactor: Callable[[Item], str]) -> dict[str, Any]:
    """Secrets, found ones, damaged items and harmless items that changed."""
    scores = [(item, score(item, redactor(item))) for item in items]
    return {
        "items": len(items),
        "secrets": sum(len(item.secrets) for item in items),
        "found": sum(one.found for _, one in scores),
        "damaged": sum(1 for _, one in scores if one.damaged),
        "scores": scores,
    }
