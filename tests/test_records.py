"""The committed records of the attacks: of at least eight goals each, and the undefended row above a stated floor.

These are measurements, not runs: a new record of a weaker attack fails here, before it makes a defense look good.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from friends.attacks import ATTACKS
from friends.bench.record import CLEAN, UNDEFENDED, Report
from friends.bench.statistics import paired_p
from friends.bench.tables import poolable, read_records

RESULTS = Path(__file__).resolve().parents[1] / "results" / "attacks"

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
