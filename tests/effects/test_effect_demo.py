"""Effects on real images: the attack beats a floor undefended, the control does not, and FRIENDS lowers it.

Windows, not point values: these are few targets, and other processors round differently.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import pytest

from friends.bench.run import run_trial
from friends.bench.trial import read_trial


@pytest.mark.effect
def test_the_demo_shows_an_attack_that_works_and_a_defense_that_stops_it(tmp_path: Path) -> None:
    """Four of the demo's kind of targets, on another seed than the demo's."""
    with as_file(files("friends.bench") / "demo.toml") as file:
        trial = read_trial(Path(file))
    trial = replace(trial, seed=2, goals=replace(trial.goals, count=4), controls=2, arms=trial.arms[:1])
    arms = {arm.name: arm for arm in run_trial(trial, tmp_path / "run").arms}
    undefended, friends, clean = (arms[name] for name in ("undefended", "friends-b", "clean"))
    assert undefended.successes >= 3
    assert clean.successes <= 1
    assert 2 * friends.successes <= undefended.successes
    assert sum(friends.confidence) < 0.6 * sum(undefended.confidence)
    assert undefended.accuracy > 0.94
    assert undefended.accuracy - friends.accuracy <= 0.05
