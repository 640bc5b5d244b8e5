"""How much of what is secret the redactor finds, how much that is harmless it takes, and how fast.

Beside it, on the same texts: gitleaks' rules (``--gitleaks``, a clone of it; its patterns run in
Python, with its keywords, entropies and allow lists) and detect-secrets, if it is installed.

    python -m benchmarks.redaction [--gitleaks DIRECTORY]
"""

from __future__ import annotations

import argparse
import math
import re
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qitos_mlflow.redaction.redact import MARKER, redact_text
from tests.redaction import corpus
from tests.redaction.corpus import Item

Redactor = Callable[[Item], str]


def gitleaks(path: Path) -> Redactor:
    """What gitleaks' rules would leave of a text."""
    from benchmarks.vendor_formats import python_pattern, rules

    known = [(rule, re.compile(rule["regex"])) for rule in rules(path)]
    import tomllib

    config = tomllib.loads((path / "config" / "gitleaks.toml").read_text("utf-8"))["allowlist"]
    allowed = [re.compile(python_pattern(pattern)) for pattern in config.get("regexes", [])]
    words = [word.lower() for word in config.get("stopwords", [])]

    def is_allowed(rule: dict[str, Any], secret: str) -> bool:
        if any(pattern.search(secret) for pattern in allowed):
            return True
        if any(word in secret.lower() for word in words):
            return True
        for one in rule.get("allowlists", []):
            if any(
                re.search(python_pattern(pattern), secret) for pattern in one.get("regexes", [])
            ):
                return True
            if any(word.lower() in secret.lower() for word in one.get("stopwords", [])):
                return True
        return False

    def redactor(item: Item) -> str:
        text, low, found = item.text, item.text.lower(), set()
        for rule, pattern in known:
            keywords = rule.get("keywords", [])
            if keywords and not any(word.lower() in low for word in keywords):
                continue
            for match in pattern.finditer(text):
                group = rule.get("secretGroup") or next(
                    (number for number, one in enumerate(match.groups(), 1) if one), 0
                )
                secret = match.group(group)
                enough = entropy(secret) > rule.get("entropy", 0)
                if secret and enough and not is_allowed(rule, secret):
                    found.add(secret)
        return _without(text, found)

    return redactor


def detect_secrets() -> Redactor:
    """What detect-secrets, with its default plugins and filters, would leave of a text."""
    from detect_secrets import SecretsCollection  # type: ignore[import-not-found]
    from detect_secrets.settings import default_settings  # type: ignore[import-not-found]

    def redactor(item: Item) -> str:
        with tempfile.TemporaryDirectory() as directory, default_settings():
            path = Path(directory, "text.txt")
            path.write_text(item.text, "utf-8")
            found = SecretsCollection()
            found.scan_file(str(path))
            secrets = {one.secret_value for _, one in found if one.secret_value}
        return _without(item.text, secrets)

    return redactor


def entropy(text: str) -> float:
    """Shannon's, in bits a character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts)


def _without(text: str, secrets: set[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MARKER)
    return text


def report(name: str, redactor: Redactor) -> None:
    """Print recall and precision."""
    print(f"\n{name}")
    unchanged, texts = 0, 0
    for title, hard, harmless in (
        ("written beside the rules", "hard", "harmless"),
        ("held out", "held_out_hard", "held_out_harmless"),
    ):
        found = corpus.totals(corpus.hard(hard), redactor)
        clean = corpus.totals(corpus.harmless(harmless), redactor)
        wrong = found["damaged"] + clean["damaged"]
        recall = found["found"] / found["secrets"]
        precision = found["found"] / (found["found"] + wrong)
        unchanged += clean["items"] - clean["damaged"]
        texts += clean["items"]
        print(
            f"  {title}: recall {recall:.1%} of {found['secrets']} secrets"
            f" in {found['items']} texts; precision {precision:.1%}"
        )
    print(f"  {unchanged / texts:.1%} of {texts} harmless texts unchanged")
    for title, keys, places in (
        ("15 main vendors", corpus.MAIN, corpus.PLACES),
        ("other vendors", corpus.OTHERS, corpus.PLACES),
        ("15 main vendors behind another word", corpus.MAIN, corpus.GLUED),
    ):
        found = corpus.totals(corpus.vendors(keys, places), redactor)
        print(
            f"  keys of {title} in {len(places)} places:"
            f" recall {found['found'] / found['secrets']:.1%} of {found['secrets']}"
        )


def ordinary(megabytes: float, verbose: bool) -> None:
    """Print how often the standard library's source is changed, and how fast it is read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and size < megabytes * 1e6:
            texts.append(path.read_text("utf-8", "replace"))
            size += len(texts[-1])
    best = math.inf
    for _ in range(3):
        began = time.process_time()
        outputs = [redact_text(text) for text in texts]
        best = min(best, time.process_time() - began)
    lines = sum(text.count("\n") for text in texts)
    marked = [output for output in outputs if MARKER in output]
    places = [(text, at.start()) for text in marked for at in re.finditer(r"\[redacted\]", text)]
    print(
        f"\nPython's own source: {len(places)} markers in {lines} lines;"
        f" {size / best / 1e6:.0f} MB/s of CPU time"
    )
    for text, at in places[:: max(1, len(places) // 40)] if verbose else ():
        print("   ", text[max(0, at - 60) : at + 40].replace("\n", "\\n"))


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gitleaks", type=Path)
    parser.add_argument("-v", action="store_true", help="some of the lines that changed")
    arguments = parser.parse_args()
    report("qitos-mlflow", Item.redacted)
    if arguments.gitleaks:
        report("gitleaks' rules", gitleaks(arguments.gitleaks))
    try:
        report("detect-secrets", detect_secrets())
    except ImportError:
        print("\ndetect-secrets is not installed")
    ordinary(8, arguments.v)


if __name__ == "__main__":
    main()
