"""The clean-label backdoor written from its paper, slowly: projected gradient ascent on one image at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def harden(
    models: Sequence[nn.Module], image: Tensor, start: Tensor, label: int, *, norm: str, eps: float, steps: int
) -> Tensor:
    """The image of the ball around ``image`` that the models find hardest, from ``start``, a perturbation.

    Args:
        image: one image, pixels in [0, 1].
    """
    x = _onto(image, image + start, norm, eps)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        loss = sum(F.cross_entropy(model(x[None]), torch.tensor([label])) for model in models) / len(models)
        gradient = torch.autograd.grad(loss, x)[0]
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        x = _onto(image, x.detach() + 2.5 * eps / steps * direction, norm, eps)
    return x.detach()


def _onto(image: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """The point of the ball nearest to ``x``, then the nearest with pixels in [0, 1]."""
    away = x - image
    if norm == "linf":
        away = torch.minimum(torch.maximum(away, torch.tensor(-eps)), torch.tensor(eps))
    elif float(away.norm()) > eps:
        away = away / away.norm() * eps
    return torch.minimum(torch.maximum(image + away, torch.tensor(0.0)), torch.tensor(1.0))
