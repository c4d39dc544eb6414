"""Spectral Signatures on real digits: stamped images stand out in their class, and no backdoor is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from stamped_digits import BUDGET, stamped

from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.defenses import SpectralSignatures


@pytest.mark.effect
def test_it_removes_most_poisons_and_stops_the_backdoor(digits: LabeledImages, tmp_path: Path) -> None:
    for seed in (0, 3):
        attacked = stamped(digits, seed)
        undefended = attacked.victim()
        defended = attacked.victim(SpectralSignatures(budget=BUDGET), artifacts=Artifacts(tmp_path / str(seed)))
        assert undefended.success > 0.9
        assert defended.success < 0.3
        assert defended.removal.recall > 0.7
        assert defended.removal.removed == 5 * 112  # 1.5 times the 75 poisons, of every class
        assert defended.accuracy > undefended.accuracy - 0.08
