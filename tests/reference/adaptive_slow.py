"""An attacker who expects FRIENDS, written from the text of its paper: pixel by pixel, draw by draw."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def disturbed(x: Tensor, friendly: Tensor | None, noise: Tensor) -> Tensor:
    """``clip(x + f) + b`` of every value; without friendly noise nothing is clipped, and after b nothing ever is."""
    values: list[Tensor] = []
    fixed = [None] * x.numel() if friendly is None else list(friendly.flatten())
    for value, f, b in zip(x.flatten(), fixed, noise.flatten(), strict=True):
        if f is not None:
            moved = value + f
            value = moved if 0 <= moved <= 1 else moved.detach().clamp(0, 1)
        values.append(value + b)
    return torch.stack(values).view(x.shape)


def signs(shape: tuple[int, ...], mu: float, generator: torch.Generator) -> Tensor:
    """Bernoulli noise: a coin for every value of every image; the coins are bits of 64-bit numbers, lowest first."""
    count = math.prod(shape)
    words = torch.empty((count + 63) // 64, dtype=torch.int64).random_(-(2**63), None, generator=generator).tolist()
    coins = [word >> bit & 1 for word in words for bit in range(64)][:count]
    return torch.tensor([mu if coin else -mu for coin in coins], dtype=torch.float64).view(shape)


def expected_score(
    score: Callable[[Tensor], Tensor],
    pixels: Tensor,
    friendly: Tensor | None,
    *,
    mu: float,
    draws: int,
    noise: torch.Generator,
    augment: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean score over draws; each draws its noise, and then its augmentation."""
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(draws):
        seen = disturbed(pixels, friendly, signs(tuple(pixels.shape), mu, noise))
        total = total + score(augment(seen))
    return total / draws
