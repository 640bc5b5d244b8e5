"""Objects that fetch or compute what they stand for if they are looked at; they count the looks."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Watched:
    """Counts what is asked of it; `Rows` and the like fetch their data then."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def _ask(self, what: str) -> Any:
        self.asked[what] += 1
        return iter([1, 2])

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # Its copies count together with it.

    def __repr__(self) -> str:
        self._ask("repr")
        return "<QuerySet [1, 2]>"


class Report(Watched):
    """A plain object."""


class Rows(Watched):
    """As Django's query sets."""

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __len__(self) -> int:
        self._ask("len")
        return 2

    def __bool__(self) -> bool:
        self._ask("bool")
        return True

    def __eq__(self, other: object) -> bool:
        self._ask("==")
        return self is other

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        return self._ask("item")

    def __str__(self) -> str:
        self._ask("str")
        return "[1, 2]"

    def keys(self) -> Any:
        return self._ask("keys")

    def __getattr__(self, name: str) -> Any:
        if name == "asked" or name.startswith("__"):
            raise AttributeError(name)
        return self._ask(name)


class Table(Watched):
    """As data frames of engines that compute when they are asked: no length, but a shape."""

    @property
    def shape(self) -> Any:
        self._ask("shape")
        return (2, 2)

    def __array__(self) -> Any:
        return self._ask("array")

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


class Cursor(Watched):
    """Can be read once."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self._ask("next")


class LazyUser(Watched):
    """As Django's `request.user`: it is fetched by whoever asks for its class."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self._ask("class")
        return dict

    def __getitem__(self, index: Any) -> Any:
        return self._ask("item")


class RemotePath(Watched):
    """As paths in a cloud: the file is downloaded to where the path then is."""

    def __fspath__(self) -> str:
        return str(self._ask("path"))


class Patience:
    """A clock that only the `repr` of slow objects moves."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s, self.now_s, self.asked = takes_s, 0.0, 0

    def __call__(self) -> float:
        return self.now_s

    def ask(self) -> str:
        self.now_s += self.takes_s
        self.asked += 1
        return f"<slow {self.asked}>"


class SlowSlots:
    """Its `repr` takes as long as `patience` says. Cannot be weakly referenced."""

    __slots__ = ("patience",)

    def __init__(self, patience: Patience) -> None:
        self.patience = patience

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.patience)

    def __repr__(self) -> str:
        return self.patience.ask()


class Slow(SlowSlots):
    """Can be weakly referenced."""


class SlowAndRaises(Slow):
    """Has no `repr` in the end."""

    def __repr__(self) -> str:
        raise RuntimeError(self.patience.ask())
