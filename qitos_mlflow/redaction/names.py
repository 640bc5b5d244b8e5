"""Which names are a credential's: ``api_key``, ``clientSecret``, ``Authorization``. Pure."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

from qitos_mlflow.redaction.patterns import lazily


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = lazily(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

_ALWAYS = _words(
    "password passwords passwd pwd passphrase passcode secret secrets credential credentials "
    "creds authorization auth cookie cookies jwt dsn apikey apikeys pw psk otp totp cvv "
    "passwort kennwort storepass keypass passkey sessionid sessid phpsessid jsessionid"
)
"""A name with one of these words names a credential, wherever the word stands."""

_JOINED = tuple(
    _words(
        "apikey accesskey secretkey privatekey sessionkey authkey signingkey encryptionkey "
        "masterkey accountkey sharedkey accesstoken authtoken refreshtoken idtoken apitoken "
        "bearertoken sessiontoken securitytoken bottoken clientsecret appsecret sharedsecret "
        "password passwd passphrase connectionstring connstr csrftoken "
        "xsrftoken oauthtoken"
    )
)
"""A name that ends in one of these, read without separators, names a credential."""

_KEY_OF = _words(
    "access account admin airtable algolia anthropic api app application auth aws azure bearer "
    "client cloudflare cohere consumer datadog decryption deepseek deploy encryption fernet "
    "fireworks functions gemini github gitlab google groq heroku hmac huggingface license linear "
    "mailchimp mailgun maps master mistral notion openai openrouter pagerduty perplexity pinecone "
    "private proxy replicate secret sendgrid sentry service session shared signing slack ssh "
    "storage stripe subscription supabase tavily together twilio validation vercel wandb webhook "
    "xai"
)
"""Words before ``key`` that make it a secret, unlike the key of a dictionary or a table."""

_PASS_OF = _words(
    "admin app backup become database db email ftp http imap keystore login mail mysql pg "
    "postgres proxy rabbitmq redis root service smtp sql ssh sudo truststore user"
)
"""Words before ``pass`` that make it a password."""

_TOKEN_COUNTED = _words(
    "audio bos cached class cls completion continuation current decoder end eos first image input "
    "last mask max min new next num output pad page per prompt reasoning sep special start stop "
    "sync thinking total unexpected unk"
)
"""Words before ``token`` that make it a piece of text or a page, not a credential."""

_PIN_OF = _words("account card device login security sim user")
"""Words before ``pin`` that make it a secret; alone it is one, too."""

_HARMLESS_END = _words(
    "accepted age alg algorithm algorithms arn at backend backends budget changed class classes "
    "client column columns conflict correct cost count created details domain enabled encoding "
    "endpoint env error errors exception expiration expired expires expiry factory failed failure "
    "field file flow form format found go handler hasher hashers hdr header helper hint html "
    "httponly in index invalid java js kind label length limit limits location log manager max md "
    "method methods middleware min missing mode model module name names number path pattern "
    "policy position prefix prompt provider py rate ratio rb reason required reset rotation "
    "router rs rule rules samesite scheme secure size sock source status strategy strength suffix "
    "supported ts ttl txt type types updated uri url usage valid validator validators variable "
    "version view views warn warning window"
)
"""A name that ends in one of these describes a credential and does not hold one."""


def _is_credential(words: list[str]) -> bool:
    while len(words) > 1 and words[-1].isdigit():  # api_key_2
        words = words[:-1]
    last = words[-1]
    if last in _HARMLESS_END:
        return False
    if not _ALWAYS.isdisjoint(words) or "".join(words).endswith(_JOINED):
        return True
    if last == "token":
        return len(words) == 1 or words[-2] not in _TOKEN_COUNTED
    if last == "tokens":
        return len(words) > 1 and words[-2] in {"access", "refresh", "auth", "api", "session"}
    if last == "pass":
        return len(words) > 1 and words[-2] in _PASS_OF
    if last == "pat":
        return len(words) > 1 and words[-2] in {"gh", "github", "gitlab", "ado", "azure", "devops"}
    if words[0] in {"pin", "mfa"}:
        return len(words) == 1 or words[1] in {"code", "number"}
    if last == "pin":
        return words[-2] in _PIN_OF
    # "key" need not be the last word: aws_access_key_id, api_key_prod.
    return any(b in {"key", "keys"} and a in _KEY_OF for a, b in pairwise(words))


@lru_cache(maxsize=4096)
def _cached_names_credential(name: str) -> bool:
    plain = re.findall(r"[a-z0-9]+", name.lower())
    camel = [word.lower() for word in _WORD.findall(name)]
    if camel and camel[-1] in _HARMLESS_END:  # google.auth.DefaultCredentialsError
        return False
    return any(_is_credential(words) for words in (plain, camel) if words)


def names_credential(name: str) -> bool:
    """Whether a value under this name is a secret: any case, with ``-``, ``_``, ``.`` or camelCase.

    False for token *counts* (``prompt_tokens``, ``maxTokens``, ``token_usage``) and for names that
    say something about a credential (``password_policy``, ``token_type``).
    """
    return len(name) <= 128 and _cached_names_credential(name)


_KNOWN = _ALWAYS | _words(
    "token tokens key keys pass pin user username login apikey value placeholder"
)


def is_known_word(word: str) -> bool:
    """Whether it is a word that says what a credential is: as a value it is none."""
    return word in _KNOWN
