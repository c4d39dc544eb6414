"""Defenses against poisons that stand alone: wrong labels, which a network learns by heart, one image at a time.

That is the case that EPIC was made for (it drops images whose gradients are like no others'), and one that bounded and
noised gradients (DP-SGD) and mixed images (CutMix) are known to weaken.
"""

from __future__ import annotations

import pytest
import torch

from friends.data.images import LabeledImages
from friends.defenses import DPSGD, CutMix, Epic
from friends.models import build
from friends.training import Defense, Fitted, Recipe, accuracy, fit
from friends.types import Streams

COUNT = 40
RECIPE = Recipe(epochs=40, batch=32, lr=0.05, augment=None)


@pytest.fixture(scope="module")
def data(digits: LabeledImages) -> LabeledImages:
    """2,000 digits."""
    return digits.sample(2000, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def rest(digits: LabeledImages) -> LabeledImages:
    return digits.sample(4000, torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """The 2 % of them that are mislabelled."""
    return torch.randperm(2000, generator=torch.Generator().manual_seed(100))[:COUNT]


@pytest.fixture(scope="module")
def poisoned(data: LabeledImages, rows: torch.Tensor) -> LabeledImages:
    """The digits with other labels on these rows, each drawn by itself."""
    y = data.y.clone()
    y[rows] = (y[rows] + 1 + torch.randint(0, 9, (COUNT,), generator=torch.Generator().manual_seed(101))) % 10
    return LabeledImages(data.x, y, data.classes, data.name)


def trained(poisoned: LabeledImages, *defenses: Defense) -> Fitted:
    def make(generator: torch.Generator) -> torch.nn.Module:
        shape, moments = poisoned.shape, poisoned.moments
        return build("tiny", shape=shape, classes=10, moments=moments, width=16, generator=generator)

    return fit(poisoned, make, recipe=RECIPE, defenses=defenses, streams=Streams(0))


def learned(fitted: Fitted, poisoned: LabeledImages, rows: torch.Tensor) -> int:
    """How many wrong labels the pipeline gives back."""
    return int((fitted.predictor(poisoned.pixels(rows)) == poisoned.y[rows]).sum())


@pytest.fixture(scope="module")
def undefended(poisoned: LabeledImages) -> Fitted:
    return trained(poisoned)


@pytest.mark.effect
def test_an_undefended_network_learns_them_all(undefended: Fitted, poisoned: LabeledImages, rows: torch.Tensor) -> None:
    assert learned(undefended, poisoned, rows) >= 36


@pytest.mark.effect
def test_epic_drops_nearly_all_of_them_and_accuracy_stays(
    undefended: Fitted, poisoned: LabeledImages, rows: torch.Tensor, rest: LabeledImages
) -> None:
    """Three draws: 39 or 40 of 40 dropped among 210 to 250 images, none or one learned."""
    epic = trained(poisoned, Epic(share=0.1, start=2, interval=1))
    assert learned(epic, poisoned, rows) <= 4
    assert int(epic.removed[rows].sum()) >= 34
    assert int(epic.removed.sum()) < 400
    assert accuracy(epic.predictor, rest).strict > accuracy(undefended.predictor, rest).strict - 0.01


@pytest.mark.effect
def test_dp_sgd_learns_few_of_them_and_pays_in_accuracy(
    undefended: Fitted, poisoned: LabeledImages, rows: torch.Tensor, rest: LabeledImages
) -> None:
    """Two draws: 4 and 5 of 40 learned, at 4 points of accuracy."""
    private = trained(poisoned, DPSGD(sigma=0.03))
    assert learned(private, poisoned, rows) <= 12
    before, after = (accuracy(fitted.predictor, rest).strict for fitted in (undefended, private))
    assert before - 0.1 < after < before


@pytest.mark.effect
def test_cutmix_learns_few_of_them_at_no_price(
    undefended: Fitted, poisoned: LabeledImages, rows: torch.Tensor, rest: LabeledImages
) -> None:
    """Two draws: 1 and 2 of 40 learned, at a point of accuracy more."""
    mixed = trained(poisoned, CutMix(p=1))
    assert learned(mixed, poisoned, rows) <= 8
    assert accuracy(mixed.predictor, rest).strict > accuracy(undefended.predictor, rest).strict - 0.01
