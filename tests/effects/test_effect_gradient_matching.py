"""Gradient Matching on photographs: undefended victims fall to it, models trained on clean data do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "gradient-matching.toml"


@pytest.mark.effect
def test_gradient_matching_moves_most_of_its_targets(cifar10: Path, tmp_path: Path) -> None:
    """Six targets of the scaled-down trial, each with poisons and a victim of its own."""
    trial = read_trial(EXAMPLE)
    trial = replace(
        trial,
        seed=100,
        data=replace(trial.data, source=str(cifar10)),
        goals=replace(trial.goals, count=6),
        arms=(),
    )
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, clean = arms["undefended"], arms["clean"]
    assert undefended.successes >= 3
    assert clean.successes == 0
    assert sum(undefended.confidence) > 1.5 + sum(clean.confidence)
    assert abs(undefended.accuracy - clean.accuracy) < 0.04  # nobody notices
