"""The 20 standard keys: the class pairs, targets and bases of Gradient Matching's experiments on CIFAR-10.

The authors' framework (Geiping et al., ICLR 2021) draws an experiment from a number, its key, with NumPy's legacy
generator. These are the 20 keys that it comes with, and most likely the 20 data sets of the FRIENDS paper::

    generator seeded with key + 4
    target class        uniform over the classes
    wanted class        uniform over the others
    bases               without replacement from the training images of the wanted class
    target              uniform over the test images of the target class

Images are named by *rank*: the r-th image of its class, from 0, in the order of the original files. A copy of the data
that is sorted by class has the same ranks, as long as every class keeps its order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from friends.data.images import LabeledImages
from friends.data.poisoned import Goal

TRAIN_PER_CLASS, TEST_PER_CLASS, CLASSES = 5000, 1000, 10
"""CIFAR-10."""

STANDARD_KEYS: dict[int, tuple[int, int, int]] = {
    2000000000: (5, 6, 876),
    2100000000: (6, 9, 172),
    2110000000: (6, 2, 228),
    2111000000: (0, 5, 491),
    2111100000: (0, 8, 125),
    2111110000: (3, 0, 734),
    2111111000: (1, 6, 340),
    2111111100: (9, 3, 372),
    2111111110: (1, 8, 989),
    2111111111: (1, 3, 291),
    3000000000: (9, 2, 902),
    3100000000: (2, 7, 902),
    3110000000: (4, 8, 850),
    3111000000: (7, 4, 858),
    3111100000: (8, 4, 300),
    3111110000: (9, 1, 982),
    3111111000: (8, 7, 863),
    3111111100: (5, 3, 646),
    3111111110: (2, 8, 748),
    3111111111: (1, 5, 5),
}
"""Key: target class, wanted class, and rank of the target among the test images of its class.

Classes are numbered as in CIFAR-10: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.
"""


@dataclass(frozen=True, eq=False)
class StandardKey:
    """One experiment.

    Args:
        key: the number that it follows from.
        target_class: true class of the target.
        wanted_class: class that the target is to be taken for, and class of the poisons.
        target_rank: which test image of its class the target is, from 0.
        base_ranks: ``(p,)`` which training images of the wanted class are poisoned, from 0, in the order drawn.
    """

    key: int
    target_class: int
    wanted_class: int
    target_rank: int
    base_ranks: Int64[Tensor, " p"]


def standard_key(
    key: int,
    poisons: int = 500,
    *,
    train_per_class: int = TRAIN_PER_CLASS,
    test_per_class: int = TEST_PER_CLASS,
    classes: int = CLASSES,
) -> StandardKey:
    """What a key stands for. Any number in [0, 2^32 - 5] is one; NumPy's global generator is left alone.

    Args:
        poisons: how many bases; fewer are the first of more, and the target does not depend on it.
        train_per_class: training images of the wanted class.
        test_per_class: test images of the target class.
        classes: number of classes.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 <= key <= 2**32 - 5:
        raise ValueError(f"a key is a whole number in [0, {2**32 - 5}], not {key}")
    if classes < 2 or test_per_class < 1:
        raise ValueError(f"two classes and one test image are needed, not {classes} and {test_per_class}")
    if not 1 <= poisons <= train_per_class:
        raise ValueError(f"cannot draw {poisons} of {train_per_class} training images")
    generator = np.random.RandomState(key + 4)
    target = int(generator.randint(classes))
    wanted = int(generator.choice([c for c in range(classes) if c != target]))
    bases = torch.from_numpy(generator.choice(train_per_class, size=poisons, replace=False).astype(np.int64))
    rank = int(generator.choice(test_per_class, size=1, replace=False)[0])
    return StandardKey(key, target, wanted, rank, bases)


def goal_of_key(
    key: int, train: LabeledImages, test: LabeledImages, budget: float = 0.01, *, subset: bool = False
) -> Goal:
    """The goal of a key on CIFAR-10: one test image, and the training rows to be poisoned.

    Args:
        train, test: the images, every class in the order of the original files.
        budget: number of poisons as a fraction of the whole training set, rounded up; 0.01 is the protocol's.
        subset: allow other data than the whole of CIFAR-10. The same recipe then draws from the images that there
            are: with ten classes the class pair is the key's own, target and bases are others.

    Raises:
        ValueError: the data is not ten classes of 5,000 and 1,000 images and ``subset`` is not set, or a class has
            fewer training images than the budget asks for, or no test image.
    """
    if not subset:
        _check_whole(train, test)
    poisons = math.ceil(budget * len(train) - 1e-9)
    pair = standard_key(key, 1, classes=len(train.classes))
    of_wanted = (train.y.cpu() == pair.wanted_class).nonzero().flatten()
    of_target = (test.y.cpu() == pair.target_class).nonzero().flatten()
    found = standard_key(
        key, poisons, train_per_class=len(of_wanted), test_per_class=len(of_target), classes=len(train.classes)
    )
    row = of_target[found.target_rank : found.target_rank + 1]
    true, wanted = (test.classes[c] for c in (found.target_class, found.wanted_class))
    return Goal(
        test.pixels(row.to(test.device)).cpu(),
        torch.tensor([found.target_class]),
        torch.tensor([found.wanted_class]),
        name=f"key {key}, test image {int(row)}: {true} → {wanted}",
        bases=of_wanted[found.base_ranks],
    )


def _check_whole(train: LabeledImages, test: LabeledImages) -> None:
    """Refuse anything but the whole of CIFAR-10, by its numbers of classes and images."""
    way_out = "pass subset=True to draw from it by the same recipe"
    for data, wanted in ((train, TRAIN_PER_CLASS), (test, TEST_PER_CLASS)):
        counts = torch.bincount(data.y.cpu(), minlength=len(data.classes)).tolist()
        if len(counts) != CLASSES:
            raise ValueError(
                f"the standard keys are for the {CLASSES} classes of CIFAR-10, {data.name} has {len(counts)}: {way_out}"
            )
        for name, count in zip(data.classes, counts, strict=True):
            if count != wanted:
                raise ValueError(
                    f"the standard keys need {wanted} images of every class, {data.name} has {count} of {name!r}: "
                    f"{way_out}"
                )
