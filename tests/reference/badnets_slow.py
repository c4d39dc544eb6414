"""BadNets written from its paper, slowly: one image after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from friends.data.images import LabeledImages


def badnets(train: LabeledImages, rows: list[int], stamp: Callable[[Tensor], Tensor], wanted: int) -> LabeledImages:
    """The training set in which each of the rows shows its image with the trigger and has the wanted label."""
    images, labels = [], []
    for row in range(len(train)):
        image, label = train.x[row], int(train.y[row])
        if row in rows:
            image, label = (stamp(image.float() / 255) * 255).round().to(torch.uint8), wanted
        images.append(image)
        labels.append(label)
    return LabeledImages(torch.stack(images), torch.tensor(labels), train.classes, train.name)
