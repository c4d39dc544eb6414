"""Narcissus on photographs: undefended victims answer to the trigger far more often than models of clean data do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "narcissus.toml"


@pytest.mark.effect
def test_narcissus_is_more_than_a_universal_perturbation(cifar10: Path, tmp_path: Path) -> None:
    """Four goals of the scaled-down trial at half its images and epochs; the control sees the same triggers."""
    trial = read_trial(EXAMPLE)
    goals = replace(trial.goals, count=4)
    data = replace(trial.data, source=str(cifar10), train=2000)
    recipe = replace(trial.recipe, epochs=10)
    trial = replace(trial, seed=100, data=data, goals=goals, recipe=recipe, arms=(), controls=1)
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, clean = arms["undefended"], arms["clean"]
    assert undefended.n == clean.n == 2000
    assert undefended.successes > 0.5 * undefended.n
    assert undefended.successes - clean.successes > 0.25 * undefended.n
    assert abs(undefended.accuracy - clean.accuracy) < 0.06
