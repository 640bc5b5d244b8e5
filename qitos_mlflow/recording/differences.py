"""A value without the parts that another value has, too: what is the same becomes notes.

Works on live values of the agent: compares, copies, and changes nothing. A comparison may run the
code of classes in a value, as the host's own comparison of states does, and raise what that raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from qitos_mlflow.recording.simpler import Budget, SlowTexts, known
from qitos_mlflow.recording.to_json import MAX_CONTAINERS
from qitos_mlflow.redaction import structures

LONG_TEXT, MANY_ITEMS, MANY_ENTRIES = 200, 10, 50
"""A longer text (characters), and more items in a row or entries of an object, are left out if the
other value has them."""

MAX_LEVELS = 60
"""Of what is copied; a value that holds itself has more."""

MORE = "…"
"""Where an object says what is left out of it."""

_PICTURE = frozenset({"media_type", "mime_type", "mimeType", "images"})
"""Fields of an object that is or has a picture. Pictures are recorded once anyway."""
_KEY_LINE = re.compile(r"\s*[A-Za-z0-9+/=]{16}")
_SIMPLE = frozenset({str, int, float, bool, type(None)})

Note = Callable[[int, int, str], str]
"""Says how many are left out, of how many, of what."""
_Runs = Sequence[tuple[int, int]]


def unchanged(count: int, of: int, what: str) -> str:
    """The note for two values that are shown beside each other."""
    return f"[{count} {what}, unchanged]"


class Shorter:
    """Makes one record shorter."""

    def __init__(self, slow: SlowTexts) -> None:
        self._budget = Budget(slow, MAX_CONTAINERS)
        self.note: Note = unchanged
        """Says what is left out."""
        self.or_grown = False
        """Whether a text is left out, too, that the other one begins with."""

    def plain(self, value: Any, old: Any = None, levels: int = MAX_LEVELS) -> Any:
        """A copy of `value` with nothing but what JSON has; with parts of `old` that are the same.

        Raises:
            RecursionError: it has more levels or containers than allowed.
        """
        kind = type(value)
        if kind is dict:
            own: Any = value.copy()
            pairs, was = own.items(), old.get if type(old) is dict else _nothing
        elif kind is list or kind is tuple:
            own, was = [*value], _nothing
            pairs = enumerate(own)
            if type(old) is list and len(old) > MANY_ITEMS and own[: len(old)] == old:
                own[: len(old)] = old
                pairs = enumerate(own[len(old) :], len(old))
        elif kind is str or value is None or kind is int or kind is bool or kind is float:
            return value
        else:
            value = known(value, self._budget)
            return value if type(value) is str else self.plain(value, old, levels - 1)
        self._budget.containers -= 1
        if levels == 0 or self._budget.containers < 0:
            raise RecursionError
        for key, item in pairs:
            kind = type(item)
            if kind is str or item is None or kind is int or kind is bool or kind is float:
                continue
            own[key] = self.plain(item, was(key), levels - 1)
        return tuple(own) if type(value) is tuple else own

    def value(self, new: Any, old: Any) -> Any:
        """`new` with notes in the place of what `old` has, too; `new` itself if that is nothing."""
        kind = type(new)
        if kind is str:
            return self._text(new, old) if len(new) > LONG_TEXT and type(old) is str else new
        if kind is dict:
            return self._dict(new, old) if type(old) is dict else new
        if kind is list or kind is tuple:
            return self._list(new, old) if type(old) in (list, tuple) else new
        if kind in _SIMPLE or type(old) not in (dict, list, tuple):
            return new
        plain = self.plain(new, old)
        brief = self.value(plain, old)
        return new if brief is plain else brief

    def _text(self, new: str, old: str) -> str:
        # What follows in `new` does not stand alone: redaction may have to see what is before it.
        same = new == old or (self.or_grown and old.startswith(new))
        if not same or new.startswith("data:image/"):
            return new
        return self.note(len(new), len(new), "characters")

    def _dict(self, new: dict[Any, Any], old: dict[Any, Any]) -> dict[Any, Any]:
        same: set[Any] = set()
        if len(new) > MANY_ENTRIES:
            same = {key for key, item in new.items() if key in old and item == old[key]}
            same = same if len(same) > MANY_ENTRIES else set()
        changed = {}
        for key, item in new.items():
            kind = type(item)
            if key not in same and (kind not in _SIMPLE or (kind is str and len(item) > LONG_TEXT)):
                brief = self.value(item, old.get(key))
                if brief is not item:
                    changed[key] = brief
        # What redaction has to see together stays together.
        if not (same or changed) or structures.hidden_fields(new) or structures.rows(new):
            return new
        if not _PICTURE.isdisjoint(new):
            return new
        if same:
            left = {key: item for key, item in new.items() if key not in same}
            return {MORE: self.note(len(same), len(old), "entries"), **left, **changed}
        return {**new, **changed}

    def _list(self, new: Sequence[Any], old: Sequence[Any]) -> Sequence[Any]:
        if len(new) > MANY_ITEMS < len(old):
            shift, runs = _same_runs(new, old)
            if not runs:  # An object in it is not what it was recorded as.
                new = self.plain(new)
                shift, runs = _same_runs(new, old)
            if runs:
                return new if _is_one(new, runs) else self._runs(new, old, shift, runs)
        changed = {}
        for index, (item, was) in enumerate(zip(new, old, strict=False)):
            if type(item) not in _SIMPLE or (type(item) is str and len(item) > LONG_TEXT):
                brief = self.value(item, was)
                if brief is not item:
                    changed[index] = brief
        if not changed or _is_one(new, []):
            return new
        return [changed.get(index, item) for index, item in enumerate(new)]

    def _runs(self, new: Sequence[Any], old: Sequence[Any], shift: int, runs: _Runs) -> list[Any]:
        shown: list[Any] = []
        at = 0
        for start, end in (*runs, (len(new), len(new))):
            for index in range(at, start):
                inside = 0 <= index - shift < len(old)
                shown.append(self.value(new[index], old[index - shift]) if inside else new[index])
            if start < end:
                text = self.note(end - start, len(old), "items")
                # Redaction knows a table by the form of its rows.
                row = type(new[start]) in (list, tuple)
                shown.append([text, *[MORE] * (len(new[start]) - 1)] if row else text)
            at = end
        return shown


def _nothing(key: Any) -> None:
    return None


def _same_runs(new: Sequence[Any], old: Sequence[Any]) -> tuple[int, _Runs]:
    """How far the items of `old` have moved, and where many items in a row are the same."""
    shift = _shift(new, old)
    start, last = max(0, shift), min(len(new), len(old) + shift)
    if new[start:last] == old[start - shift : last - shift]:  # Most often, and fast.
        return shift, [(start, last)] if last - start > MANY_ITEMS else []
    runs = []
    for index in range(start, last + 1):
        if index == last or new[index] != old[index - shift]:
            if index - start > MANY_ITEMS:
                runs.append((start, index))
            start = index + 1
    return shift, runs


def _shift(new: Sequence[Any], old: Sequence[Any]) -> int:
    """How far the last item of `old` has moved in `new`: 0 if it is where it was, or gone."""
    both = min(len(new), len(old))
    if new[both - 1] == old[both - 1]:
        return 0
    for index in range(len(new) - 1, -1, -1):
        if new[index] == old[-1]:
            return index - (len(old) - 1)
    return 0


def _is_one(items: Sequence[Any], runs: _Runs) -> bool:
    """Whether redaction has to see the list as a whole: a table, a command, a key's lines."""
    if structures.head_columns(items) is not None or structures.is_command(items):
        return True
    if any(type(items[end - 1]) is str and items[end - 1].startswith("--") for _, end in runs):
        return True
    ends = [0, *(end for _, end in runs)]
    starts = [*(start for start, _ in runs), len(items)]
    shown = chain.from_iterable(items[end:start] for end, start in zip(ends, starts, strict=True))
    return any(map(_may_be_key, shown)) and any(structures.is_in_key(item, False) for item in items)


def _may_be_key(item: Any) -> bool:
    """Whether `item`, a text or an object with one, may be a line of a private key."""
    texts = item.values() if type(item) is dict else (item,)
    return any(type(text) is str and _KEY_LINE.match(text) for text in texts)
