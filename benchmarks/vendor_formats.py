"""Makes `qitos_mlflow/redaction/vendors.py`: formats of vendors' keys, from gitleaks' rules.

Of each rule that begins with text of its own, such as ``dop_v1_``, the format is taken. Rules that
look for a vendor's name beside a value are not: `qitos_mlflow.redaction.names` has those names.

    git clone --depth 1 https://github.com/gitleaks/gitleaks
    python -m benchmarks.vendor_formats gitleaks > qitos_mlflow/redaction/vendors.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import re._constants as constants
    import re._parser as parser

    import tomllib
else:
    raise SystemExit("vendor_formats needs Python 3.11")

START = re.compile(r"[\w.~-]{3,}")
MOST_STARTS, MOST_CHARS = 12, 100
TOO_COMMON = frozenset({"4b1d", "pubkey-", "FLWPUBK_TEST-", "live_pub_"})
"""Starts that hashes have too, and public keys."""

HEAD = '''"""Formats of vendors' keys: how they begin, and the pattern. Generated: do not edit.

From the rules of gitleaks (MIT, Copyright (c) 2019 Zachary Rice), commit {commit} of {date}, by
`python -m benchmarks.vendor_formats`.
"""

# fmt: off
# ruff: noqa: E501
FORMATS: tuple[tuple[str, str], ...] = (
'''


def rules(path: Path) -> list[dict[str, Any]]:
    """gitleaks' rules, with patterns that Python's `re` takes."""
    found = tomllib.loads((path / "config" / "gitleaks.toml").read_text("utf-8"))["rules"]
    return [{**rule, "regex": python_pattern(rule["regex"])} for rule in found if "regex" in rule]


def python_pattern(pattern: str) -> str:
    """A pattern of Go's as one of Python's: flags in the middle of it hold to the group's end."""
    pattern = pattern.replace(r"\z", r"\Z").replace("[[:alnum:]]", "[A-Za-z0-9]")
    while (at := pattern.find("(?i)", 1)) > 0:
        depth, end, in_class = 0, at + 4, False
        while end < len(pattern):
            char = pattern[end]
            if char == "\\":
                end += 2
                continue
            if in_class:
                in_class = char != "]"
            elif char == "[":
                in_class = True
            elif char == "(":
                depth += 1
            elif char == ")":
                if depth == 0:
                    break
                depth -= 1
            end += 1
        pattern = f"{pattern[:at]}(?i:{pattern[at + 4 : end]}){pattern[end:]}"
    return pattern


def starts(tree: Any) -> set[str]:
    """The texts that a match of `tree` can begin with, as far as they are certain."""
    known = {""}
    for kind, value in tree:
        more, goes_on = _starts_of(kind, value)
        if len(known) * len(more) > MOST_STARTS:
            break
        known = {first + second for first in known for second in more}
        if not goes_on:
            break
    return known


def _starts_of(kind: Any, value: Any) -> tuple[set[str], bool]:
    if kind is constants.LITERAL:
        return {chr(value)}, True
    if kind is constants.AT:
        return {""}, True
    if kind is constants.SUBPATTERN:
        return starts(value[3]), _is_whole(value[3])
    if kind is constants.BRANCH:
        parts = value[1]
        return set().union(*map(starts, parts)), all(map(_is_whole, parts))
    if kind is constants.IN and all(part[0] is constants.LITERAL for part in value):
        return {chr(part[1]) for part in value}, True
    return {""}, False


def _is_whole(tree: Any) -> bool:
    return all(_starts_of(kind, value)[1] for kind, value in tree)


ENDS = (
    r"""(?:[\x60'"\s;]|\\[nr]|$|\b)""",
    r"""(?:[\x60'"\s;]|\\[nr]|$)""",
    r"(?:[^\w-]|\Z)",
    r"(?:[^a-zA-Z0-9+/]|\Z)",
)
"""What a rule wants behind a secret: too strict for one in a URL or a table."""
ASSIGNED = re.compile(re.escape(r"""[\x60'"\s=]{0,5}""") + r"\((.+)\)$")
"""The secret of a rule that looks for a name before it."""


def formats(rule: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Starts and pattern of the rule's secret."""
    pattern = rule["regex"]
    for end in ENDS:
        pattern = pattern.removesuffix(end)
    if assigned := ASSIGNED.search(pattern):
        pattern = "(?i)" + assigned.group(1)
    pattern = pattern.replace(r"\b", "")
    if len(pattern) > MOST_CHARS or r"\s" in pattern:
        return
    try:
        begins = starts(parser.parse(pattern.removeprefix("(?i)")))
    except re.error:  # Half of a rule that has two forms.
        return
    if begins & TOO_COMMON or not all(START.fullmatch(begin) for begin in begins):
        return
    for begin in sorted(begins):
        yield begin, pattern


def main() -> None:
    """Print the module."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("gitleaks", type=Path, help="a clone of gitleaks")
    path = arguments.parse_args().gitleaks
    git = ["git", "-C", str(path), "log", "-1", "--format=%h %cs"]
    commit, date = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    found: dict[str, set[str]] = {}
    for rule in rules(path):
        for begin, pattern in formats(rule):
            found.setdefault(pattern, set()).add(begin)
    print(HEAD.format(commit=commit, date=date), end="")
    for pattern, begins in sorted(found.items(), key=lambda one: min(one[1])):
        print(f"    ({' '.join(sorted(begins))!r}, r'{pattern}'),")
    print(")\n# fmt: on")


if __name__ == "__main__":
    main()
