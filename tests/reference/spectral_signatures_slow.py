"""Spectral Signatures written from its paper, slowly: the covariance row by row, its direction by power iteration."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(features: Tensor, *, centred: bool = True) -> Tensor:
    """The squared product of each row with the direction of largest variance; of the row itself if not ``centred``."""
    points = features.double()
    mean = sum(points) / len(points)
    covariance = torch.zeros(points.shape[1], points.shape[1], dtype=torch.float64)
    for point in points:
        covariance += torch.outer(point - mean, point - mean)
    direction = torch.ones(points.shape[1], dtype=torch.float64)
    for _ in range(5000):
        direction = covariance @ direction
        direction = direction / direction.norm()
    return torch.stack([((point - mean if centred else point) @ direction) ** 2 for point in points])


def highest(values: Tensor, count: int) -> set[int]:
    """The rows of the highest values."""
    return set(sorted(range(len(values)), key=lambda i: -float(values[i]))[:count])
