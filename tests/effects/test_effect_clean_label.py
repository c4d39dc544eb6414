"""The clean-label backdoor on photographs: undefended victims answer to the stamp, models of clean data do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "clean-label-backdoor.toml"


@pytest.mark.effect
def test_the_clean_label_backdoor_takes_most_stamped_images(cifar10: Path, tmp_path: Path) -> None:
    """Four goals of the scaled-down trial, each with poisons and a victim of its own, and 500 stamped images."""
    trial = read_trial(EXAMPLE)
    goals = replace(trial.goals, count=4)
    data = replace(trial.data, source=str(cifar10))
    trial = replace(trial, seed=100, data=data, goals=goals, arms=())
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, clean = arms["undefended"], arms["clean"]
    assert undefended.n == clean.n == 2000
    assert undefended.successes > 0.7 * undefended.n
    assert all(undefended.succeeded)
    assert clean.successes < 0.2 * clean.n
    assert abs(undefended.accuracy - clean.accuracy) < 0.04  # nobody notices
