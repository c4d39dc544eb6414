"""Intervals from spreads, intervals of paired differences, Holm's adjustment, and how many trials a claim needs."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, multinomial, norm, t

from friends.bench.statistics import difference_interval, holm, mean_interval, trials_needed


def test_the_t_interval_of_four_numbers_by_hand() -> None:
    low, high = mean_interval([1, 2, 3, 4])
    half = 3.182446 * 1.290994 / 2  # quantile of t with 3 degrees of freedom, standard deviation, root of 4
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_t_interval_agrees_with_scipy(level: float) -> None:
    values = np.random.default_rng(1).normal(0.8, 0.1, 9)
    expected = t.interval(level, 8, values.mean(), values.std(ddof=1) / 3)
    assert mean_interval(values.tolist(), level) == pytest.approx(expected)


def test_the_t_interval_of_equal_values_has_no_width() -> None:
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("values", [[], [0.5]])
def test_an_interval_from_the_spread_of_one_value_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"two of them or more, not {len(values)}"):
        mean_interval(values)
    with pytest.raises(ValueError, match=r"level is in \(0, 1\), not 95"):
        mean_interval([0.1, 0.2], 95)


def test_the_paired_interval_of_bonett_and_price_by_hand() -> None:
    # of 8 goals 7 were won in the first arm alone: (7 + 1) / 10 and (0 + 1) / 10 discordant
    half = 1.959964 * math.sqrt((0.8 + 0.1 - 0.7**2) / 10)
    assert difference_interval([1] * 7 + [0], [0] * 8) == pytest.approx((-1, -0.7 + half), abs=1e-5)
    assert difference_interval([0] * 8, [1] * 7 + [0]) == pytest.approx((0.7 - half, 1), abs=1e-5)


def test_the_paired_interval_covers_the_truth() -> None:
    """Exactly, over everything that twelve pairs can bring: at least 93 % for a 95 % interval."""
    n = 12
    for more, less in [(0.0, 0.05), (0.1, 0.1), (0.0, 0.5), (0.2, 0.6), (0.05, 0.9), (0.3, 0.3)]:
        covered = 0.0
        for up, down in product(range(n + 1), repeat=2):
            if up + down > n:
                continue
            a, b = [0] * up + [1] * down + [1] * (n - up - down), [1] * up + [0] * down + [1] * (n - up - down)
            low, high = difference_interval(a, b)
            weight = multinomial.pmf([up, down, n - up - down], n, [more, less, 1 - more - less])
            covered += weight * (low <= more - less <= high)
        assert covered > 0.93, (more, less)


def test_the_paired_interval_of_rates_is_that_of_their_differences() -> None:
    a, b = [0.9, 0.8, 0.7, 0.95], [0.2, 0.3, 0.1, 0.25]
    assert difference_interval(a, b) == pytest.approx(mean_interval([y - x for x, y in zip(a, b, strict=True)]))


def test_equal_differences_do_not_claim_certainty() -> None:
    low, high = difference_interval([0.75, 0.5], [0.25, 0.0])
    assert low < -0.5 < high
    assert high - low > 0.5
    low, high = difference_interval([0.5], [0.5])
    assert (low, high) == pytest.approx((-high, high))
    assert high > 0.5


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_a_paired_interval_holds_no_impossible_difference_and_turns_round_with_its_arms(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    low, high = difference_interval(a, b)
    assert -1 <= low <= high <= 1
    assert difference_interval(b, a) == pytest.approx((-high, -low), abs=1e-9)


def test_a_paired_interval_needs_the_same_goals() -> None:
    with pytest.raises(ValueError, match="not 1 and 2"):
        difference_interval([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="not 0 and 0"):
        difference_interval([], [])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"1\.5"):
        holm([0.1, 1.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_value_nor_exceeds_bonferroni_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) or q == 1.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_trials_needed_by_hand() -> None:
    assert trials_needed(0.5, 0.75) == trials_needed(0.75, 0.5) == 58  # the example of many textbooks
    assert trials_needed(0.2, 0.5) == 39
    assert trials_needed(0.2, 0.5, power=0.9) == 52
    assert trials_needed(0.2, 0.5, alpha=0.01) == 58
    # McNemar, independent arms: discordant 0.75^2 + 0.25^2 = 0.625, gap 0.5
    by_hand = ((1.959964 * math.sqrt(0.625) + 0.841621 * math.sqrt(0.375)) / 0.5) ** 2
    assert trials_needed(0.75, 0.25, paired=True) == math.ceil(by_hand) == 18


@pytest.mark.parametrize(("p1", "p2"), [(0.2, 0.5), (0.5, 0.75), (0.1, 0.3)])
def test_that_many_trials_have_the_power(p1: float, p2: float) -> None:
    """Exactly, by the chance of every pair of counts, for the test of two proportions without a correction."""
    n = trials_needed(p1, p2)
    x, y = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    pooled = np.clip((x + y) / (2 * n), 1e-9, 1 - 1e-9)
    z = np.abs(x - y) / n / np.sqrt(2 * pooled * (1 - pooled) / n)
    power = ((z > norm.ppf(0.975)) * binom.pmf(x, n, p1) * binom.pmf(y, n, p2)).sum()
    assert 0.76 < power < 0.86


def test_no_number_of_trials_tells_equal_rates_apart() -> None:
    with pytest.raises(ValueError, match=r"0\.3 and 0\.3"):
        trials_needed(0.3, 0.3)
    with pytest.raises(ValueError, match="20 and 50"):
        trials_needed(20, 50)
    with pytest.raises(ValueError, match="alpha and power"):
        trials_needed(0.2, 0.5, alpha=0)
