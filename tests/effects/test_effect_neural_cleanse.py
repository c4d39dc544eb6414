"""Neural Cleanse on digits: it names the class that a backdoor leads to, finds the trigger, and takes it away."""

from __future__ import annotations

import pytest
import torch
from backdoored_digits import backdoored

from friends.data.images import LabeledImages
from friends.defenses import NeuralCleanse
from friends.training import accuracy, success

SETTINGS = NeuralCleanse(steps=50, samples=192, per_update=32, reach=0.98)
"""A quarter of the steps and a fifth of the images of the defaults: a small net, and seconds."""


@pytest.mark.effect
@pytest.mark.parametrize("seed", [1, 2])
def test_neural_cleanse_names_the_class_and_unlearns_the_trigger(digits: LabeledImages, seed: int) -> None:
    case = backdoored(digits, seed)
    bare, fitted = case.trained(), case.trained(SETTINGS)
    found = fitted.memory[0]
    assert found["flagged"].nonzero().flatten().tolist() == [case.wanted]
    mask = found["masks"][case.wanted, 0]
    assert float(mask[22:, 22:].sum()) > 0.8 * float(mask.sum())  # the trigger is rows and columns 24 to 26
    assert float(mask.sum()) < 15  # it has nine pixels
    assert float(success(bare.predictor, case.goal).float().mean()) > 0.9
    assert float(success(fitted.predictor, case.goal).float().mean()) < 0.5  # of the attacker's own trigger
    assert accuracy(fitted.predictor, case.test).strict > accuracy(bare.predictor, case.test).strict - 0.02


@pytest.mark.effect
def test_neural_cleanse_leaves_a_model_of_clean_digits_alone(digits: LabeledImages) -> None:
    case = backdoored(digits, 1)
    bare, fitted = case.trained(on=case.clean), case.trained(SETTINGS, on=case.clean)
    assert not bool(fitted.memory[0]["flagged"].any())
    before, after = bare.model.state_dict(), fitted.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert float(fitted.memory[0]["norms"].min()) > 15
