"""Convex combinations: the one nearest to a point, by forward-backward splitting on the simplex.

With points a_1, ..., a_b, a point w to be combined, and L a bound on the largest eigenvalue of their inner products::

    minimise over c >= 0, sum of c = 1    1/2 |w - sum_j c_j a_j|^2
    forward   c' = c - gradient / L
    backward  c  = the nearest point of the simplex to c'

The mean of the points is subtracted from all, w too. That moves no minimum, as the coefficients sum to 1, and takes out
of L what all points have in common, which is most of it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

LIMIT = 10_000
"""Steps after which a search ends though its coefficients still change."""


def simplex_fit(
    points: Float[Tensor, "t b d"],
    wanted: Float[Tensor, "m d"],
    owner: Int64[Tensor, " m"],
    start: Float[Tensor, "m b"] | None = None,
    *,
    tol: float = 1e-6,
) -> Float[Tensor, "m b"]:
    """The coefficients, in float64, of the convex combinations of points that are nearest to the wanted ones.

    Each row ends by itself, so that none depends on what else is asked for.

    Args:
        points: t sets of b points.
        wanted: what is to be combined.
        owner: of which set.
        start: coefficients from which the search starts; the uniform ones by default.
        tol: relative change of a row's coefficients at which its search ends.
    """
    gram, towards, bound = _centred(points.double(), wanted.double(), owner)
    c = torch.full_like(towards, 1 / towards.shape[1]) if start is None else start
    moving = torch.ones(len(c), 1, dtype=torch.bool, device=c.device)
    for _ in range(LIMIT):
        slope = torch.einsum("mij,mj->mi", gram, c) - towards
        new = onto_simplex(c - slope / bound)
        ended = (new - c).norm(dim=1, keepdim=True) < tol * c.norm(dim=1, keepdim=True)
        c = torch.where(moving, new, c)
        moving = moving & ~ended
        if not bool(moving.any()):
            break
    return c


def _centred(
    points: Float[Tensor, "t b d"], wanted: Float[Tensor, "m d"], owner: Int64[Tensor, " m"]
) -> tuple[Float[Tensor, "m b b"], Float[Tensor, "m b"], Float[Tensor, "m 1"]]:
    """Inner products of the points, and with what is wanted, all relative to the points' mean; and the bound L."""
    mean = points.mean(1)
    apart = points - mean[:, None]
    gram = apart @ apart.mT
    towards = torch.einsum("mbd,md->mb", apart[owner], wanted - mean[owner])
    rounding = 1e-12 * points.square().sum((1, 2))  # where all points are one, the rest is rounding
    return gram[owner], towards, torch.maximum(eigenvalue_bound(gram), rounding)[owner, None]


def eigenvalue_bound(gram: Float[Tensor, "t b b"]) -> Float[Tensor, " t"]:
    """A bound on the largest eigenvalue, and at most b^(1/8) times it: ``|G^4|_F^(1/4)``. G is symmetric."""
    size = torch.linalg.matrix_norm(gram).clamp_min(torch.finfo(gram.dtype).tiny)
    fourth = torch.linalg.matrix_power(gram / size[:, None, None], 4)
    return size * torch.linalg.matrix_norm(fourth) ** 0.25


def onto_simplex(v: Float[Tensor, "m b"]) -> Float[Tensor, "m b"]:
    """The nearest point to each row that has no negative entry and sums to 1, exactly: sort, then shift and cut."""
    ordered = v.sort(dim=1, descending=True).values
    shift = (ordered.cumsum(1) - 1) / torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)
    last = (ordered > shift).sum(1, keepdim=True) - 1
    return (v - shift.gather(1, last)).clamp_min(0)
