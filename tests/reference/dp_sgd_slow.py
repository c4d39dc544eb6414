"""DP-SGD without noise, from its definition: one backward pass an image, each clipped, then the sum over B."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def clipped_step_slow(model: nn.Module, x: torch.Tensor, y: torch.Tensor, clip: float, size: int) -> list[torch.Tensor]:
    """The gradient that a private step without noise applies, per parameter."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        norm = float(sum(float((g**2).sum()) for g in gradients)) ** 0.5
        for kept, g in zip(total, gradients, strict=True):
            kept += g * min(1.0, clip / norm)
    return [kept / size for kept in total]
