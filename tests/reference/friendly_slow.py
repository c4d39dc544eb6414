"""Friendly noise the long way: one image at a time, torch's own optimiser and losses, written from the equations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def slow_noise(model: nn.Module, x: Tensor, initial: Tensor, settings) -> Tensor:
    """Equation 3 (or its variants) for each image alone. ``settings`` is read by attribute only."""
    return torch.cat([_one(model, x[i : i + 1], initial[i : i + 1], settings) for i in range(len(x))])


def _one(model: nn.Module, x: Tensor, initial: Tensor, s) -> Tensor:
    clean = model(x).softmax(1).detach()
    e = nn.Parameter(initial.clone())
    sgd = torch.optim.SGD([e], lr=s.lr / 128, momentum=0.9, nesterov=True)
    if s.bound == "project":
        e.data = _box(e.data, x, s.zeta)
    for _ in range(s.steps):
        sgd.zero_grad()
        seen = e if s.bound == "project" else torch.clamp(e, -s.zeta, s.zeta)
        noisy = model(torch.clamp(x + seen, 0, 1)).softmax(1)
        p, q = (noisy, clean) if s.direction == "noisy||clean" else (clean, noisy)
        kl = (p * torch.log(p / q)).sum()
        size = {
            "l2": lambda v: (v**2).sum().sqrt(),
            "l1": lambda v: v.abs().sum(),
            "linf": lambda v: v.abs().max(),
            "msq": lambda v: (v**2).mean(),
        }[s.norm](seen)
        (kl - s.penalty * size).backward()
        sgd.step()
        if s.bound == "project":
            e.data = _box(e.data, x, s.zeta)
    return _box(e.data, x, s.zeta)


def _box(e: Tensor, x: Tensor, zeta: float) -> Tensor:
    """The nearest noise with |e| <= zeta and x + e in [0, 1]. Values at the bound are equal, so linf has ties."""
    return e.clamp(torch.clamp(-x, min=-zeta), torch.clamp(1 - x, max=zeta))


def released_noise(
    model: nn.Module, x: Tensor, initial: Tensor, steps: int, *, lr: float = 100, weight: float = 1
) -> Tensor:
    """What the released code computes for a batch of 128: batch means, a free variable, clipping in the loss."""
    assert len(x) == 128
    bound = 16 / 255
    e = initial.clone().requires_grad_()
    sgd = torch.optim.SGD([e], lr=lr, momentum=0.9, nesterov=True)
    divergence = nn.KLDivLoss(log_target=True, reduction="batchmean")
    target = torch.log_softmax(model(x), 1).detach()
    for _ in range(steps):
        clipped = torch.clamp(e, -bound, bound)
        out = torch.log_softmax(model(torch.clamp(x + clipped, 0, 1)), 1)
        loss = divergence(out, target) - weight * torch.mean(torch.square(clipped))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return torch.clamp(e.detach(), -bound, bound)
