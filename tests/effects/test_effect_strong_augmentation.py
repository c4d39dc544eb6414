"""Strong augmentation against Gradient Matching, one of the attacks that it was shown to weaken, on photographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import ArmSpec, read_trial
from friends.defenses import CutMix

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "gradient-matching.toml"


@pytest.mark.effect
def test_cutmix_saves_targets_of_gradient_matching_at_no_price(cifar10: Path, tmp_path: Path) -> None:
    """Four targets of the scaled-down trial, each with poisons and two victims of its own."""
    trial = read_trial(EXAMPLE)
    trial = replace(
        trial,
        seed=100,
        controls=0,
        data=replace(trial.data, source=str(cifar10)),
        goals=replace(trial.goals, count=4),
        arms=(ArmSpec(name="cutmix", defenses=(CutMix(p=1),)),),
    )
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, cutmix = arms["undefended"], arms["cutmix"]
    assert undefended.successes >= 2
    assert cutmix.successes < undefended.successes
    assert sum(cutmix.confidence) < sum(undefended.confidence) - 1
    assert cutmix.accuracy > undefended.accuracy - 0.02
