"""Perturbations of pixels: where they start, what they may be, and the optimizer that moves them.

Source: Gradient Matching (Geiping et al., ICLR 2021) and its authors' framework. Everything is in pixels in [0, 1], but
step sizes are in *normalised* units, as published: a step of ``tau`` moves a pixel by ``tau * std`` of its channel.
``tau=0.1`` on CIFAR-10 is about 6/255.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Start = Literal["randn", "clean"]
"""Where the perturbation starts: at random in the ball, or at the clean base image."""


def initial_delta(
    x: Float[Tensor, "p c h w"], xi: float, start: Start, generator: torch.Generator
) -> Float[Tensor, "p c h w"]:
    """A start like ``x``: N(0, 1) * xi clipped to +-xi, so that about a third of the values are at the bound, or 0.

    Drawn on the CPU: the same poisons start the same on every device.
    """
    if start == "clean":
        return torch.zeros_like(x)
    return (torch.randn(x.shape, generator=generator) * xi).clamp(-xi, xi).to(x)


def project(delta: Float[Tensor, "p c h w"], base: Float[Tensor, "p c h w"], xi: float) -> Float[Tensor, "p c h w"]:
    """Clip to +-xi, then so that ``base + delta`` is in [0, 1]; ``base`` is the clean image, never augmented."""
    return torch.minimum(torch.maximum(delta.clamp(-xi, xi), -base), 1 - base)


def milestones(steps: int) -> tuple[int, int, int]:
    """The steps at which the step size falls to a tenth: 3/8, 5/8 and 7/8 of the way, rounded as in the original."""
    return int(steps // 2.667), int(steps // 1.6), int(steps // 1.142)


def decay(step: int, steps: int) -> float:
    """The factor of the step size at ``step`` (from 0) of ``steps``; the first step is never reduced."""
    return 0.1 ** sum(0 < milestone <= step for milestone in milestones(steps))


class PixelAdam:
    """Adam (betas 0.9 and 0.999, eps 1e-8) in normalised units, on a perturbation in pixel units.

    Args:
        std: per-channel standard deviation of the pixels: one normalised unit.
        signed: give Adam the *sign* of the gradient. As the second moment of signs is 1, a step is then ``rate``
            times a running mean of signs. (The sign of Adam's step is another, weaker optimizer.)
    """

    def __init__(self, std: Float[Tensor, "1 c 1 1"], *, signed: bool) -> None:
        self.std = std
        self.signed = signed
        self._steps = 0
        self._mean = torch.zeros_like(std)
        self._square = torch.zeros_like(std)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """What :meth:`restore` needs to go on: the running means, and how many steps were made."""
        return {"adam_mean": self._mean, "adam_square": self._square}, self._steps

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on where :meth:`state` was taken."""
        self._mean, self._square, self._steps = tensors["adam_mean"], tensors["adam_square"], steps

    def step(self, delta: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """The perturbation after one step of size ``rate`` (normalised units) against the gradient (per pixel)."""
        g = gradient * self.std  # d/d(delta/std)
        if self.signed:
            g = g.sign()
        self._steps += 1
        self._mean = 0.9 * self._mean + 0.1 * g
        self._square = 0.999 * self._square + 0.001 * g * g
        mean = self._mean / (1 - 0.9**self._steps)
        square = self._square / (1 - 0.999**self._steps)
        return delta - self.std * rate * mean / (square.sqrt() + 1e-8)


def check_xi(xi: float) -> None:
    """Raise ``ValueError`` unless a perturbation bounded by ``xi`` can survive rounding to bytes."""
    if not 1 / 255 - 1e-9 <= xi <= 1:
        hint = f"; did you mean {xi:g}/255?" if 1 < xi <= 255 else ""
        raise ValueError(f"xi is in [1/255, 1] pixel units, not {xi!r}{hint}")
