"""Which plugins are loaded: the grammar of ``QITOS_TRACE_PLUGINS``.

    selection = token *("," token)      an allow-list, loaded in its order
    token     = name | distribution ":" name | "all" | "*"
              | "no:" name | "no:" distribution ":" name
              | "none" | "off" | "0"    any of these: nothing at all

Not set: everything. Empty: nothing. Only "no:" tokens: everything but those. Names are those of
entry points, never of modules: an environment variable must not be able to import anything that
is not installed as a plugin. Case, surrounding blanks, and ``-`` for ``_`` make no difference.
Pure: only the environment variable is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

VARIABLE = "QITOS_TRACE_PLUGINS"
"""The environment variable. (Datasette's DATASETTE_TRACE_PLUGINS prints calls; this selects.)"""

ALL_WORDS = frozenset({"all", "*"})
NOTHING_WORDS = frozenset({"none", "off", "0"})
EXCEPT = "no:"


@dataclass(frozen=True)
class Selection:
    """What is selected: everything or `chosen`, in any case without `excluded`.

    `explicit`: the variable asks for plugins, by name or by "all".
    """

    everything: bool = True
    chosen: tuple[str, ...] = ()
    excluded: frozenset[str] = frozenset()
    explicit: bool = False

    @classmethod
    def parse(cls, text: str | None) -> Selection:
        """The selection that `text` stands for; None: not set. Any text is a selection."""
        if text is None:
            return cls()
        tokens = [canonical(token) for token in text.split(",") if token.strip()]
        if not tokens or NOTHING_WORDS.intersection(tokens):
            return cls(everything=False, explicit=True)
        excluded = frozenset(t[len(EXCEPT) :].strip() for t in tokens if t.startswith(EXCEPT))
        wanted = [token for token in tokens if not token.startswith(EXCEPT)]
        chosen = tuple(dict.fromkeys(token for token in wanted if token not in ALL_WORDS))
        everything = len(wanted) == 0 or not ALL_WORDS.isdisjoint(wanted)
        return cls(everything, chosen, excluded, explicit=bool(wanted))

    @classmethod
    def from_environ(cls) -> Selection:
        """The selection that the environment variable has."""
        return cls.parse(os.environ.get(VARIABLE))

    @property
    def nothing(self) -> bool:
        """Whether no plugin can be selected, whatever is installed."""
        return not self.everything and not self.chosen

    def rank(self, name: str, distribution: str) -> int | None:
        """The plugin's position in the order of loading; None if it is not selected."""
        names = self._names(name, distribution)
        if not self.excluded.isdisjoint(names):
            return None
        places = [place for place, token in enumerate(self.chosen) if token in names]
        if places:
            return places[0]
        return len(self.chosen) if self.everything else None

    def singles_out(self, name: str, distribution: str) -> bool:
        """Whether the plugin is chosen as ``distribution:name``."""
        return f"{canonical(distribution)}:{canonical(name)}" in self.chosen

    def unknown(self, installed: Iterable[tuple[str, str]]) -> list[str]:
        """The names in the selection that none of `installed`, (name, distribution), has."""
        known = {token for pair in installed for token in self._names(*pair)}
        return [token for token in (*self.chosen, *sorted(self.excluded)) if token not in known]

    @staticmethod
    def _names(name: str, distribution: str) -> frozenset[str]:
        name, distribution = canonical(name), canonical(distribution)
        return frozenset({name, f"{distribution}:{name}"})


def canonical(name: str) -> str:
    """`name` in the spelling in which names are compared."""
    return name.strip().lower().replace("-", "_")


def named(name: str) -> bool:
    """Whether the environment asks for the plugin of that name, by name or by "all".

    False if the variable is not set: a plugin that is merely installed is loaded then, but should
    do nothing that the user has not asked for.
    """
    selection = Selection.from_environ()
    if not selection.explicit:
        return False
    name = canonical(name)
    if name in selection.excluded:
        return False
    return selection.everything or any(c.rpartition(":")[2] == name for c in selection.chosen)
