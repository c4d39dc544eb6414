"""The attacks written from their papers' equations, slowly: loops, normalised space, torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of the mean cross-entropy over all parameters, as one long vector."""
    loss = sum(F.cross_entropy(model(one[None]), label[None]) for one, label in zip(x, y, strict=True)) / len(x)
    parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=create_graph)
    return torch.cat([part.flatten() for part in parts])


def matching_score(model: nn.Module, poisons: Tensor, wanted: int, goal_x: Tensor) -> Tensor:
    """1 - cos(gradient of the goal, gradient of the poisons), for goal images that are all wanted as one class."""
    target = loss_gradient(model, goal_x, torch.full((len(goal_x),), wanted))
    poison = loss_gradient(model, poisons, torch.full((len(poisons),), wanted), create_graph=True)
    return 1 - F.cosine_similarity(target, poison, dim=0, eps=0)


def matching_gradient_jvp(model: nn.Module, poisons: Tensor, wanted: int, goal_x: Tensor) -> Tensor:
    """The gradient of :func:`matching_score` with respect to the poisons, without any gradient of a gradient.

    With v = -d cos / d g_p held constant, it is the gradient with respect to x of the directional derivative of the
    poisons' loss along v in parameter space.
    """
    labels = torch.full((len(poisons),), wanted)
    target = loss_gradient(model, goal_x, torch.full((len(goal_x),), wanted))
    poison = loss_gradient(model, poisons, labels)
    cos = F.cosine_similarity(target, poison, dim=0, eps=0)
    v = -(target / (target.norm() * poison.norm()) - cos * poison / poison.norm() ** 2)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = {name: p.detach() for name, p in model.named_parameters()}
    direction: dict[str, Tensor] = {}
    for name in names:
        direction[name], v = v[: values[name].numel()].view_as(values[name]), v[values[name].numel() :]

    def directional(x: Tensor) -> Tensor:
        def loss(trained: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, {**values, **trained}, (x,)), labels)

        return torch.func.jvp(loss, ({name: values[name] for name in names},), (direction,))[1]

    return torch.func.grad(directional)(poisons)


def bullseye_score(features: Callable[[Tensor], Tensor], poisons: Tensor, goal_x: Tensor, form: str) -> Tensor:
    """Both distances of Bullseye Polytope, one poison at a time."""
    target = sum(features(one[None])[0] for one in goal_x) / len(goal_x)
    mean = sum(features(one[None])[0] for one in poisons) / len(poisons)
    if form == "mean-square":
        return ((mean - target) ** 2).mean()
    return ((mean - target) ** 2).sum() ** 0.5 / (target**2).sum() ** 0.5


def descend(
    score: Callable[[Tensor, int], Tensor],
    base: Tensor,
    delta: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    xi: float,
    tau: float,
    steps: int,
    signed: bool,
) -> Tensor:
    """The outer loop as it was published: everything in normalised units, torch's Adam and step schedule.

    Args:
        score: what the poisons' *pixels* are worth at a step; augments them itself.
        base: clean pixels in [0, 1].
        delta: the start, in pixels.

    Returns:
        The perturbation in pixels.
    """
    x = (base - mean) / std
    d = (delta / std).requires_grad_()
    optimizer = torch.optim.Adam([d], lr=tau)
    drops = [int(steps // 2.667), int(steps // 1.6), int(steps // 1.142)] if signed else []
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    for step in range(steps):
        d.grad = torch.autograd.grad(score((x + d) * std + mean, step), d)[0]
        if signed:
            d.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            d.copy_(torch.minimum(torch.maximum(d, -xi / std), xi / std))
            d.copy_(torch.minimum(torch.maximum(d, -mean / std - x), (1 - mean) / std - x))
    return d.detach() * std
