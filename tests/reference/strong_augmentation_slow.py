"""Strong augmentation written from its papers, slowly: one image, or one pixel, after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mixup_loss(logits: Tensor, weights: list[float], labels: list[Tensor]) -> Tensor:
    """The weighted sum of the cross-entropies with the hard labels of each of the images that were mixed."""
    total = torch.zeros(())
    for weight, y in zip(weights, labels, strict=True):
        total = total + weight * F.cross_entropy(logits, y)
    return total


def mixed_image(x: Tensor, weights: list[float], rows: list[int]) -> Tensor:
    """One image of a mixup."""
    image = torch.zeros_like(x[0])
    for weight, row in zip(weights, rows, strict=True):
        image += weight * x[row]
    return image


def boxed(image: Tensor, other: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """One image with the pixels of another from rows top to bottom and columns left to right, both ends excluded."""
    top, bottom, left, right = box
    result = image.clone()
    for row in range(max(top, 0), min(bottom, image.shape[1])):
        for column in range(max(left, 0), min(right, image.shape[2])):
            result[:, row, column] = other[:, row, column]
    return result


def maxup_loss(logits: Tensor, y: Tensor, copies: int) -> Tensor:
    """The mean over images of the largest loss among the copies, which lie one batch after the other."""
    images = len(y) // copies
    total = 0.0
    for i in range(images):
        total += max(float(F.cross_entropy(logits[j * images + i], y[j * images + i])) for j in range(copies))
    return torch.tensor(total / images)
