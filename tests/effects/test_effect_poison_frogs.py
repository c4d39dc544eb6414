"""Poison Frogs on photographs: new heads fall to it, heads trained on clean data do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaled_down import undefended_and_control


@pytest.mark.effect
def test_poison_frogs_within_a_bound_moves_most_of_its_targets(cifar10: Path, tmp_path: Path) -> None:
    """Four targets of the scaled-down trial, each with poisons and a victim of its own."""
    undefended, control = undefended_and_control("poison-frogs", cifar10, tmp_path / "run")
    assert undefended.successes >= 3
    assert control.successes <= 1
    assert sum(undefended.confidence) > 1 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices


@pytest.mark.effect
def test_poison_frogs_as_published_moves_most_of_its_targets(cifar10: Path, tmp_path: Path) -> None:
    """Four targets of the scaled-down trial, each with poisons and a victim of its own."""
    undefended, control = undefended_and_control("poison-frogs-original", cifar10, tmp_path / "run")
    assert undefended.successes >= 3
    assert control.successes <= 1
    assert sum(undefended.confidence) > 1 + sum(control.confidence)
    assert abs(undefended.accuracy - control.accuracy) < 0.04  # nobody notices
