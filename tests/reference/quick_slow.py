"""Polyak steps and sign flips the long way: one image at a time, one value at a time, torch's own gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def slow_quick(model: nn.Module, x: Tensor, start: Tensor, method: str, zeta: float, steps: int) -> Tensor:
    """Every image alone, from its own start."""
    one = _polyak if method == "polyak" else _flips
    return torch.cat([one(model, x[i : i + 1], start[i : i + 1], zeta, steps) for i in range(len(x))])


def _polyak(model: nn.Module, x: Tensor, start: Tensor, zeta: float, steps: int) -> Tensor:
    low, high = (-x).clamp(min=-zeta), (1 - x).clamp(max=zeta)
    e = torch.minimum(torch.maximum(start, low), high)
    last_d = last_g = None
    for _ in range(steps):
        kl, g = _kl_and_gradient(model, x, e)
        for i in range(g.numel()):  # values at a face of the box that a step would leave
            value, slope = e.view(-1)[i], g.view(-1)[i]
            if (value <= low.view(-1)[i] and slope > 0) or (value >= high.view(-1)[i] and slope < 0):
                g.view(-1)[i] = 0
        d = _conjugate(g, last_g, last_d)
        e = e - 2 * _share(kl) * kl / float((d * g).sum()) * d
        e = torch.minimum(torch.maximum(e, low), high)
        last_d, last_g = d, g
    return e


def _flips(model: nn.Module, x: Tensor, start: Tensor, zeta: float, steps: int) -> Tensor:
    e = torch.where(start < 0, -1.0, 1.0).to(x) * zeta
    last_d = last_g = None
    for _ in range(steps):
        kl, g = _kl_and_gradient(model, x, e)
        g[(x + e < 0) | (x + e > 1) | (e * g <= 0)] = 0
        d = _conjugate(g, last_g, last_d)
        goal, gained = 2 * _share(kl) * kl, 0.0
        order = (e * d).flatten().argsort(descending=True)[: e.numel() // 8]
        flat, slopes = e.flatten(), g.flatten()
        flipped = flat.clone()
        for i in order.tolist():
            gain = float(2 * flat[i] * slopes[i])
            if gain > 0 and gained + gain / 2 < goal:
                flipped[i] = -flat[i]
            gained += gain
        e = flipped.view_as(e)
        last_d, last_g = d, g
    return e


def _conjugate(g: Tensor, last_g: Tensor | None, last_d: Tensor | None) -> Tensor:
    """Polak and Ribiere's direction, or the gradient where that leads away."""
    if last_g is None or last_d is None:
        return g
    b = float((g * (g - last_g)).sum() / (last_g * last_g).sum())
    d = g + min(max(b, 0.0), 1.0) * last_d
    return d if float((d * g).sum()) > 0.1 * float((g * g).sum()) else g


def _share(kl: float) -> float:
    return 0.1 + 0.9 * min(kl / 0.02, 1.0)


def _kl_and_gradient(model: nn.Module, x: Tensor, e: Tensor) -> tuple[float, Tensor]:
    e = e.detach().clone().requires_grad_()
    p, q = model((x + e).clamp(0, 1)).softmax(1), model(x).softmax(1).detach()
    kl = (p * torch.log(p / q)).sum()
    kl.backward()
    assert e.grad is not None
    return float(kl.detach()), e.grad
