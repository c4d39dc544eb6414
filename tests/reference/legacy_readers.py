"""What two published programs make of a folder of poisons, done again step by step from a reading of their code.

The benchmark (``poison_test.py``, ``learning_module.py``) and the FRIENDS authors' trainer (``main.py``,
``dataset/cifar.py``, ``dataset/poison.py``) both unpickle the files and hand the images to torchvision, whose two
conversions are written out here: to a tensor by dividing by 255, back to an image by cutting off what is no whole
byte. ``pickle.load`` is fine here: it only ever sees files that the tests themselves wrote.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Pair = tuple[Image.Image, int]


def load(path: Path) -> Any:
    with path.open("rb") as handle:
        return pickle.load(handle)  # noqa: S301


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))
    return (pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1).float().div(255)


def to_image(x: Tensor) -> Image.Image:
    pixels = x.mul(255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def target_of(folder: Path, patch_size: int) -> Pair:
    """``target.pickle`` as both programs read it: a patch is pasted if there is one."""
    entry = load(folder / "target.pickle")
    image, label = entry[0], entry[1]
    if len(entry) == 4:
        patch = entry[2] if torch.is_tensor(entry[2]) else torch.tensor(entry[2])
        assert tuple(patch.shape) == (3, patch_size, patch_size), "the program leaves here"
        x0, y0 = entry[3]
        h, w = image.size
        assert y0 + patch_size <= h and x0 + patch_size <= w, "the program leaves here"
        x = to_tensor(image)
        x[:, y0 : y0 + patch_size, x0 : x0 + patch_size] = patch
        image = to_image(x)
    return image, label


@dataclass
class Benchmark:
    """What ``poison_test.py`` trains on and asks for: clean rows, then poisons; a target; a wanted class."""

    train: list[tuple[Tensor, int, int]]
    clean_rows: list[int]
    target: Tensor
    target_class: int
    poisoned_label: int
    norms: list[float]


def as_benchmark(folder: Path, trainset: list[Pair], *, size: int, patch_size: int = 5) -> Benchmark:
    """A set of ``size`` images, as many of each class: the first clean ones that are no bases, and all poisons."""
    poisons: list[Pair] = load(folder / "poisons.pickle")
    wanted = poisons[0][1]
    bases = load(folder / "base_indices.pickle")
    targets = np.array([label for _, label in trainset])
    classes = len(set(targets))
    rows: list[int] = []
    for label in range(classes):
        of_class = np.setdiff1d(np.where(targets == label)[0], bases)[: size // classes]
        rows += (of_class[: size // classes - len(poisons)] if label == wanted else of_class).tolist()
    train = [(to_tensor(trainset[row][0]), trainset[row][1], 0) for row in rows]
    train += [(to_tensor(image), label, 1) for image, label in poisons]
    norms = [
        torch.max(torch.abs(to_tensor(poisons[i][0]) - to_tensor(trainset[row][0]))).item()
        for i, row in enumerate(bases)
    ]
    image, label = target_of(folder, patch_size)
    return Benchmark(train, rows, to_tensor(image), label, wanted, norms)


@dataclass
class Friends:
    """What ``main.py`` trains on and asks for: every row, poisons in place of their bases; targets; a wanted class."""

    train: list[tuple[Tensor, int, int]]
    targets: list[Tensor]
    target_class: int
    poisoned_label: int


def as_friends(folder: Path, trainset: list[Pair], *, backdoor: bool = False, patch_size: int = 5) -> Friends:
    poisons: list[Pair] = load(folder / "poisons.pickle")
    bases = load(folder / "base_indices.pickle")
    assert len(bases) == len(poisons), "the program leaves here"
    everything = np.arange(len(trainset))
    inside = np.nonzero(np.isin(bases, everything))[0]
    by_row = {int(bases[i]): poisons[i] for i in inside}
    train: list[tuple[Tensor, int, int]] = []
    for row in everything:
        image, label = by_row[row] if row in by_row else trainset[row]
        train.append((to_tensor(image), label, int(row in by_row)))
    if backdoor:
        sources = load(folder / "source.pickle")
        return Friends(train, [to_tensor(source[0]) for source in sources], sources[0][1], poisons[0][1])
    image, label = target_of(folder, patch_size)
    return Friends(train, [to_tensor(image)], label, poisons[0][1])


def metapoison_as_friends(path: Path) -> tuple[np.ndarray[Any, Any], list[int], int]:
    """Training bytes, labels and wanted class of a MetaPoison file: the cast to bytes wraps what is out of range."""
    data = load(path)
    with np.errstate(invalid="ignore"):
        wrapped = data["xtrain"].astype(np.int64).astype(np.uint8)
    return wrapped, list(data["ytrain"]), int(data["ytargetadv"][0])
