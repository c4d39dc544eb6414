"""Deep k-NN on real digits: dirty labels lie among images of their true class, and no backdoor is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from stamped_digits import BUDGET, POISONS, stamped

from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.defenses import DeepKNN


@pytest.mark.effect
def test_it_removes_most_poisons_and_stops_the_backdoor(digits: LabeledImages, tmp_path: Path) -> None:
    for seed in (0, 4):
        attacked = stamped(digits, seed)
        undefended = attacked.victim()
        defended = attacked.victim(DeepKNN(budget=BUDGET), artifacts=Artifacts(tmp_path / str(seed)))
        assert undefended.success > 0.9
        assert defended.success < 0.15
        assert defended.removal.recall > 0.85
        assert defended.removal.removed < 3 * POISONS
        assert defended.accuracy > undefended.accuracy - 0.05
