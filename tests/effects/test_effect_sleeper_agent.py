"""Sleeper Agent on photographs: victims trained from new weights answer to a trigger that no poison shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from friends.attacks import SleeperAgent
from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "sleeper-agent.toml"


@pytest.mark.effect
def test_images_with_the_trigger_are_taken_for_the_wanted_class_and_by_clean_models_are_not(
    cifar10: Path, tmp_path: Path
) -> None:
    """The scaled-down trial with two retrainings: 500 test images with the trigger, against the control's answers."""
    trial = read_trial(EXAMPLE)
    attack = replace(cast(SleeperAgent, trial.attack), steps=60, retrainings=2)
    source = replace(trial.data, source=str(cifar10))
    arms = {arm.name: arm for arm in run_trial(
        replace(trial, seed=100, data=source, attack=attack, arms=()), tmp_path / "run").arms}  # fmt: skip
    undefended, clean = arms["undefended"], arms["clean"]
    assert undefended.n == clean.n == 500
    assert undefended.successes >= 200
    assert clean.successes <= 75  # images that are misclassified with no poison at all
    assert undefended.successes >= 4 * clean.successes
    assert abs(undefended.accuracy - clean.accuracy) < 0.06
