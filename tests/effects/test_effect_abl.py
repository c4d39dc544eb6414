"""Anti-Backdoor Learning against the dirty-label backdoor that it was made for, on photographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from friends.attacks.badnets import BadNets
from friends.bench.run import run_trial
from friends.bench.trial import ArmSpec, read_trial
from friends.defenses import ABL

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "attacks" / "badnets.toml"


@pytest.mark.effect
def test_abl_isolates_poisons_and_unlearns_the_backdoor(cifar10: Path, tmp_path: Path) -> None:
    """One goal with 10 % poisons, as in the paper, and half as many isolated images.

    The ascent of the authors hardly moves a small network that has learned its poisons by heart; with steps of one
    length it removes the backdoor, at a price in accuracy that stays well above chance, 1 in 5.
    """
    abl = ABL(isolate=0.05, unlearn_epochs=14, unlearn_lr=5e-3)
    arms = (
        ArmSpec(name="theirs", defenses=(abl,)),
        ArmSpec(name="normalised", defenses=(replace(abl, normalise=True),)),
    )
    trial = read_trial(EXAMPLE)
    trial = replace(
        trial,
        seed=100,
        controls=0,
        attack=BadNets(budget=0.1),
        data=replace(trial.data, source=str(cifar10)),
        goals=replace(trial.goals, count=1),
        arms=arms,
    )
    done = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, theirs, normalised = done["undefended"], done["theirs"], done["normalised"]
    assert undefended.successes > 0.9 * undefended.n
    assert theirs.removed == normalised.removed == (100,)
    assert sum(theirs.caught) > 0.9 * 100  # precision; one image in ten is a poison
    assert theirs.caught == normalised.caught  # they differ in phase 3 alone
    assert theirs.successes > 0.8 * theirs.n  # learned by heart: hardly a gradient to ascend
    assert normalised.successes < 0.4 * normalised.n
    assert normalised.accuracy > 0.4
    assert theirs.accuracy > undefended.accuracy - 0.08
