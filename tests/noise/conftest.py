"""A network trained on real digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from friends.data.images import LabeledImages


@pytest.fixture(scope="session")
def digit_pixels(digits: LabeledImages) -> torch.Tensor:
    """2,000 digits ``(n, 1, 28, 28)`` in [0, 1], in no order."""
    return digits.pixels(_some_rows(digits))


@pytest.fixture(scope="session")
def digit_net(digits: LabeledImages, digit_pixels: torch.Tensor) -> nn.Module:
    """A small convolutional net after a few epochs on those digits: more than nine in ten are right."""
    x, y = digit_pixels, digits.y[_some_rows(digits)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 36, 10),
        )  # fmt: skip
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            for rows in torch.randperm(len(x)).split(100):
                sgd.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                sgd.step()
    accuracy = float((net.eval()(x).argmax(1) == y).float().mean())
    assert accuracy > 0.9, accuracy
    return net.train()


def _some_rows(digits: LabeledImages) -> torch.Tensor:
    return torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:2000]
