"""Sleeper Agent written from its paper, slowly: one image at a time, torch's own optimizer, normalised space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attacks_slow import loss_gradient
from torch import Tensor, nn
from torch.nn import functional as F


def gradient_length(model: nn.Module, image: Tensor, label: int) -> float:
    """The length of one image's gradient, parameter by parameter."""
    loss = F.cross_entropy(model(image[None]), torch.tensor([label]))
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return sum(float((part**2).sum()) for part in parts) ** 0.5


def longest(model: nn.Module, images: Tensor, rows: Sequence[int], label: int, count: int) -> list[int]:
    """The rows of the images with the longest gradients, ascending."""
    ranked = sorted(rows, key=lambda row: -gradient_length(model, images[row], label))
    return sorted(ranked[:count])


def sleeper_agent(
    base: Tensor,
    delta: Tensor,
    sources: Tensor,
    wanted: int,
    *,
    train_on: Callable[[Tensor, int], nn.Module],
    augment: Callable[[Tensor, int], Tensor],
    mean: Tensor,
    std: Tensor,
    xi: float,
    steps: int,
    retrainings: int,
) -> Tensor:
    """The perturbation in pixels.

    Args:
        base: clean pixels of the images to be poisoned.
        delta: where it starts, in pixels.
        sources: triggered training images of the source class.
        train_on: a model trained on the given poisons; the number is how many there were before.
        augment: the augmentation of a step.
    """
    x, d = (base - mean) / std, (delta / std).requires_grad_()
    optimizer = torch.optim.Adam([d], lr=0.1)
    drops = [int(steps // 2.667), int(steps // 1.6), int(steps // 1.142)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    labels = torch.full((len(sources),), wanted)
    model, trained = train_on(base, 0), 1
    source = loss_gradient(model, sources, labels)
    for step in range(steps):
        if step in [steps * part // (retrainings + 1) for part in range(1, retrainings + 1)]:
            model, trained = train_on(((x + d) * std + mean).detach(), trained), trained + 1
            source = loss_gradient(model, sources, labels)
        poisons = augment((x + d) * std + mean, step)
        gradient = loss_gradient(model, poisons, torch.full((len(base),), wanted), create_graph=True)
        score = 1 - F.cosine_similarity(source, gradient, dim=0, eps=0)
        d.grad = torch.autograd.grad(score, d)[0].sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            d.copy_(torch.minimum(torch.maximum(d, -xi / std), xi / std))
            d.copy_(torch.minimum(torch.maximum(d, -mean / std - x), (1 - mean) / std - x))
    return d.detach() * std
