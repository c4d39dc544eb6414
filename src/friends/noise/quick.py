"""Friendly noise in four passes and without a learning rate: Polyak steps from random corners, or flipped signs.

Both start where Equation 3 ends: at noise of the largest size, +zeta or -zeta at random for every value. What is left
is to make it friendly while losing as little of its size as possible. Near the clean image the divergence is a
quadratic in a few directions (the logits' k - 1) out of thousands, so a step along its gradient g that reaches the
zero of the tangent, of length KL / |g|^2 (B. T. Polyak, *Minimization of unsmooth functionals*, 1969), removes
most of it and moves every value very little; for a quadratic the zero lies twice as far.

``polyak``   e <- e - a 2 KL / <g, d> d, cut to the box, along conjugate directions d = g + b d'
             (E. Polak, G. Ribiere, 1969, with b cut to [0, 1]), over the values that are free to move
``flips``    the values with the largest e d change their signs, until the tangent says that a 2 KL is gained;
             the result stays a corner, and differs from its random start in few signs

a grows with KL, from 0.1 where there is hardly any to 1: an image that is nearly there already would pay for the last
of its divergence with size. These are ours; the paper has neither. Both are judged by the value of Equation 3.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from friends.noise.divergence import Direction, pull
from friends.noise.lean import Logits

Method = Literal["sgd", "polyak", "flips"]

LEAST, FULL = 0.1, 0.02
"""The share of the way that is gone at KL 0, and the KL in nats from which on all of it is."""

ROOM = 2.0**40

MOST_FLIPS = 1 / 8
"""Of the values of an image, in one pass."""


def box(x: Float[Tensor, "b c h w"], zeta: float) -> tuple[Tensor, Tensor]:
    """The least and the largest noise of every value: within zeta, and image plus noise within [0, 1]."""
    return (-x).clamp_(min=-zeta), (1 - x).clamp_(max=zeta)


def polyak(
    f: Logits,
    x: Float[Tensor, "b c h w"],
    start: Float[Tensor, "b c h w"],
    clean: Float[Tensor, "b k"],
    *,
    zeta: float,
    steps: int,
    direction: Direction,
) -> Float[Tensor, "b c h w"]:
    """Friendly noise within the box by Polyak steps along conjugate directions.

    Args:
        f: the network.
        x: pixels in [0, 1].
        start: where each row starts, cut to the box.
        clean: log-probabilities of the images.
        zeta: bound of the noise.
        steps: how many; each is one pass forward and back.
        direction: of the divergence.
    """
    low, high = box(x, zeta)
    e = torch.clamp(start, low, high)
    way = Way()
    for _ in range(steps):
        kl, g = pull(f, x + e, clean, direction)
        d, slope = way.on(_free(g, e, low, high))
        e = torch.addcmul(e, d, _rows(_gain(kl) / -slope))
        torch.clamp(e, low, high, out=e)
    return e


def _free(g: Tensor, e: Tensor, low: Tensor, high: Tensor) -> Float[Tensor, "b c h w"]:
    """The gradient, but 0 where a step against it would leave the box; without masks, which take thrice the time.

    It is cut to the room behind and before each value, 2^40 times over: no gradient is that large, except where
    there is no room at all.
    """
    behind, before = torch.sub(e, low), torch.sub(e, high)
    return torch.clamp(g, before.mul_(ROOM), behind.mul_(ROOM), out=g)


def flips(
    f: Logits,
    x: Float[Tensor, "b c h w"],
    start: Float[Tensor, "b c h w"],
    clean: Float[Tensor, "b k"],
    *,
    zeta: float,
    steps: int,
    direction: Direction,
) -> Float[Tensor, "b c h w"]:
    """Friendly noise at the corners +-zeta by changing signs. Arguments are those of :func:`polyak`.

    Image plus noise may leave [0, 1]; the network sees it cut, and so must whoever uses it.
    """
    e = torch.where(start < 0, -1.0, 1.0).to(x) * zeta
    most = max(1, int(e[0].numel() * MOST_FLIPS))
    way = Way()
    for _ in range(steps):
        seen = x + e
        image = seen.clamp(0, 1)
        kl, g = pull(f, image, clean, direction)
        d, _ = way.on(g.mul_((image == seen) & (e * g > 0)))
        where = (e * d).flatten(1).topk(most, dim=1).indices
        gain = 2 * (e * g).flatten(1).gather(1, where)
        # each gain that begins before the goal is reached by more than half of itself
        turn = (gain.cumsum(1) - gain / 2 < _gain(kl)[:, None]) & (gain > 0)
        signs = torch.ones_like(e).flatten(1).scatter_(1, where, torch.where(turn, -1.0, 1.0).to(e))
        e = e * signs.view_as(e)
    return e


class Way:
    """Conjugate directions, each row its own."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor, Tensor] | None = None

    def on(self, g: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """The direction against which to go next, and how fast the divergence falls along it: <g, direction>.

        Where the last direction leads away from the gradient, it is forgotten.

        Args:
            g: the gradient, 0 where a value cannot move.
        """
        steep = _dot(g, g)
        d, slope = g, steep
        if self._before is not None:
            last, last_g, last_steep = self._before
            b = ((steep - _dot(g, last_g)) / _safe(last_steep)).clamp(0, 1)
            along = steep + b * _dot(g, last)
            good = along > 0.1 * steep
            d, slope = torch.addcmul(g, last, _rows(b * good)), torch.where(good, along, steep)
        self._before = d, g, steep
        return d, _safe(slope)


def _gain(kl: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """By how much the tangent is followed down, for each row."""
    return 2 * kl * (LEAST + (1 - LEAST) * (kl / FULL).clamp(max=1))


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, " b"]:
    rows = (t.permute(0, 2, 3, 1).flatten(1) for t in (a, b))  # no copy, channels being last in memory
    return torch.linalg.vecdot(*rows)


def _rows(values: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return values.view(-1, 1, 1, 1)


def _safe(length: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Not 0: where there is no gradient there is no step, as there is no divergence."""
    return length.clamp(min=torch.finfo(length.dtype).tiny)
