"""Adversarial Poisoning written from its paper, slowly: normalised images, torch's own Adam, nothing reused."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def flat_gradient(model: nn.Module, x: Tensor, y: Tensor, *, graph: bool = False) -> Tensor:
    """The gradient of the mean cross-entropy over all trainable parameters, as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=graph)
    return torch.cat([part.flatten() for part in parts])


def alignment(model: nn.Module, poisons: Tensor, labels: Tensor, targets: Tensor, *, graph: bool = False) -> Tensor:
    """cos(g_P, g_T), with the fake label counted by hand."""
    counts = Counter(labels.tolist())
    fake = min(label for label in counts if counts[label] == max(counts.values()))
    wanted = flat_gradient(model, targets, torch.full((len(targets),), fake), graph=graph)
    return F.cosine_similarity(flat_gradient(model, poisons, labels, graph=graph), wanted, dim=0)


def poison_slowly(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    count: int,
    delta: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    eps: float,
    steps: int,
    tau: float,
) -> Tensor:
    """The batch, its first ``count`` images poisoned; ``delta`` is where they start, in pixels."""
    normal = (x[:count] - mean) / std
    d = (delta / std).requires_grad_()
    adam = torch.optim.Adam([d], lr=tau)
    for _ in range(steps):
        loss = -alignment(model, (normal + d) * std + mean, y[:count], x[count:], graph=True)
        (gradient,) = torch.autograd.grad(loss, d)
        d.grad = gradient.sign()
        adam.step()
        with torch.no_grad():
            d.copy_(torch.maximum(torch.minimum(d, eps / std), -eps / std))
            d.copy_(torch.maximum(torch.minimum(d, (1 - mean) / std - normal), -mean / std - normal))
    return torch.cat([((normal + d) * std + mean).detach(), x[count:]])
