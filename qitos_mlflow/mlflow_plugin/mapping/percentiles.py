"""A bounded sample of a stream of numbers, for percentiles. Pure and deterministic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SIZE = 64
"""Numbers kept. Up to here percentiles are exact; beyond, they are those of an even sample."""


@dataclass
class Sample:
    """Every `stride`-th number seen; whenever there are `SIZE`, every other one is dropped.

    The same stream always gives the same sample, because a replay must log the same percentile. A
    random reservoir would not.
    """

    seen: int = 0
    stride: int = 1
    kept: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Take in the stream's next number."""
        if self.seen % self.stride == 0:
            if len(self.kept) == SIZE:
                self.kept = self.kept[::2]
                self.stride *= 2
            if self.seen % self.stride == 0:
                self.kept.append(round(value, 3))
        self.seen += 1

    def percentile(self, share: float) -> float | None:
        """The smallest number kept that `share` (0 to 1) of them do not exceed; None if none."""
        if not self.kept:
            return None
        return sorted(self.kept)[max(0, math.ceil(share * len(self.kept)) - 1)]

    def to_json(self) -> list[Any]:
        """The sample as plain JSON values."""
        return [self.seen, self.stride, self.kept]

    @classmethod
    def from_json(cls, plain: list[Any]) -> Sample:
        """The sample that `to_json` described."""
        seen, stride, kept = plain
        return cls(seen, stride, list(kept))
