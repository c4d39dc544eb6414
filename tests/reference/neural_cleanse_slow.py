"""Neural Cleanse written from its paper, slowly: one class after the other, with plain numbers."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from friends.defenses.reversal import Search


def anomaly_index(norms: list[float]) -> list[float]:
    middle = statistics.median(norms)
    deviation = statistics.median(abs(norm - middle) for norm in norms)
    return [abs(norm - middle) / (1.4826 * deviation) for norm in norms]


class Cost:
    """The cost of one class's mask, and whether the search for it has ended."""

    def __init__(self, search: Search) -> None:
        self.search, self.value, self.best = search, 0.0, float("inf")
        self.worked = self.failed = self.stale = 0
        self.rose = self.fell = False

    def after(self, works: bool, norm: float) -> bool:
        """Take note of a step; returns whether its mask is the smallest so far that works."""
        better = works and norm < self.best
        self.best = norm if better else self.best
        self.stale = 0 if better or self.best == float("inf") else self.stale + 1
        self.worked, self.failed = (self.worked + 1, 0) if works else (0, self.failed + 1)
        if self.worked == self.search.patience:
            if self.value == 0:
                self.value, self.rose, self.fell = self.search.cost, False, False
            else:
                self.value, self.rose = self.value * self.search.grow, True
            self.worked = 0
        elif self.failed == self.search.patience:
            self.value, self.fell, self.failed = self.value / self.search.grow**1.5, True, 0
        return better

    @property
    def over(self) -> bool:
        return self.rose and self.fell and self.stale >= 5 * self.search.patience


def reverse_one(
    model: nn.Module, x: Tensor, target: int, search: Search, start: tuple[Tensor, Tensor], orders: list[Tensor]
) -> tuple[Tensor, int]:
    """The smallest working mask ``(1, h, w)`` of one class from a given start, and the steps that it took."""
    u, v = (torch.atanh(2 * part - 1).requires_grad_() for part in start)
    adam, cost, best = torch.optim.Adam([u, v], lr=0.1, betas=(0.5, 0.9)), Cost(search), torch.ones_like(u)
    for step, order in enumerate(orders):
        hits = 0
        for rows in order[: search.samples].split(search.per_update):
            mask, pattern = u.tanh() / 2 + 0.5, v.tanh() / 2 + 0.5
            logits = model((1 - mask) * x[rows] + mask * pattern)
            adam.zero_grad()
            (F.cross_entropy(logits, torch.full((len(rows),), target)) + cost.value * mask.abs().sum()).backward()
            adam.step()
            hits += int((logits.argmax(1) == target).sum())
        mask = (u.tanh() / 2 + 0.5).detach()
        if cost.after(hits >= search.reach * min(search.samples, len(x)), float(mask.sum())):
            best = mask
        if cost.over:
            return best, step + 1
    return best, len(orders)
