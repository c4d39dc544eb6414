"""MetaPoison on photographs: victims trained on the poisons lean towards the wanted class, clean ones do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from friends.attacks.metapoison import MetaPoison
from friends.bench.run import run_trial
from friends.bench.trial import read_trial


@pytest.mark.effect
def test_metapoison_moves_its_targets_on_photographs(cifar10: Path, tmp_path: Path) -> None:
    """Six targets of the scaled-down trial, crafted in fewer steps on fewer surrogates, and so weaker than there."""
    trial = read_trial(Path(__file__).resolve().parents[2] / "examples" / "attacks" / "metapoison.toml")
    attack = replace(cast(MetaPoison, trial.attack), steps=8, surrogates=3, stagger=6, batch=32, warmup=2)
    goals = replace(trial.goals, count=6)
    trial = replace(trial, seed=102, data=replace(trial.data, source=str(cifar10)), goals=goals, attack=attack,
                    controls=2, arms=())  # fmt: skip
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, clean = arms["undefended"], arms["clean"]
    assert sum(undefended.confidence) > 0.5 + sum(clean.confidence)
    assert undefended.successes >= clean.successes
    assert abs(undefended.accuracy - clean.accuracy) < 0.06  # nobody notices
