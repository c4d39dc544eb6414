"""A smooth change of an image's colours: one colour becomes another, wherever in the image it is.

Cassidy Laidlaw, Soheil Feizi: *Functional Adversarial Attacks*, NeurIPS 2019, arXiv 1906.00001, in the form that
MetaPoison uses. With c the colour of a pixel in YUV, and t a table of changes on a regular grid of colours::

    c  ->  c + sum over the corners k of the grid cell that c is in of  weight_k(c) t_k        (trilinear)
    |t_k| <= bound in each channel, and c_k + t_k is a colour again;  c_k: the colour of corner k
    roughness(t) = mean over neighbours k, l of (grid (t_k - t_l))^2

The gradient with respect to the table is that of a sum of pixels, so nothing here needs to be differentiated twice.

Departures: a colour outside the grid, such as a pure red whose V is 0.61, is changed like the nearest colour of the
grid; MetaPoison's code also moves it there, so that its zero table is not quite the identity. Images of one channel
have a grid of one dimension: a tone curve.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

YUV = (
    (0.299, 0.587, 0.114),
    (-0.14714119, -0.28886916, 0.43601035),
    (0.61497538, -0.51496512, -0.10001026),
)
"""Luma and two differences of colour, from red, green and blue."""

LOWEST = (0.0, -0.5, -0.5)
"""Where the grid begins in each channel; it is 1 long."""


@dataclass(frozen=True, kw_only=True)
class Recolour:
    """How far colours may be changed, and how smoothly.

    Args:
        bound: largest change of a colour in each channel of YUV, which are 1 long.
        grid: colours of the table along each channel.
        smoothness: weight of the roughness in the objective.

    Raises:
        ValueError: a setting is out of range.
    """

    bound: float = 0.04
    grid: int = 10
    smoothness: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.bound <= 1:
            raise ValueError(f"bound is a part of the range of colours in (0, 1], not {self.bound!r}")
        if self.grid < 2:
            raise ValueError(f"a grid has at least 2 colours along each channel, not {self.grid}")
        if not 0 <= self.smoothness < math.inf:
            raise ValueError(f"smoothness is a weight >= 0, not {self.smoothness!r}")

    def start(self, x: Float[Tensor, "p c h w"]) -> Float[Tensor, "p c *grid"]:
        """The table that changes nothing: one for each image, one dimension for each of its channels.

        Raises:
            ValueError: the images have neither one channel nor three.
        """
        check_channels(x.shape[1])
        return x.new_zeros(*x.shape[:2], *[self.grid] * x.shape[1])

    @property
    def reach(self) -> float:
        """How far a pixel can move at most, in [0, 1] pixel units: 3.03 times the bound, which is what blue can."""
        return self.bound * float(_from_yuv(3, torch.zeros((), dtype=torch.float64)).abs().sum(1).max())

    def change(self, table: Float[Tensor, "p c *grid"], x: Float[Tensor, "p c h w"]) -> Float[Tensor, "p c h w"]:
        """What the tables add to the pixels of their images, differentiable with respect to the tables."""
        colours = _to_yuv(x)
        place = ((colours - _lowest(x)) * (self.grid - 1)).clamp(0, self.grid - 1).flatten(2)
        below = place.floor().clamp(max=self.grid - 2)
        part, below, flat = place - below, below.long(), table.flatten(2)
        moved = torch.zeros_like(place)
        for corner in itertools.product((0, 1), repeat=x.shape[1]):
            index, weight = torch.zeros_like(below[:, :1]), torch.ones_like(part[:, :1])
            for channel, upper in enumerate(corner):
                index = index * self.grid + below[:, channel : channel + 1] + upper
                own = part[:, channel : channel + 1]
                weight = weight * (own if upper else 1 - own)
            moved = moved + weight * flat.gather(2, index.expand_as(place))
        return torch.einsum("dc,pcn->pdn", _from_yuv(x.shape[1], x), moved).view_as(x)

    def roughness(self, table: Float[Tensor, "p c *grid"]) -> Float[Tensor, ""]:
        """The mean square of the table's slope, over all images, channels and directions."""
        slopes = [(table.diff(dim=d) * self.grid).flatten() for d in range(2, table.ndim)]
        return torch.cat(slopes).square().mean()

    def project(self, table: Float[Tensor, "p c *grid"]) -> Float[Tensor, "p c *grid"]:
        """Clip to the bound, then so that every colour of the grid stays in the grid's range."""
        clipped, channels = table.clamp(-self.bound, self.bound), table.shape[1]
        along = torch.linspace(0, 1, self.grid).to(table)
        for channel in range(channels):
            shape = [self.grid if d == channel else 1 for d in range(channels)]
            colour = along.view(1, *shape)  # measured from where the grid begins
            clipped[:, channel] = torch.minimum(torch.maximum(clipped[:, channel], -colour), 1 - colour)
        return clipped


def check_channels(channels: int) -> None:
    """Raise ``ValueError`` unless images of so many channels have colours that are known here."""
    if channels not in (1, 3):
        raise ValueError(f"images of one or three channels can be recoloured, not of {channels}: pass recolour=None")


def _to_yuv(x: Float[Tensor, "p c h w"]) -> Float[Tensor, "p c h w"]:
    return x if x.shape[1] == 1 else torch.einsum("dc,pchw->pdhw", torch.tensor(YUV).to(x), x)


def _from_yuv(channels: int, like: Tensor) -> Float[Tensor, "c c"]:
    matrix = torch.tensor(YUV, dtype=torch.float64) if channels == 3 else torch.ones(1, 1, dtype=torch.float64)
    return torch.linalg.inv(matrix).to(like)


def _lowest(x: Float[Tensor, "p c h w"]) -> Float[Tensor, "1 c 1 1"]:
    return torch.tensor(LOWEST[: x.shape[1]]).to(x).view(1, -1, 1, 1)
