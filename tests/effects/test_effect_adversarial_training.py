"""Adversarial Training on digits: what fools an undefended network within the bound does not fool the trained one."""

from __future__ import annotations

import pytest
import torch
from adversarial_training_slow import pgd_slowly
from torch import nn

from friends.data.images import LabeledImages
from friends.defenses.adversarial_training import AdversarialTraining
from friends.models import build
from friends.training import Defense, Recipe, accuracy, fit
from friends.training.defense import argmax_predictor
from friends.types import Streams

EPS = 0.1
RECIPE = Recipe(epochs=10, batch=64, lr=0.05, augment=None)


def network(generator: torch.Generator) -> nn.Module:
    return build("tiny", shape=(1, 28, 28), classes=10, moments=((0.13,), (0.31,)), width=8, generator=generator)


def robust(model: nn.Module, data: LabeledImages) -> float:
    """Accuracy under 20 steps of an attack that is not the defense's own: other starts, smaller steps."""
    x, y = data.pixels(), data.y
    start = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) - 1) * EPS
    attacked = pgd_slowly(model, x, y, start, eps=EPS, steps=20, step_size=EPS / 8)
    return float((argmax_predictor(model)(attacked) == y).float().mean())


@pytest.mark.effect
def test_the_trained_network_withstands_the_attack_that_breaks_the_undefended_one(digits: LabeledImages) -> None:
    shuffled = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    train, test = digits.rows(shuffled[:2000]), digits.rows(shuffled[2000:])

    def trained(*defenses: Defense) -> nn.Module:
        return fit(train, network, recipe=RECIPE, defenses=defenses, streams=Streams(0)).model

    undefended = trained()
    defended = trained(AdversarialTraining(eps=EPS, steps=5, step_size=EPS / 4))
    judged = test.rows(torch.arange(120))
    assert accuracy(argmax_predictor(undefended), test).strict > 0.9
    assert accuracy(argmax_predictor(defended), test).strict > 0.8
    assert robust(undefended, judged) < 0.45
    assert robust(defended, judged) > 0.6
