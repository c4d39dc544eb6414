"""How sure a few trials make us: intervals for one arm, tests and intervals for two, and how many trials it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import betaincinv, stdtrit


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
    _check_level(level)


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


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval for the mean of independent values, such as one success rate a goal.

    Values that are all the same give an interval without width: whoever knows more of them, such as that they are
    rates, does better there with :func:`wilson`.

    Raises:
        ValueError: fewer than two values, which say nothing of their spread, or a level outside (0, 1).
    """
    _check_level(level)
    if len(values) < 2:
        raise ValueError(f"an interval from the spread of values needs two of them or more, not {len(values)}")
    n, mean = len(values), math.fsum(values) / len(values)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def difference_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """An interval for the mean of ``b - a``, from success rates in [0, 1] on the same goals; within [-1, 1].

    Rates get the t interval of their differences. Where every goal is won or lost, or all differences are the same,
    it is the adjusted Wald interval of Bonett and Price (2012), which adds one goal to either side: the spread of
    three equal differences would claim certainty.

    Raises:
        ValueError: no goal, the arms do not share their goals, or a level outside (0, 1).
    """
    _check_level(level)
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired interval needs the same goals in both arms, not {len(a)} and {len(b)}")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    if all(rate in (0, 1) for rate in (*a, *b)) or max(differences) - min(differences) < 1e-12:
        n = len(differences) + 2
        more = (math.fsum(d for d in differences if d > 0) + 1) / n
        less = (math.fsum(-d for d in differences if d < 0) + 1) / n
        centre = more - less
        half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt((more + less - centre * centre) / n)
        low, high = centre - half, centre + half
    else:
        low, high = mean_interval(differences, level)
    return max(-1.0, low), min(1.0, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values that are looked at together, in their order.

    To call those below 0.05 different is wrong anywhere among them in at most 5 % of cases, whatever their dependence.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"a p-value is in [0, 1], not {wrong[0]!r}")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def trials_needed(p1: float, p2: float, alpha: float = 0.05, power: float = 0.8, *, paired: bool = False) -> int:
    """How many goals an arm must have so that a two-sided test tells two success rates apart.

    The usual normal approximations: of the comparison of two independent proportions, or, ``paired``, of McNemar's
    test where the arms share goals but succeed independently of each other. Arms that fail on the same goals need
    fewer; the exact tests need a few more.

    Raises:
        ValueError: a rate, level or power outside its range, or equal rates, which no number of trials tells apart.
    """
    if not (0 <= p1 <= 1 and 0 <= p2 <= 1) or p1 == p2:
        raise ValueError(f"two different rates in [0, 1] expected, not {p1} and {p2}")
    if not (0 < alpha < 1 and 0 < power < 1):
        raise ValueError(f"alpha and power are in (0, 1), not {alpha} and {power}")
    z_alpha, z_beta = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    gap = abs(p1 - p2)
    if paired:
        discordant = p1 * (1 - p2) + p2 * (1 - p1)
        null, other = discordant, discordant - gap * gap
    else:
        mean = (p1 + p2) / 2
        null, other = 2 * mean * (1 - mean), p1 * (1 - p1) + p2 * (1 - p2)
    return math.ceil(((z_alpha * math.sqrt(null) + z_beta * math.sqrt(other)) / gap) ** 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level is in (0, 1), not {level!r}: 0.95 is usual")
