"""The two clusters of k-means by trying every cut in two, and their silhouette pair by pair."""

from __future__ import annotations

from torch import Tensor


def best_cut(points: Tensor) -> set[int]:
    """The smaller part of the cut in two with the least squared distance to the two means."""
    n = len(points)

    def spread(rows: list[int]) -> float:
        part = points[rows].double()
        return float(((part - part.mean(0)) ** 2).sum())

    def cost(bits: int) -> float:
        return spread([i for i in range(n) if bits >> i & 1]) + spread([i for i in range(n) if not bits >> i & 1])

    best = min(range(1, 2 ** (n - 1)), key=cost)
    part = {i for i in range(n) if best >> i & 1}
    return part if 2 * len(part) < n else set(range(n)) - part


def silhouette(points: Tensor, small: Tensor) -> float:
    """The mean over all rows of (b - a) / max(a, b)."""
    inside = small.tolist()
    total = 0.0
    for i, own in enumerate(inside):
        apart = [float((points[i].double() - other.double()).norm()) for other in points]
        mine = [apart[j] for j, member in enumerate(inside) if member == own and j != i]
        theirs = [apart[j] for j, member in enumerate(inside) if member != own]
        if mine:
            a, b = sum(mine) / len(mine), sum(theirs) / len(theirs)
            total += (b - a) / max(a, b)
    return total / len(inside)
