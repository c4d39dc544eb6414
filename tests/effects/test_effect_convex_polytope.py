"""Convex Polytope on photographs: new heads fall to it, heads trained on clean data do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "attacks"


@pytest.mark.effect
def test_convex_polytope_moves_most_of_its_targets(cifar10: Path, tmp_path: Path) -> None:
    """Eight targets of the scaled-down trial, each with poisons and a victim of its own."""
    trial = read_trial(EXAMPLES / "convex-polytope.toml")
    goals, data = replace(trial.goals, count=8), replace(trial.data, source=str(cifar10))
    trial = replace(trial, seed=101, data=data, goals=goals, arms=(), controls=2)
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, control = arms["undefended"], arms["clean"]
    assert undefended.successes >= 6
    assert control.successes <= 2
    assert sum(undefended.confidence) > 2 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices
