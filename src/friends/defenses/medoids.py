"""Medoids of a set of points by facility location, and the points that stand alone.

For points g_1..g_n and a scale d, the similarity is S_ij = exp(-|g_i - g_j| / d), in (0, 1], and a set A of medoids is
worth::

    F(A) = sum over i of max over j in A of S_ij

F is monotone and submodular, so the greedy choice, which adds the point that raises F most, is within 1 - 1/e of the
best set of its size. A point that is the only one for which its medoid is the nearest stands alone.

Two ways to the same greedy choice. Gains only shrink while A grows, so a gain from an earlier round bounds today's, and
the *lazy* one (Minoux 1978) computes again only those that may still win. The *plain* one computes all of them, which
is quicker on a GPU, where it never waits for the processor. Both take the lowest index among equal gains, and what is
equal does not depend on the order of a sum: float32 numbers of 2^-16 and more, up to 8,192 of them, add up in float64
without rounding, so gains are differences of such sums and not sums of differences.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

ROWS = 512
"""Rows of the similarity matrix that are worked on at once: 20 MB for 5,000 points."""

FRESHENED = 8
"""Outdated gains that the lazy greedy computes at once: enough to be worth a call of the library."""


def similarities(points: Float[Tensor, "n d"], scale: float) -> Float[Tensor, "n n"]:
    """``exp(-distance / scale)`` in float32; 1 for equal points, exactly.

    Distances are differences squared and summed: the matrix product that is torch's default for many points loses the
    digits of small ones, and equal points would not be at distance 0. 100 MB for 5,000 points.

    Raises:
        ValueError: the scale is not positive, or a point is not finite.
    """
    if not scale > 0:
        raise ValueError(f"the scale of distances must be positive, not {scale}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("a point is not finite: no distance to it is defined")
    points = points.float()
    out = points.new_empty(len(points), len(points))
    for start in range(0, len(points), ROWS):
        part = slice(start, start + ROWS)
        distances = torch.cdist(points[part], points, compute_mode="donot_use_mm_for_euclid_dist")
        out[part] = distances.div_(-scale).exp_()
    return out


def facility_location(similarity: Float[Tensor, "n n"], k: int) -> Int64[Tensor, " m"]:
    """The first ``m = min(k, n)`` greedy medoids, in the order in which they are chosen.

    Args:
        similarity: symmetric, not negative.
        k: how many are wanted.

    Raises:
        ValueError: ``k`` is negative.
    """
    if k < 0:
        raise ValueError(f"k >= 0 medoids can be chosen, not {k}")
    greedy = lazy_greedy if similarity.device.type == "cpu" else plain_greedy
    return greedy(similarity, min(k, len(similarity)))


def lazy_greedy(similarity: Float[Tensor, "n n"], k: int) -> Int64[Tensor, " k"]:
    """Greedy medoids, computing only gains that may still win."""
    n = len(similarity)
    best = similarity.new_zeros(n)  # of each point: its similarity to its medoid
    bounds = _gains(similarity, best)
    computed = torch.zeros(n, dtype=torch.int64)  # in which round
    chosen: list[int] = []
    while len(chosen) < k:
        candidate = int(bounds.argmax())  # the first of the largest
        if int(computed[candidate]) == len(chosen):
            chosen.append(candidate)
            best = torch.maximum(best, similarity[candidate])
            bounds[candidate] = -1.0
            continue
        rows = bounds.topk(min(FRESHENED, n)).indices
        rows = torch.cat([rows[bounds[rows] >= 0], torch.tensor([candidate])])
        bounds[rows] = _gains(similarity[rows], best)
        computed[rows] = len(chosen)
    return torch.tensor(chosen, dtype=torch.int64, device=similarity.device)


def plain_greedy(similarity: Float[Tensor, "n n"], k: int) -> Int64[Tensor, " k"]:
    """Greedy medoids, computing every gain in every round."""
    best = similarity.new_zeros(len(similarity))
    taken = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    chosen = torch.zeros(k, dtype=torch.int64, device=similarity.device)
    for place in range(k):
        winner = _gains(similarity, best).masked_fill_(taken, -1.0).argmax()
        chosen[place] = winner
        taken[winner] = True
        best = torch.maximum(best, similarity[winner])
    return chosen


def _gains(similarity: Float[Tensor, "m n"], best: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """By how much each of some points, as one more medoid, would raise F."""
    parts = [torch.maximum(rows, best).sum(1, dtype=torch.float64) for rows in similarity.split(ROWS)]
    return torch.cat(parts) - best.sum(dtype=torch.float64)


def alone(similarity: Float[Tensor, "n n"], medoids: Int64[Tensor, " k"]) -> Bool[Tensor, " n"]:
    """The points whose medoid is nobody else's; between equally near medoids the one chosen first counts."""
    if len(medoids) == 0:
        return torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    cluster = similarity[:, medoids].argmax(1)
    return torch.bincount(cluster, minlength=len(medoids))[cluster] == 1
