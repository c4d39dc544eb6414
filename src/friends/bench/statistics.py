"""How sure a few successes out of a few trials make us: two intervals for one arm, one test between two arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import betaincinv


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a success rate. Sensible at 0 and n successes too, where the naive one is empty.

    Successes may be fractions: with n goals of which each is judged on many images, the sum of their rates. As a rate
    in [0, 1] varies no more than a coin of the same mean, the interval is then as a rule wider than it need be.

    Raises:
        ValueError: no trial, more successes than trials, or a level outside (0, 1).
    """
    _check_count(successes, n, level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # rounding would leave 1e-17
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact (conservative) interval for a success rate, from quantiles of the beta distribution.

    Raises:
        ValueError: no trial, more successes than trials, or a level outside (0, 1).
    """
    _check_count(successes, n, level)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p-value that two arms differ, from the goals on which they disagree.

    Arms share goals, seeds and poisons, so only goals that one arm lost and the other kept say anything: under
    "no difference" each of them falls either way like a fair coin. 1 if the arms agree everywhere.

    Args:
        a: per goal, whether the attack succeeded in the first arm.
        b: the same goals in the second arm.

    Raises:
        ValueError: the arms do not share their goals.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same goals in both arms, not {len(a)} and {len(b)}")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that two arms differ, from their success rates on the same goals.

    Where every goal is won or lost this is :func:`mcnemar_exact`. Otherwise it is the sign-flip test of the mean
    difference: under "no difference" each goal's difference is as likely to have the other sign. Up to 16 goals that
    differ, all sign patterns are counted and p is exact; beyond, 100,000 random ones with a fixed seed and the one that
    was seen, so that p is never below 1e-5.

    Raises:
        ValueError: the arms do not share their goals.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same goals in both arms, not {len(a)} and {len(b)}")
    if all(rate in (0, 1) for rate in (*a, *b)):
        return mcnemar_exact([rate == 1 for rate in a], [rate == 1 for rate in b])
    differences = np.array([x - y for x, y in zip(a, b, strict=True) if x != y])
    if len(differences) == 0:
        return 1.0
    few = len(differences) <= 16
    if few:
        patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
    else:
        patterns = np.random.default_rng(0).integers(0, 2, (100_000, len(differences)))
    extreme = np.abs((2 * patterns - 1) @ differences) >= abs(differences.sum()) - 1e-12
    return float(extreme.mean()) if few else float((1 + extreme.sum()) / (1 + len(extreme)))


def _check_count(successes: float, n: int, level: float) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials: at least one trial and 0 <= successes <= n expected")
    if not 0 < level < 1:
        raise ValueError(f"a confidence level is in (0, 1), not {level!r}: 0.95 is usual")


def standard_error(rate: float, n: int) -> float:
    """The binomial standard error of a rate, ``sqrt(p (1 - p) / n)``: what Table 2 of the FRIENDS paper prints."""
    _check_rate(rate, n)
    return math.sqrt(rate * (1 - rate) / n)


def variance_over_root_n(rate: float, n: int) -> float:
    """``p (1 - p) / sqrt(n)``: what Table 1 of the FRIENDS paper prints behind its plus-minus signs.

    A variance over the root of n is no standard error, and at most half of one; it is here to recognise those figures.
    """
    _check_rate(rate, n)
    return rate * (1 - rate) / math.sqrt(n)


def _check_rate(rate: float, n: int) -> None:
    if not 0 <= rate <= 1 or n < 1:
        raise ValueError(f"a rate in [0, 1] of at least one trial expected, not {rate} of {n}")
