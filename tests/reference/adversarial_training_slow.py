"""Projected gradient ascent written from the paper of Madry et al., slowly: one image at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pgd_slowly(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, *, eps: float, steps: int, step_size: float
) -> Tensor:
    """The attacked images, each from its own start ``delta``; ``model`` is in eval mode."""
    attacked = []
    for image, label, start in zip(x, y, delta, strict=True):
        moved = (image + start).clamp(0, 1)
        for _ in range(steps):
            leaf = moved.clone().requires_grad_()
            F.cross_entropy(model(leaf[None]), label[None]).backward()
            assert leaf.grad is not None
            moved = (moved + step_size * leaf.grad.sign()).clamp(image - eps, image + eps).clamp(0, 1)
        attacked.append(moved)
    return torch.stack(attacked)
