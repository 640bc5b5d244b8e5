"""Statistics of paired values: a difference, its 95 % interval, and a paired test. Pure.

scipy is imported where it is needed: for Student's distribution, and Wilcoxon's test of many pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import comb, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import Z

LEVEL = 0.95
"""Of the intervals; `Z` is for it, too."""
MOST_EXACT = 100
"""Changes for which Wilcoxon's test is exact; it takes 0.2 s for so many."""


class Difference(NamedTuple):
    """How the second of two values differs from the first, over all pairs.

    Attributes:
        n: pairs.
        first: mean of the first values.
        second: mean of the second ones.
        low: lower end of the interval of the mean difference; None if there are too few pairs.
        high: its upper end.
        p: of the test, two-sided; None if there are too few pairs.
        test: which one.
    """

    n: int
    first: float
    second: float
    low: float | None
    high: float | None
    p: float | None
    test: str

    @property
    def mean(self) -> float:
        """The mean difference."""
        return self.second - self.first


def difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Compare pairs: by McNemar's test if all values are 0 or 1, else by Wilcoxon's."""
    yes_or_no = all(value in (0.0, 1.0) for pair in pairs for value in pair)
    return of_shares(pairs) if yes_or_no else of_numbers(pairs)


def of_shares(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Compare pairs of 0 and 1: McNemar's exact test, and Bonett and Price's interval (2012).

    Unlike the usual interval, theirs holds its level for few pairs, and for shares near 0 and 1.
    """
    n = len(pairs)
    lost, won = (sum(pair == wanted for pair in pairs) for wanted in ((1.0, 0.0), (0.0, 1.0)))
    first, second = (fmean(values) for values in zip(*pairs, strict=True))
    share_lost, share_won = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    centre = share_won - share_lost
    half = Z * sqrt((share_won + share_lost - centre**2) / (n + 2))
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(n, first, second, low, high, mcnemar(won, lost), "McNemar")


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p-value: how likely a fair coin divides the pairs so unevenly."""
    changed = won + lost
    tail = sum(comb(changed, k) for k in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def of_numbers(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Compare pairs of numbers: Wilcoxon's signed-rank test, and Student's interval of the mean."""
    n = len(pairs)
    first, second = (fmean(values) for values in zip(*pairs, strict=True))
    changes = [after - before for before, after in pairs]
    if n < 2:
        return Difference(n, first, second, None, None, None, "Wilcoxon")
    half = float(_scipy().t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(changes) / sqrt(n)
    mean = fmean(changes)
    return Difference(n, first, second, mean - half, mean + half, wilcoxon(changes), "Wilcoxon")


def wilcoxon(changes: Sequence[float]) -> float:
    """The two-sided p-value; pairs without a change do not count, and without others it is 1.

    Exact for up to `MOST_EXACT` changes, also if some are equally large, as numbers of steps are;
    for more by the normal distribution.
    """
    changed = sorted((change for change in changes if change), key=abs)
    if len(changed) > MOST_EXACT:
        return float(_scipy().wilcoxon(changed, method="approx").pvalue)
    ranks: list[int] = []  # Doubled: equally large ones share a mean rank, which may be a half.
    for _, group in groupby(changed, key=abs):
        size, before = len([*group]), len(ranks)
        ranks += [2 * before + size + 1] * size
    total = sum(ranks)
    up = sum(rank for rank, change in zip(ranks, changed, strict=True) if change > 0)
    ways = [1, *[0] * total]  # To set the signs so that those that go up have this sum of ranks.
    for rank in ranks:
        for reached in range(total, rank - 1, -1):
            ways[reached] += ways[reached - rank]
    as_far = 2 * sum(ways[: min(up, total - up) + 1])
    return min(1.0, float(as_far / 2 ** len(changed)))


def _scipy() -> Any:
    from scipy import stats  # type: ignore[import-untyped]

    return stats
