"""Activation Clustering on real digits: stamped images are a cluster of their own, and no backdoor is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from stamped_digits import POISONS, stamped

from friends.data.artifacts import Artifacts
from friends.data.images import LabeledImages
from friends.defenses import ActivationClustering


@pytest.mark.effect
def test_it_removes_nearly_all_poisons_and_stops_the_backdoor(digits: LabeledImages, tmp_path: Path) -> None:
    """The relative rule removes little else."""
    for seed in (0, 3):
        attacked = stamped(digits, seed)
        undefended = attacked.victim()
        defended = attacked.victim(ActivationClustering(decide="relative"), artifacts=Artifacts(tmp_path / str(seed)))
        assert undefended.success > 0.9
        assert defended.success < 0.1
        assert defended.removal.recall > 0.85
        assert defended.removal.removed < 2 * POISONS
        assert defended.accuracy > undefended.accuracy - 0.04


@pytest.mark.effect
def test_the_benchmarks_variant_does_too_and_pays_with_clean_images(digits: LabeledImages, tmp_path: Path) -> None:
    defended = stamped(digits, 0).victim(ActivationClustering(), artifacts=Artifacts(tmp_path))
    assert defended.success < 0.25
    assert defended.removal.recall > 0.85
    assert defended.removal.removed > 5 * POISONS
    assert 0.8 < defended.accuracy < 0.96
