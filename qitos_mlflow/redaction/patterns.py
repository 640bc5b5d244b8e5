"""Patterns that are compiled when a text first needs them, not when the package is imported."""

from __future__ import annotations

import re
from typing import Any, AnyStr, cast


class _Lazy:
    def __init__(self, pattern: str | bytes) -> None:
        self.pattern = pattern

    def __getattr__(self, name: str) -> Any:
        """A method of the compiled pattern, which from now on is this object's, too."""
        method = getattr(re.compile(self.pattern), name)
        setattr(self, name, method)
        return method


def lazily(pattern: AnyStr) -> re.Pattern[AnyStr]:
    """What `re.compile` makes of `pattern`, as soon as it is used.

    All patterns of this package take 40 ms. The first trace's spooling thread compiles those that
    its texts need.
    """
    return cast("re.Pattern[AnyStr]", _Lazy(pattern))
