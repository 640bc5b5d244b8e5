"""Which plugins are loaded: the grammar of ``QITOS_TRACE_PLUGINS``.

    selection = token *("," token)      an allow-list, loaded in its order
    token     = name | distribution ":" name | "all" | "*"
              | "no:" name | "no:" distribution ":" name
              | "none" | "off" | "0"    any of these: nothing at all

Not set: everything. Empty: nothing. Only "no:" tokens: everything but those. Names are those of
entry points, never of modules: an environment variable must not be able to import anything that
is not installed as a plugin. Case, surrounding blanks, and ``-`` for ``_`` make no difference.
Pure: only the environment variable is read. `import qitos` imports this: no dataclass, no tuple.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

VARIABLE = "QITOS_TRACE_PLUGINS"
"""The environment variable. (Datasette's DATASETTE_TRACE_PLUGINS prints calls; this selects.)"""

ALL = "all"
NOTHING_WORDS = frozenset({"none", "off", "0"})
EXCEPT = "no:"


class Selection:
    """The plugins in `wanted` (None: all of them; so does the word `ALL`) without `excluded`."""

    __slots__ = ("excluded", "wanted")

    def __init__(
        self, wanted: tuple[str, ...] | None = None, excluded: frozenset[str] = frozenset()
    ) -> None:
        self.wanted = wanted
        self.excluded = excluded

    @classmethod
    def parse(cls, text: str | None) -> Selection:
        """The selection that `text` stands for; None: not set. Any text is a selection."""
        if text is None:
            return cls()
        tokens = [canonical(token) for token in text.split(",") if token.strip()]
        if not tokens or NOTHING_WORDS.intersection(tokens):
            return cls(wanted=())
        excluded = frozenset(t[len(EXCEPT) :].strip() for t in tokens if t.startswith(EXCEPT))
        wanted = [ALL if t == "*" else t for t in tokens if not t.startswith(EXCEPT)]
        return cls(tuple(dict.fromkeys(wanted)) or None, excluded)

    @classmethod
    def from_environ(cls) -> Selection:
        """The selection that the environment variable has."""
        return cls.parse(os.environ.get(VARIABLE))

    def rank(self, name: str, distribution: str) -> int | None:
        """The plugin's position in the order of loading; None if it is not selected."""
        names = _names(name, distribution)
        wanted = (ALL,) if self.wanted is None else self.wanted
        if not self.excluded.isdisjoint(names):
            return None
        places = [place for place, token in enumerate(wanted) if token in names]
        # Those that only "all" selects come after those that have a name of their own.
        return min(places, default=len(wanted) if ALL in wanted else None)

    def singles_out(self, name: str, distribution: str) -> bool:
        """Whether the plugin is wanted as ``distribution:name``."""
        return f"{canonical(distribution)}:{canonical(name)}" in (self.wanted or ())

    def asks_for(self, name: str) -> bool:
        """Whether the plugin of that name is wanted by name, or by "all".

        False if the variable is not set: a plugin that is merely installed is loaded then, but
        should do nothing that the user has not asked for.
        """
        wanted, name = self.wanted or (), canonical(name)
        by_name = any(token.rpartition(":")[2] == name for token in wanted)
        return (by_name or ALL in wanted) and name not in self.excluded

    def unknown(self, installed: Iterable[tuple[str, str]]) -> list[str]:
        """The names in the selection that none of `installed`, (name, distribution), has."""
        known = {token for pair in installed for token in _names(*pair)}
        named = [token for token in self.wanted or () if token != ALL] + sorted(self.excluded)
        return [token for token in named if token not in known]


def _names(name: str, distribution: str) -> frozenset[str]:
    name, distribution = canonical(name), canonical(distribution)
    return frozenset({name, f"{distribution}:{name}"})


def canonical(name: str) -> str:
    """`name` in the spelling in which names are compared."""
    return name.strip().lower().replace("-", "_")
