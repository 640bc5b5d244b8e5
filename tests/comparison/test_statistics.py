"""Differences, intervals and tests, against values that are computed here in another way."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product
from math import comb, erf, sqrt

import pytest

from qitos_mlflow.comparison.statistics import (
    MOST_EXACT,
    difference,
    mcnemar,
    of_numbers,
    of_shares,
    wilcoxon,
)

T_975 = {1: 12.7062, 4: 2.7764, 9: 2.2622, 29: 2.0452}
"""Student's 97.5 % quantiles by degrees of freedom, from a printed table."""


def signs(changes: list[float]) -> Fraction:
    """Wilcoxon's exact p-value by all ways to set the signs."""
    sizes = sorted(map(abs, changes))
    places = {size: [n for n, one in enumerate(sizes, 1) if one == size] for size in sizes}
    ranks = [Fraction(sum(places[abs(change)]), len(places[abs(change)])) for change in changes]
    middle = sum(ranks) / 2
    far = abs(sum(rank for rank, one in zip(ranks, changes, strict=True) if one > 0) - middle)
    every = [*product((0, 1), repeat=len(changes))]
    as_far = sum(
        abs(sum(rank * up for rank, up in zip(ranks, ups, strict=True)) - middle) >= far
        for ups in every
    )
    return Fraction(as_far, len(every))


@pytest.mark.parametrize("won", range(9))
@pytest.mark.parametrize("lost", range(9))
def test_mcnemar_is_a_fair_coins_p_value(won: int, lost: int) -> None:
    """By all ways in which the coin can fall that are at most as likely."""
    n = won + lost
    ways = sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, won))
    assert mcnemar(won, lost) == pytest.approx(ways / 2**n, rel=1e-12)


def test_mcnemar_of_a_textbook() -> None:
    """6 of 7 tasks that flipped were won: 2 * (C(7,0) + C(7,1)) / 2^7."""
    assert mcnemar(6, 1) == 16 / 128
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == 2 / 1024


def pairs_of(both: int, won: int, lost: int, neither: int) -> list[tuple[float, float]]:
    cells = {(1.0, 1.0): both, (0.0, 1.0): won, (1.0, 0.0): lost, (0.0, 0.0): neither}
    return [pair for pair, number in cells.items() for _ in range(number)]


def test_shares_by_the_formula() -> None:
    """Bonett and Price (2012): one pair more in each cell that changed."""
    found = of_shares(pairs_of(20, 8, 3, 9))
    assert (found.n, found.first, found.second) == (40, 23 / 40, 28 / 40)
    assert found.mean == pytest.approx(5 / 40)
    won, lost = 9 / 42, 4 / 42
    half = 1.959964 * sqrt((won + lost - (won - lost) ** 2) / 42)
    assert found.low == pytest.approx(won - lost - half, abs=1e-6)
    assert found.high == pytest.approx(won - lost + half, abs=1e-6)
    assert found.p == pytest.approx(2 * sum(comb(11, k) for k in range(4)) / 2**11)
    assert found.test == "McNemar"


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_interval_of_shares_holds_its_level(share: float) -> None:
    """In 2000 drawn evaluations of 40 tasks it has the true difference in about 95 %."""
    drawn = random.Random(1)
    inside = 0
    for _ in range(2000):
        won = lost = 0
        for _ in range(40):
            value = drawn.random()
            won, lost = won + (value < share), lost + (share <= value < 1.5 * share)
        found = of_shares(pairs_of(0, won, lost, 40 - won - lost))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= share - 0.5 * share <= found.high
    assert 0.93 <= inside / 2000 <= 0.995


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_wilcoxon_by_all_signs(seed: int, n: int) -> None:
    drawn = random.Random(seed)
    changes = [drawn.uniform(-1, 2) for _ in range(n)]
    assert wilcoxon(changes) == pytest.approx(float(signs(changes)), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_wilcoxon_with_ties_by_all_signs(seed: int) -> None:
    """Numbers of steps often change by as much; tasks without a change do not count."""
    drawn = random.Random(seed)
    changes = [float(drawn.choice((-2, -1, 1, 1, 2, 3))) for _ in range(9)]
    assert wilcoxon([*changes, 0.0, 0.0]) == pytest.approx(float(signs(changes)), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_wilcoxon_of_many_by_the_normal_distribution(seed: int) -> None:
    """Mean ranks, and a variance that is less by the ties; near the exact value below the bound."""
    drawn = random.Random(seed)
    changes = [float(drawn.choice((-3, -2, -1, 1, 2, 3, 4))) for _ in range(MOST_EXACT + 20)]

    def by_formula(changes: list[float]) -> float:
        n, sizes = len(changes), sorted(map(abs, changes))
        groups = {size: sizes.count(size) for size in sizes}
        rank = {size: sizes.index(size) + (groups[size] + 1) / 2 for size in sizes}
        up = sum(rank[abs(change)] for change in changes if change > 0)
        ties = sum(size**3 - size for size in groups.values()) / 48
        z = (up - n * (n + 1) / 4) / sqrt(n * (n + 1) * (2 * n + 1) / 24 - ties)
        return 1 - erf(abs(z) / sqrt(2))

    assert wilcoxon(changes) == pytest.approx(by_formula(changes), rel=1e-6)
    some = changes[:MOST_EXACT]
    assert wilcoxon(some) == pytest.approx(by_formula(some), abs=0.01)


def test_nothing_changed() -> None:
    assert wilcoxon([0.0] * 5) == 1.0
    found = of_numbers([(3.0, 3.0)] * 5)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("n", [2, 5, 10, 30])
def test_numbers_by_the_formula(n: int) -> None:
    """The interval is Student's, around the mean difference."""
    drawn = random.Random(n)
    pairs = [
        (before := drawn.uniform(100, 200), before * drawn.uniform(0.5, 1.2)) for _ in range(n)
    ]
    changes = [after - before for before, after in pairs]
    mean = sum(changes) / n
    spread = sqrt(sum((change - mean) ** 2 for change in changes) / (n - 1))
    found = of_numbers(pairs)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - T_975[n - 1] * spread / sqrt(n), rel=1e-3)
    assert found.high == pytest.approx(mean + T_975[n - 1] * spread / sqrt(n), rel=1e-3)


def test_one_pair_says_little() -> None:
    """No interval and no test for one pair of numbers."""
    found = of_numbers([(1.0, 3.0)])
    assert (found.n, found.mean, found.low, found.high, found.p) == (1, 2.0, None, None, None)


def test_the_values_decide_the_test() -> None:
    assert difference([(0.0, 1.0), (1.0, 1.0)]).test == "McNemar"
    assert difference([(0.0, 1.0), (1.0, 2.0)]).test == "Wilcoxon"
