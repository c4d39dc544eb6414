"""What the defenses that perturb their own training batches share: how many images, and how far each may go."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def share(images: int, fraction: float) -> int:
    """How many of a batch's images a fraction of it is, rounded down: a short last batch keeps the proportion."""
    return math.floor(images * fraction + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point


def check_share(images: int, fraction: float) -> None:
    """Raise ``ValueError`` if a fraction of a full batch, rounded down, is no image."""
    if share(images, fraction) == 0:
        raise ValueError(f"fraction = {fraction:g} of a batch of {images} is no image, so nothing would be perturbed: "
                         "raise the fraction or the batch, or switch the defense off with eps = 0")  # fmt: skip


def project(delta: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], eps: float) -> Float[Tensor, "b c h w"]:
    """The nearest perturbation in the ball ``|delta| <= eps`` that does not take ``x`` out of [0, 1], per pixel.

    Random noise of a defense that came before may already have left [0, 1]. Such a pixel may move back towards the
    range, or stay, but it is not dragged into it: that could take more than ``eps``.

    Args:
        delta: a perturbation in [0, 1] pixel units.
        x: the images, in the same units.
        eps: radius of the ball; never exceeded, wherever ``x`` is.
    """
    return torch.minimum(torch.maximum(delta.clamp(-eps, eps), -x.clamp(min=0)), (1 - x).clamp(min=0))


def check_steps(steps: int, **sizes: float) -> None:
    """Raise ``ValueError`` unless there is a step and every step size is positive and finite; names the culprit."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}; eps = 0 switches the defense off")
    for name, size in sizes.items():
        if not 0 < size < math.inf:
            raise ValueError(f"{name}, the size of a step, must be positive, not {size}")
