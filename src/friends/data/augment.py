"""Random flip and sub-pixel shift of whole batches, differentiable with respect to the pixels.

Source: the augmentation of Gradient Matching (Geiping et al., ICLR 2021) and of the FRIENDS trainer: a horizontal
flip with probability 1/2 and a shift by up to 4 pixels, by bilinear sampling. There it acts on normalised images
with zero padding; we act on pixels and pad with ``fill``, which is the same thing where ``fill`` is the mean colour
that the model subtracts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augment:
    """Each image is flipped with probability ``flip`` and shifted by U(-shift, shift) pixels in both directions.

    Args:
        flip: probability of a horizontal flip, in [0, 1].
        shift: largest shift in pixels; need not be whole. The grid runs from corner centre to corner centre
            (``align_corners=True``), so one pixel is 2/(w-1) of it; the released code's 8/31 of a 32-pixel grid
            is exactly 4 pixels.
    """

    flip: float = 0.5
    shift: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability in [0, 1], not {self.flip}")
        if not 0 <= self.shift < float("inf"):
            raise ValueError(f"shift is a number of pixels >= 0, not {self.shift}")

    def __call__(
        self, x: Float[Tensor, "b c h w"], generator: torch.Generator, fill: tuple[float, ...]
    ) -> Float[Tensor, "b c h w"]:
        """Augment a batch of pixels; a new draw for each image, taken from ``generator`` (on the device of ``x``).

        Args:
            fill: per-channel colour, in [0, 1], of what is shifted in from outside.

        Raises:
            ValueError: ``fill`` has not one value per channel.
        """
        b, c, h, w = x.shape
        if len(fill) != c:
            raise ValueError(f"{len(fill)} fill values for {c} channels")
        if b == 0 or (self.flip == 0 and self.shift == 0):
            return x
        draw = torch.rand(3, b, generator=generator, device=x.device, dtype=torch.float32)
        sign = torch.where(draw[0] < self.flip, -1.0, 1.0)
        dx = (2 * draw[1] - 1) * self.shift * 2 / max(w - 1, 1)
        dy = (2 * draw[2] - 1) * self.shift * 2 / max(h - 1, 1)
        across = torch.linspace(-1, 1, w, device=x.device) if w > 1 else torch.zeros(1, device=x.device)
        down = torch.linspace(-1, 1, h, device=x.device) if h > 1 else torch.zeros(1, device=x.device)
        gx = sign[:, None] * (across[None] + dx[:, None])  # the flip comes after the shift
        gy = down[None] + dy[:, None]
        grid = torch.stack([gx[:, None, :].expand(b, h, w), gy[:, :, None].expand(b, h, w)], dim=-1)
        colour = torch.tensor(fill, device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
        shifted = F.grid_sample(x - colour, grid.to(x.dtype), mode="bilinear", padding_mode="zeros", align_corners=True)
        return shifted + colour
