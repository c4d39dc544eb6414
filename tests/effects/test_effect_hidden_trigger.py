"""Hidden Trigger Backdoor on photographs: heads trained on fixed features answer to a trigger that no poison shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "hidden-trigger.toml"


@pytest.mark.effect
def test_images_with_the_trigger_are_taken_for_the_wanted_class_and_by_clean_models_less_often(
    cifar10: Path, tmp_path: Path
) -> None:
    """The scaled-down trial: 500 test images with the trigger, against the control's answers.

    The attack is weak at this size: 123 images against the control's 49 on this seed.
    """
    trial = read_trial(EXAMPLE)
    source = replace(trial.data, source=str(cifar10))
    report = run_trial(replace(trial, seed=100, data=source, arms=()), tmp_path / "run")
    arms = {arm.name: arm for arm in report.arms}
    undefended, clean = arms["undefended"], arms["clean"]
    assert undefended.n == clean.n == 500
    assert undefended.successes >= 1.5 * clean.successes
    assert undefended.successes >= clean.successes + 40
    assert abs(undefended.accuracy - clean.accuracy) < 0.06
