"""Bullseye Polytope on photographs: new heads and fine-tuned networks fall to it, clean ones do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaled_down import undefended_and_control


@pytest.mark.effect
def test_bullseye_polytope_moves_most_of_its_targets(cifar10: Path, tmp_path: Path) -> None:
    """Four targets of the scaled-down trial, each with poisons and a victim of its own."""
    undefended, control = undefended_and_control("bullseye-polytope", cifar10, tmp_path / "run")
    assert undefended.successes >= 3
    assert control.successes <= 1
    assert sum(undefended.confidence) > 1 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices


@pytest.mark.effect
def test_bullseye_polytope_moves_targets_of_networks_that_are_fine_tuned(cifar10: Path, tmp_path: Path) -> None:
    """The same four, with fewer images to fine-tune on and a larger step, to take less time."""
    undefended, control = undefended_and_control(
        "bullseye-polytope-finetune", cifar10, tmp_path / "run", recipe={"epochs": 30, "lr": 0.03}, data={"train": 400}
    )
    assert undefended.successes >= 2
    assert control.successes <= 1
    assert sum(undefended.confidence) > 1 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices
