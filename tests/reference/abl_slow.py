"""Anti-Backdoor Learning written from its paper, slowly."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cross_entropy(logits: Tensor, label: int) -> float:
    """Minus the logarithm of the softmax probability of a label, for one image."""
    return float(logits.exp().sum().log() - logits[label])


def lga(losses: list[float], gamma: float) -> float:
    """sign(L - gamma) L with L the mean over the batch."""
    mean = sum(losses) / len(losses)
    return mean if mean > gamma else -mean if mean < gamma else 0.0


def flooding(losses: list[float], gamma: float) -> float:
    """|L - gamma| + gamma with L the mean over the batch."""
    mean = sum(losses) / len(losses)
    return abs(mean - gamma) + gamma


def isolated(model: nn.Module, x: Tensor, y: Tensor, share: float) -> set[int]:
    """The rows of the lowest losses, a share of all, by one image at a time in eval mode."""
    model.eval()
    with torch.no_grad():
        logits = [model(image[None])[0].double() for image in x]
    losses = [(cross_entropy(row, int(label)), i) for i, (row, label) in enumerate(zip(logits, y, strict=True))]
    return {i for _, i in sorted(losses)[: round(share * len(y))]}
