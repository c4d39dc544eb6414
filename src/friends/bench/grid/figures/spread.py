"""How much a model's output varies around images: the standard deviation of KL divergences in balls (Figure 5 c)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from friends.modules import logits_of, still

POINTS = 10
"""Random points in the ball around an image, as in the paper."""


def in_ball(
    x: Float[Tensor, "n c h w"], generator: torch.Generator, points: int = POINTS
) -> Float[Tensor, "p n c h w"]:
    """Draws from the cube [-1, 1]: times a radius, they are random points in the l_inf ball of that radius."""
    return 2 * torch.rand((points, *x.shape), generator=generator) - 1


def divergence_spread(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    noises: Float[Tensor, "k n c h w"],
    offsets: Float[Tensor, "p n c h w"],
    radius: float,
) -> Float[Tensor, "k n"]:
    """The standard deviation, over points z around each image, of KL(f(z) || f(z + noise)), for several noises.

    Args:
        model: takes pixels in [0, 1]; seen in eval mode, and left as it was.
        x: the images.
        noises: for each kind of noise, that of each image, the same at all its points.
        offsets: from :func:`in_ball`; the points are ``x + radius * offsets``, cut to [0, 1].
        radius: of the ball, in [0, 1] pixel units; at 0 all points are the image, and the spread is 0.

    Raises:
        ValueError: there are fewer than two points.
    """
    if len(offsets) < 2:
        raise ValueError(f"a standard deviation over {len(offsets)} points is undefined")
    device = next(model.parameters()).device
    found = torch.zeros(len(offsets), *noises.shape[:2], dtype=torch.float64)
    with still([model], freeze=True), torch.no_grad():
        for number, offset in enumerate(offsets):
            points = (x + radius * offset).clamp(0, 1).to(device)
            before = logits_of(model, points).double().log_softmax(1)
            for kind, noise in enumerate(noises):
                after = logits_of(model, points + noise.to(points)).double().log_softmax(1)
                found[number, kind] = (before.exp() * (before - after)).sum(1).cpu()
    return found.std(0).float()
