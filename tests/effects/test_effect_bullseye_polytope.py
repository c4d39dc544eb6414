"""Bullseye Polytope on photographs: new heads and fine-tuned networks fall to it, clean ones do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "attacks"


@pytest.mark.effect
def test_bullseye_polytope_moves_most_of_its_targets(cifar10: Path, tmp_path: Path) -> None:
    """Eight targets of the scaled-down trial, each with poisons and a victim of its own."""
    trial = read_trial(EXAMPLES / "bullseye-polytope.toml")
    goals, data = replace(trial.goals, count=8), replace(trial.data, source=str(cifar10))
    trial = replace(trial, seed=101, data=data, goals=goals, arms=(), controls=2)
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, control = arms["undefended"], arms["clean"]
    assert undefended.successes >= 6
    assert control.successes <= 2
    assert sum(undefended.confidence) > 2 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices


@pytest.mark.effect
def test_bullseye_polytope_moves_targets_of_networks_that_are_fine_tuned(cifar10: Path, tmp_path: Path) -> None:
    """The same eight, with fewer images to fine-tune on and a larger step, to take less time."""
    trial = read_trial(EXAMPLES / "bullseye-polytope-finetune.toml")
    goals, data = replace(trial.goals, count=8), replace(trial.data, source=str(cifar10))
    trial = replace(trial, seed=101, data=data, goals=goals, arms=(), controls=2)
    trial = replace(trial, recipe=replace(trial.recipe, epochs=30, lr=0.03), data=replace(data, train=400))
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, control = arms["undefended"], arms["clean"]
    assert undefended.successes >= 4
    assert control.successes <= 2
    assert sum(undefended.confidence) > 2 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices
