"""What a row says: which interval, which test, what may not be averaged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import record_samples as samples
from scipy.stats import binomtest

from friends.bench.grid.estimates import OPEN, success_of
from friends.bench.grid.record import Record
from friends.bench.grid.summary import Summary, summarise
from friends.bench.statistics import clopper_pearson, mean_interval, paired_p, wilson


def named(records: list[Record], **changes: Any) -> dict[str, Summary]:
    return {s.defense: s for s in summarise(records, **changes)}


def test_goals_of_one_image_have_the_exact_binomial_interval() -> None:
    row = named(samples.table1())["friends-b"]
    assert (row.hits, row.trials, row.images, row.success.n) == (1, 8, 8, 8)
    assert row.success.mean == 1 / 8
    low, high = clopper_pearson(1, 8)
    assert (row.success.low, row.success.high) == (low, high)
    exact = binomtest(1, 8).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    assert row.success.kind == "Clopper-Pearson"
    assert row.success.std == pytest.approx((7 * (1 / 8) ** 2 / 7 + (7 / 8) ** 2 / 7) ** 0.5)


def test_goals_of_many_images_have_the_t_interval_over_goals() -> None:
    row = named(samples.table2())["friends-b"]
    assert (row.hits, row.images, row.trials) == (850, 4000, 4)
    assert row.success.mean == pytest.approx(0.2125)
    assert (row.success.low, row.success.high) == pytest.approx(mean_interval([0.2, 0.3, 0.1, 0.25]))
    assert row.success.kind == "t over 4 goals"
    high = named(samples.table2())["undefended"].success.high
    assert high == 1.0  # cut: the t interval itself goes beyond


def test_several_models_of_one_goal_count_once() -> None:
    """Ten models on each of two goals, one goal always won: the success rate is known to two goals, not to twenty."""
    many = [samples.record(seed=seed, victim=v, hits=1 - seed) for seed in (0, 1) for v in range(10)]
    row = named(many)["undefended"]
    assert (row.trials, row.hits, row.success.n) == (20, 10, 2)
    low, high = clopper_pearson(10, 20)
    assert row.success.high - row.success.low > 1.5 * (high - low)
    uneven = [samples.record(seed=0, victim=v, hits=int(v < 3)) for v in range(4)]
    uneven += [samples.record(seed=1, victim=v, hits=int(v < 1)) for v in range(4)]
    success = success_of(uneven)
    assert success.kind == "t over 2 goals"
    assert success.mean == pytest.approx(0.5)


def test_rates_without_spread_do_not_claim_certainty() -> None:
    success = success_of(samples.backdoor_row("undefended", (1.0, 1.0, 1.0)))
    assert (success.low, success.high) == wilson(3, 3)
    assert success.kind == "Wilson over 3 equal goals"
    one = success_of(samples.backdoor_row("undefended", (0.4,)))
    assert (one.low, one.high, one.kind, one.std) == (0, 1, OPEN, 0)
    assert one.is_open


def test_accuracy_is_a_mean_over_models_with_its_t_interval() -> None:
    row = named(samples.table1())["friends-b"]
    assert row.accuracy.mean == pytest.approx(0.915)
    values = [r.accuracy for r in row.records]
    assert (row.accuracy.low, row.accuracy.high) == pytest.approx(mean_interval(values))
    strip = named(samples.table2())["strip"]
    assert (strip.accuracy.mean, strip.selective.mean) == pytest.approx((0.80, 0.92))
    assert strip.abstained == 1200


def test_a_row_is_compared_with_the_undefended_models_of_the_same_goals() -> None:
    rows = named(samples.table1())
    versus = rows["friends-b"].versus
    assert versus
    # undefended "xxxxxx.x", friends-b "......x."
    assert (versus.both, versus.only_a, versus.only_b, versus.neither) == (0, 7, 1, 0)
    assert versus.difference == pytest.approx(-6 / 8)
    assert versus.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert versus.test == "exact McNemar test"
    assert rows["undefended"].versus is rows["clean"].versus is None
    same = rows["deep-knn"].versus
    assert same
    assert (same.both, same.neither, same.p, same.difference) == (7, 1, 1.0, 0.0)


def test_rates_are_compared_by_sign_flips() -> None:
    versus = named(samples.table2())["friends-b"].versus
    assert versus
    assert versus.p == paired_p([0.9, 0.8, 0.7, 0.95], [0.2, 0.3, 0.1, 0.25]) == 2 / 2**4
    assert versus.test == "sign-flip test"
    assert (versus.both, versus.only_a, versus.only_b, versus.neither) == (0, 4, 0, 0)


def test_p_values_of_a_point_are_adjusted_together() -> None:
    rows = named(samples.table1())
    raw = {name: row.versus.p for name, row in rows.items() if row.versus}
    adjusted = {name: row.versus.p_holm for name, row in rows.items() if row.versus}
    assert raw["epic-0.1"] == pytest.approx(2 / 2**7)
    assert adjusted["epic-0.1"] == pytest.approx(3 * raw["epic-0.1"])
    assert adjusted["friends-b"] == pytest.approx(2 * raw["friends-b"])
    assert adjusted["deep-knn"] == 1.0
    alone = summarise(samples.table3())[1].versus  # another point does not count
    assert alone
    assert alone.p == alone.p_holm


def test_only_common_goals_are_compared() -> None:
    records = samples.row("undefended", "xxxx") + samples.row("friends-b", "..")
    versus = named(records)["friends-b"].versus
    assert versus
    assert (versus.pairs, versus.goals, versus.only_a) == (2, 2, 2)
    assert named(samples.row("friends-b", ".."))["friends-b"].versus is None
    apart = [samples.record(seed=0), samples.record("friends-b", seed=1)]
    assert named(apart)["friends-b"].versus is None


def test_the_control_is_that_of_the_rows_own_goals() -> None:
    records = samples.row("clean", "..xx") + samples.row("friends-b", "..")
    rows = named(records)
    control = rows["friends-b"].control
    assert control
    assert (control.mean, control.n) == (0.0, 2)
    assert rows["clean"].control is None
    assert named(samples.row("friends-b", ".."))["friends-b"].control is None


def test_rows_come_undefended_first_then_the_control_point_by_point() -> None:
    records = list(reversed(samples.table1())) + samples.table3()
    names = [s.defense for s in summarise(records)]
    assert names[:5] == ["undefended", "clean", "epic-0.1", "deep-knn", "friends-b"]
    points = [(s.labels["attack"], s.defense) for s in summarise(records)[5:]]
    assert points == [
        ("gradient-matching-8", "undefended"),
        ("gradient-matching-8", "friends-b"),
        ("gradient-matching-16", "undefended"),
        ("gradient-matching-16", "friends-b"),
    ]


def test_times_are_medians_and_what_was_removed_means() -> None:
    some = [samples.record("epic", seed=i, seconds={"training": float(s)}) for i, s in enumerate((1, 2, 90))]
    some[0] = replace(some[0], removed=(30, 10, 500), joules={"training, cpu": 5.0})
    row = named(some)["epic"]
    assert row.seconds == {"training": 2.0}
    assert row.seconds_of_training == 2.0
    assert row.removed == pytest.approx((10, 10 / 3, 500))  # two models removed nothing
    assert row.joules == {"training, cpu": 5.0}
    assert named(samples.table1())["friends-b"].removed == ()


def test_few_trials_are_said_to_be_few() -> None:
    assert named(samples.table1())["friends-b"].few == "8 trials: too few to tell 20 % from 50 %; 39 would"
    assert named(samples.row("undefended", "x."))["undefended"].few.startswith("2 trials")
    assert named(samples.row("undefended", "x"))["undefended"].few.startswith("1 trial:")
    assert named(samples.row("undefended", "x." * 20))["undefended"].few == ""
    rates = named(samples.backdoor_row("undefended", (0.1, 0.2, 0.15, 0.1, 0.12, 0.18)))
    assert rates["undefended"].few == ""  # rates that hardly vary
    calm = named(samples.backdoor_row("undefended", (0.1, 0.2, 0.15)))
    assert calm["undefended"].few.endswith("6 would")  # three pairs never reach p < 0.05
    # the spread of two rates is hardly known: variance 0.005, its upper 80 % limit 0.005 / 0.06418, of a coin's 0.25
    two = named(samples.backdoor_row("undefended", (0.9, 0.8)))["undefended"]
    assert two.needed == 13 == math.ceil(39 * 0.005 / 0.06418 / 0.25)
    wild = named(samples.backdoor_row("undefended", (0.0, 1.0, 0.0, 1.0, 0.0, 1.0)))
    assert wild["undefended"].few.endswith("39 would")


MIXTURES: list[tuple[Callable[[Record], Record], str]] = [
    (lambda r: replace(r, code="new"), r"their code \(c0de and new\)"),
    (lambda r: replace(r, scaled_down="few images"), "their size .*'full size' and paper 'few images'"),
    (lambda r: replace(r, preset="small"), "their size"),
    (lambda r: replace(r, settings={**r.settings, "recipe": {"epochs": 40}}), "the setting recipe .*40"),
    (lambda r: replace(r, settings={**r.settings, "batchnorm": "train"}), "the setting batchnorm .*None and train"),
    (lambda r: replace(r, defenses=("friends-b(mu=8)",)), "their defenses"),
]


@pytest.mark.parametrize(("change", "message"), MIXTURES)
def test_a_row_of_two_kinds_is_refused_naming_two_cells(change: Callable[[Record], Record], message: str) -> None:
    records = samples.row("friends-b", "x.")
    other = replace(change(records[1]), cell="0ther")
    with pytest.raises(ValueError, match=f"cell {records[0].cell} .*seed 0.*and cell 0ther .*seed 1.*{message}"):
        summarise([records[0], other])
    assert summarise([records[0], other], mix=True)[0].trials == 2


def test_a_cell_that_comes_twice_counts_once_but_not_with_two_outcomes() -> None:
    records = samples.row("friends-b", "x.")
    again = replace(records[0], seconds={"training": 1.0}, device="another machine")
    assert summarise([*records, again])[0].trials == 2
    other = replace(records[0], hits=0)
    for mix in (False, True):
        with pytest.raises(ValueError, match=r"came out differently \(1 of 1 images, .* then 0 of 1"):
            summarise([*records, other], mix=mix)


def test_two_cells_of_one_place_are_refused() -> None:
    first = samples.record("friends-b")
    with pytest.raises(ValueError, match=f"cell {first.cell}.* and cell 0ther.* same seed, goal and victim"):
        summarise([first, replace(first, cell="0ther")])


def test_models_of_different_poisons_are_no_pair() -> None:
    a, b = samples.record(), samples.record("friends-b", keys={"poison": "another"})
    with pytest.raises(ValueError, match=r"undefended, seed 0, goal 1.*friends-b.*different poisons"):
        summarise([a, b])
    assert len(summarise([a, b], mix=True)) == 2


def test_nothing_gives_nothing() -> None:
    assert summarise([]) == []
