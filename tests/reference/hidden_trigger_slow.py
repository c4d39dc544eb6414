"""Hidden Trigger Backdoor written from its paper, slowly: loops over pairs, the gradient of one poison at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def greedy_matching(distances: list[list[float]]) -> list[int]:
    """For each column its row: again and again the nearest pair of all that are left."""
    n = len(distances)
    rows, columns, row_of = set(range(n)), set(range(n)), [-1] * n
    while rows:
        row, column = min(((r, c) for r in sorted(rows) for c in sorted(columns)), key=lambda p: distances[p[0]][p[1]])
        row_of[column] = row
        rows.remove(row)
        columns.remove(column)
    return row_of


def hidden_trigger(
    features: Callable[[Tensor], Tensor],
    base: Tensor,
    triggered: Tensor,
    *,
    xi: float,
    steps: int,
    rate: float,
    factor: float,
    every: int,
    stop: Callable[[list[float]], bool],
) -> tuple[Tensor, int]:
    """The poisons of one batch, pixels in [0, 1], and how many steps were made."""
    wanted = [features(one[None])[0].detach() for one in triggered]
    poisons = base.clone()
    for step in range(steps):
        here = [features(one[None])[0].detach() for one in poisons]
        row_of = greedy_matching([[float((w - h).norm()) for h in here] for w in wanted])
        losses: list[float] = []
        moved: list[Tensor] = []
        for j, poison in enumerate(poisons):
            x = poison.clone().requires_grad_()
            loss = ((wanted[row_of[j]] - features(x[None])[0]) ** 2).sum()
            gradient = torch.autograd.grad(loss, x)[0]
            change = (x.detach() - rate * factor ** (step // every) * gradient - base[j]).clamp(-xi, xi)
            moved.append((base[j] + change).clamp(0, 1))
            losses.append(float(loss.detach()))
        poisons = torch.stack(moved)
        if stop(losses):
            return poisons, step + 1
    return poisons, steps
