"""What the models of one row say of the attack's success and of accuracy, and what two rows say of each other.

What is averaged are goals. Models that were trained on the poisons of the same goal share them, and so do the images
of a goal; they say little more than one. A goal with several models, or with many images, thus counts once, by the
mean of its rates. The goals of one seed share the data, and in some attacks the surrogates; they count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri

from friends.bench.grid.record import Record
from friends.bench.statistics import (
    clopper_pearson,
    difference_interval,
    mean_interval,
    paired_p,
    trials_needed,
    wilson,
)

FAR_APART = (0.2, 0.5)
"""Two success rates that a row should be able to tell from each other."""
LEAST_PAIRS = 6
"""With fewer pairs no paired test reaches p < 0.05: of five, all falling to one side happens in 2 of 32 cases."""


@dataclass(frozen=True)
class Estimate:
    """A mean, and a 95 % interval for it.

    Args:
        mean: over ``n`` values.
        low, high: the interval; 0 and 1 where one value leaves it open.
        n: how many values: goals, or models where each has its own goal.
        std: their standard deviation; 0 for one value.
        kind: how the interval was made, such as ``"Clopper-Pearson"`` or ``"t over 8 goals"``.
    """

    mean: float
    low: float
    high: float
    n: int
    std: float
    kind: str

    @property
    def is_open(self) -> bool:
        """Whether there is no interval, for want of a second value."""
        return self.kind == OPEN


OPEN = "one value: no interval"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row beside the undefended models of the same seeds, goals and victims.

    Args:
        pairs: models of the row that have such a partner.
        goals: goals among them: what the test counts.
        both, only_a, only_b, neither: goals won in both, more in the undefended model (a), more in the defended one
            (b), and in neither; where goals have many images, "more" compares rates, and "both" are equal rates.
        difference: mean success of the row minus that of the undefended models; negative where the defense helps.
        low, high: a 95 % interval for it.
        p: two-sided, exact or of 100,000 sign flips: :func:`friends.bench.statistics.paired_p`.
        p_holm: adjusted by Holm for all rows of the point.
        test: what p comes from.
    """

    pairs: int
    goals: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    test: str


def by_goal(records: Iterable[Record], name: str = "rate") -> list[float]:
    """The mean of a number over the models of each goal, goal by goal."""
    found: dict[tuple[int, int], list[float]] = {}
    for record in records:
        found.setdefault((record.seed, record.goal), []).append(float(getattr(record, name)))
    return [math.fsum(some) / len(some) for some in found.values()]


def success_of(records: Sequence[Record]) -> Estimate:
    """The attack's success over goals.

    One model and one image a goal: trials that are won or lost, with the interval of Clopper and Pearson. Otherwise
    the t interval over the goals' rates, cut to [0, 1]; rates without any spread have Wilson's, since their t interval
    would claim certainty.

    Raises:
        ValueError: no record.
    """
    rates = by_goal(records)
    n, mean = len(rates), math.fsum(rates) / max(1, len(rates))
    if n == len(records) and all(record.images == 1 for record in records):
        low, high = clopper_pearson(sum(record.hits for record in records), n)
        return Estimate(mean, low, high, n, _std(rates), "Clopper-Pearson")
    if n > 1 and max(rates) - min(rates) < 1e-12:
        return Estimate(mean, *wilson(math.fsum(rates), n), n, 0.0, f"Wilson over {n} equal goals")
    return estimate(rates)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of shares, one a goal, with its t interval."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, 0.0, 1.0, 1, 0.0, OPEN)
    low, high = mean_interval(values)
    return Estimate(mean, max(0.0, low), min(1.0, high), n, _std(values), f"t over {n} goals")


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def compare(undefended: Sequence[Record], defended: Sequence[Record]) -> Comparison | None:
    """Two rows on the goals and victims that they share; none if there are none. Its ``p_holm`` is not adjusted."""
    others = {record.pair: record for record in undefended}
    shared = [(others[record.pair], record) for record in defended if record.pair in others]
    if not shared:
        return None
    a, b = (by_goal(pair[i] for pair in shared) for i in (0, 1))
    sides = list(zip(a, b, strict=True))
    p, (low, high) = paired_p(a, b), difference_interval(a, b)
    won_or_lost = all(rate in (0, 1) for rate in (*a, *b))
    return Comparison(
        pairs=len(shared),
        goals=len(sides),
        both=sum(x == y > 0 for x, y in sides),
        only_a=sum(x > y for x, y in sides),
        only_b=sum(x < y for x, y in sides),
        neither=sum(x == y == 0 for x, y in sides),
        difference=math.fsum(y - x for x, y in sides) / len(sides),
        low=low,
        high=high,
        p=p,
        p_holm=p,
        test="exact McNemar test" if won_or_lost else "sign-flip test",
    )


def goals_needed(success: Estimate, *, one_image: bool = True) -> int:
    """How many goals tell :data:`FAR_APART` rates from each other in four cases of five.

    Rates over many images vary less than coins. How much is seen from the goals themselves, and believed as far as they
    are many: what counts is the upper 80 % limit of their variance.
    """
    needed = trials_needed(*FAR_APART)
    if one_image or success.n < 2:
        return needed
    variance = success.std**2 * (success.n - 1) / float(chdtri(success.n - 1, 0.8))
    return max(LEAST_PAIRS, math.ceil(needed * min(1.0, variance / 0.25)))  # 0.25: of a fair coin


def few_text(n: int, *needed: int) -> str:
    """A sentence if ``n`` goals are fewer than needed, else nothing."""
    if n >= max(needed):
        return ""
    low, high = (f"{100 * rate:g} %" for rate in FAR_APART)
    least, most = min(needed), max(needed)
    enough = f"{least}" if least == most else f"{least} to {most}"
    return f"{n} {'trial' if n == 1 else 'trials'}: too few to tell {low} from {high}; {enough} would"
