"""The committed records: attacks above a stated floor undefended, and defenses below one where they are known to work.

These are measurements, not runs: a new record of a weaker attack fails here, before it makes a defense look good. Every
attack has eight goals or more.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest

from friends.attacks import ATTACKS
from friends.bench.record import CLEAN, UNDEFENDED, Report
from friends.bench.statistics import paired_p
from friends.bench.tables import poolable
from friends.bench.tables import read_records as read_anew

RESULTS = Path(__file__).resolve().parents[1] / "results" / "attacks"
DEFENSES = RESULTS.parent / "defenses"

read_records = functools.cache(read_anew)

FLOORS = {
    "gradient-matching": (0.7, 0.2),
    "bullseye-polytope": (0.9, 0.2),
    "poison-frogs": (0.9, 0.2),
    "convex-polytope": (0.9, 0.2),
    "sleeper-agent": (0.65, 0.25),
    "hidden-trigger": (0.25, 0.25),  # weak at this scale, and said so in docs/attacks.md
    "badnets": (0.9, 0.15),
    "clean-label-backdoor": (0.8, 0.15),
    "narcissus": (0.7, 0.25),
    "metapoison": (0.25, 0.2),  # weak at this scale, and said so in docs/attacks.md
}
"""Attack -> the least share of goals (of their images) that undefended models lose, and the most that clean ones do."""

STRONG = FLOORS.keys() - {"hidden-trigger", "metapoison"}


def rates(reports: list[Report], name: str) -> list[float]:
    return [rate for report in reports for arm in report.arms if arm.name == name for rate in arm.rates]


def test_every_attack_has_a_floor() -> None:
    assert FLOORS.keys() == ATTACKS.keys()


@pytest.mark.parametrize("name", FLOORS)
def test_the_record_is_of_eight_goals_and_above_its_floor(name: str) -> None:
    reports = read_records(RESULTS / f"{name}.jsonl")
    poolable(reports)
    undefended, clean = rates(reports, UNDEFENDED), rates(reports, CLEAN)
    assert len(undefended) >= 8
    assert len(clean) == len(undefended)
    floor, ceiling = FLOORS[name]
    assert math.fsum(undefended) / len(undefended) >= floor
    assert math.fsum(clean) / len(clean) <= ceiling


@pytest.mark.parametrize("name", sorted(STRONG))
def test_the_attack_is_told_apart_from_no_attack(name: str) -> None:
    reports = read_records(RESULTS / f"{name}.jsonl")
    assert paired_p(rates(reports, CLEAN), rates(reports, UNDEFENDED)) < 0.01


WORKS = {
    ("table1", "ap-0.75"): (0.4, 0.10),
    ("table1", "deep-knn"): (0.3, 0.12),
    ("table2", "spectral-signatures"): (0.55, 0.06),
    ("table2", "cutmix"): (0.65, 0.02),
    ("table2", "epic-0.2"): (0.65, 0.02),
    ("table2", "friends-b-mu48"): (0.5, 0.05),
    ("stamps", "spectral-signatures"): (0.3, 0.12),
    ("stamps", "activation-clustering"): (0.3, 0.16),
    ("stamps", "activation-clustering-relative"): (0.25, 0.10),
    ("stamps", "strip"): (0.55, 0.06),
}
"""(table, row) -> the most that the attack may win there, and the most accuracy that it may cost."""


def mean_rate(reports: list[Report], name: str) -> float:
    found = rates(reports, name)
    return math.fsum(found) / len(found)


def mean_accuracy(reports: list[Report], name: str) -> float:
    found = [arm.accuracy for report in reports for arm in report.arms if arm.name == name]
    return math.fsum(found) / len(found)


@pytest.mark.parametrize(("table", "name"), WORKS)
def test_a_defense_works_on_the_case_that_it_was_made_for(table: str, name: str) -> None:
    reports = read_records(DEFENSES / f"{table}.jsonl")
    most, cost = WORKS[table, name]
    assert mean_rate(reports, UNDEFENDED) > 0.7
    assert mean_rate(reports, name) <= most
    assert mean_accuracy(reports, name) >= mean_accuracy(reports, UNDEFENDED) - cost


def test_more_adversarial_poisoning_saves_more_targets() -> None:
    reports = read_records(DEFENSES / "table1.jsonl")
    won = [mean_rate(reports, f"ap-{fraction}") for fraction in ("0.25", "0.5", "0.75")]
    assert won == sorted(won, reverse=True)


@pytest.mark.parametrize("name", ["spectral-signatures", "activation-clustering", "activation-clustering-relative"])
def test_filters_find_nearly_every_stamp(name: str) -> None:
    reports = read_records(DEFENSES / "stamps.jsonl")
    caught = [c for report in reports for arm in report.arms if arm.name == name for c in arm.caught]
    assert math.fsum(caught) / len(caught) > 0.95 * int(str(reports[0].attack["poisons"]))


def test_every_defense_is_in_a_table() -> None:
    from friends.defenses import DEFENSES as KNOWN

    files = sorted(DEFENSES.glob("*.jsonl"))
    rows = [arm for file in files for arm in read_records(file)[0].arms]
    text = " ".join(defense for arm in rows for defense in arm.defenses)
    for cls in KNOWN.values():
        assert f"{cls.__name__}(" in text
